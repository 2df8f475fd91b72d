"""`status`: the progress of a run, what is retried and why, and what becomes of it."""

from __future__ import annotations

from ingestrun.cli.arguments import Parser, add_cluster_flags, add_output_flag, run_name
from ingestrun.cli.errors import CliError, ExitCode
from ingestrun.cli.progress import average_pace, status_data, status_text
from ingestrun.cli.runs import Json, Run
from ingestrun.cli.session import Session
from ingestrun.model.names import LABEL_RUN_UID


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "status",
        usage="NAME [flags]",
        description="Show the progress of a run: batches, rows a second, the time left, what is retried and why.",
        examples="kubectl ingestrun status flights\nkubectl ingestrun watch flights",
    )
    made.add_argument("name", metavar="NAME", help="the run")
    add_output_flag(made, "json", "yaml")
    add_cluster_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Print the page, or the data of it."""
    body, now = session.api.run(session.namespace, run_name(session.options.name))
    found = Run(body)
    pace = average_pace(found, now, resumed_run(session, found))
    if session.options.output:
        session.output.data(status_data(found, now, pace), session.options.output)
        return ExitCode.OK
    session.output.write(status_text(found, now, session.output, pace=pace, jobs=jobs_of(session, found)))
    return ExitCode.OK


def jobs_of(session: Session, found: Run) -> list[Json] | None:
    """Return the Jobs of an active run; None if this user may not see Jobs."""
    if found.ended:
        return []
    try:
        return session.api.jobs(found.namespace, f"{LABEL_RUN_UID}={found.uid}")
    except CliError:
        return None


def resumed_run(session: Session, found: Run) -> Run | None:
    """Return the run that this one has resumed, if it still exists."""
    resumed = found.status.get("resumedFrom") or {}
    if not resumed.get("name"):
        return None
    try:
        before = Run(session.api.run(found.namespace, resumed["name"])[0])
    except CliError:
        return None
    return before if before.uid == resumed.get("uid") else None
