"""`retry --failed`: a new run that does the failed batches of an ended one again."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser
from ingestrun.cli.commands.resume import add_resume_flags, resume
from ingestrun.cli.errors import ExitCode, UsageError
from ingestrun.cli.session import Session


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "retry",
        usage="NAME --failed [flags]",
        description="Create a run that does the failed batches of an ended run again, and what else of it is left.",
        examples="kubectl ingestrun retry flights --failed",
    )
    made.add_argument("--failed", action="store_true", help="the failed batches (required: there is no other kind yet)")
    add_resume_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Create the run."""
    if not session.options.failed:
        raise UsageError("required flag(s) not set: --failed")
    return resume(session, failed=True)
