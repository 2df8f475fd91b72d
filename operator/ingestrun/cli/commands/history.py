"""`history`: the ended runs that still exist: how, when, by whom and why they ended, what they published."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser, add_cluster_flags, add_output_flag
from ingestrun.cli.errors import ExitCode
from ingestrun.cli.listing import HISTORY_HEAD, history_entry, history_row, newest_end_first
from ingestrun.cli.output import table
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "history",
        usage="[-l LABELS] [flags]",
        description="List the ended runs that still exist, the newest end first.",
        examples="kubectl ingestrun history --limit 5\nkubectl ingestrun history -A -o json",
    )
    made.add_argument("-l", "--selector", metavar="LABELS", help="only runs with these labels")
    made.add_argument("--limit", type=int, metavar="NUMBER", help="only so many, the newest")
    add_output_flag(made, "json", "yaml")
    add_cluster_flags(made, all_namespaces=True)
    return made


def run(session: Session) -> ExitCode:
    """List the ended runs."""
    options = session.options
    listed = session.api.runs(session.scope, selector=options.selector)
    runs = newest_end_first(found for found in map(Run, listed.items) if found.ended)[: options.limit]
    if options.output:
        session.output.data({"items": [history_entry(found) for found in runs]}, options.output)
    elif not runs:
        session.complain_of_none("ended ")
    else:
        every = session.scope is None
        rows = [[*([found.namespace] if every else []), *history_row(found)] for found in runs]
        session.output.write(table([*(["NAMESPACE"] if every else []), *HISTORY_HEAD], rows))
    return ExitCode.OK
