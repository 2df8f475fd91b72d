"""`list`: the runs; of cancelled ones when, by whom and why."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from ingestrun.cli.arguments import Parser, add_cluster_flags, add_output_flag
from ingestrun.cli.errors import ExitCode, UsageError
from ingestrun.cli.follow import DELETED, Follower
from ingestrun.cli.listing import Columns, newest_end_first
from ingestrun.cli.output import table
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session
from ingestrun.model.phase import Phase

_PHASES: Final = {phase.lower(): phase for phase in Phase}


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "list",
        usage="[-l LABELS] [--phase PHASE,...] [flags]",
        description="List runs. --phase Cancelled lists when, by whom and why, the newest first.",
        examples="""
kubectl ingestrun list -A
kubectl ingestrun list --phase Running,Pending --watch
kubectl ingestrun list --phase Cancelled -o wide
""",
    )
    made.add_argument("-l", "--selector", metavar="LABELS", help="only runs with these labels")
    made.add_argument("--phase", metavar="PHASE,...", default="", help=f"only runs in {', '.join(Phase)}")
    made.add_argument("-w", "--watch", action="store_true", help="after the list, print each change of a run")
    add_output_flag(made, "wide", "name", "json", "yaml")
    add_cluster_flags(made, all_namespaces=True)
    return made


def run(session: Session) -> ExitCode:
    """List the runs, and go on with each change if that is asked for."""
    options, output = session.options, session.output
    phases = _phases(options.phase)
    if options.watch and options.output in ("json", "yaml"):
        raise UsageError("--watch goes with a table or with names")
    one = _field_selector(phases)
    follower = Follower(session.api, session.scope, selector=options.selector, field_selector=one)
    runs = [found for found in follower.runs.values() if not phases or found.phase in phases]
    columns = Columns(
        cancelled=phases == [Phase.CANCELLED],
        wide=options.output == "wide",
        with_namespace=session.scope is None,
    )
    if columns.cancelled:
        runs = newest_end_first(runs)
    if options.output in ("json", "yaml"):
        body = {"apiVersion": "v1", "kind": "List", "items": [found.body for found in runs]}
        output.data(body, options.output)
        return ExitCode.OK
    widths = _show(session, follower, columns, runs)
    while options.watch:
        for kind, changed in follower.changes(float("inf")):
            if kind != DELETED and (not phases or changed.phase in phases):
                row = columns.row(changed, follower.clock.now())
                output.write(changed.reference if options.output == "name" else table([], [row], widths=widths))
    return ExitCode.OK


def _field_selector(phases: Sequence[Phase]) -> str | None:
    """Return the selector of one phase; None of several, or of Pending, which a run without a phase is too."""
    return f"status.phase={phases[0]}" if len(phases) == 1 and phases[0] is not Phase.PENDING else None


def _show(session: Session, follower: Follower, columns: Columns, runs: Sequence[Run]) -> list[int]:
    """Print the list as a table or as names; return the widths of the table's columns, for the lines that follow."""
    options, output = session.options, session.output
    widths: list[int] = []
    if options.output == "name":
        for found in runs:
            output.write(found.reference)
    elif runs or options.watch:
        now = follower.clock.now()
        output.write(table(columns.head, [columns.row(found, now) for found in runs], widths=widths))
    else:
        session.complain_of_none()
    return widths


def _phases(text: str) -> list[Phase]:
    """Return the phases that are asked for. Raises UsageError."""
    named = [part.strip().lower() for part in text.split(",") if part.strip()]
    unknown = [name for name in named if name not in _PHASES]
    if unknown:
        raise UsageError(f'invalid argument "{unknown[0]}" for "--phase" flag: choose from {", ".join(Phase)}')
    return [_PHASES[name] for name in named]
