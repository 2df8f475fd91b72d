"""`cleanup`: cancel the runs that stand still, with that as the reason."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser, Selection
from ingestrun.cli.commands.cancel import add_cancel_flags, cancel_selected
from ingestrun.cli.durations import parse_duration
from ingestrun.cli.errors import ExitCode
from ingestrun.cli.session import Session


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "cleanup",
        usage="--stale DURATION [-l LABELS] [flags]",
        description="Cancel the Pending and Running runs that have made no progress for so long,\n"
        "by the server's clock. Progress counts, and not age: a healthy old run is left alone.",
        examples="""
kubectl ingestrun cleanup --stale 10m --dry-run
kubectl ingestrun cleanup --stale 1h -A --cascade
""",
    )
    made.add_argument("--stale", metavar="DURATION", type=parse_duration, required=True, help="how long, such as 10m")
    made.add_argument("-l", "--selector", metavar="LABELS", help="only runs with these labels")
    add_cancel_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Cancel what stands still, and print a summary for each run."""
    options = session.options
    return cancel_selected(session, Selection(selector=options.selector), stale=options.stale)
