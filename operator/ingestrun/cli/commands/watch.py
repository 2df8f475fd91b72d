"""`watch`: the progress of a run until it ends."""

from __future__ import annotations

import time

from ingestrun.cli.arguments import Parser, add_cluster_flags, run_name
from ingestrun.cli.commands.status import jobs_of, resumed_run
from ingestrun.cli.errors import CliError, ExitCode
from ingestrun.cli.follow import Clock, Follower
from ingestrun.cli.progress import PaceMeter, average_pace, change_line, status_text
from ingestrun.cli.runs import Json, Run
from ingestrun.cli.session import Session
from ingestrun.model.names import RunKey
from ingestrun.model.phase import Phase

REDRAW_SECONDS = 1.0
JOBS_SECONDS = 3.0
"""Interval at which the Jobs are listed again, because only the run itself is watched."""


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "watch",
        usage="NAME [flags]",
        description="Follow the progress of a run until it ends: on a terminal as a page, otherwise a line a change.\n"
        "The exit code is 0 if it has Succeeded, and 1 if it has Failed, was Cancelled or is deleted.",
        examples="kubectl ingestrun watch flights",
    )
    made.add_argument("name", metavar="NAME", help="the run")
    add_cluster_flags(made)
    return made


def run(session: Session) -> ExitCode:
    """Follow the run."""
    return follow(session, run_name(session.options.name))


def follow(session: Session, name: str) -> ExitCode:
    """Show a run until it ends. Raises CliError."""
    follower = Follower(session.api, session.namespace, field_selector=f"metadata.name={name}")
    key = RunKey(namespace=session.namespace, name=name)
    if key not in follower.runs:
        raise CliError(f'Error from server (NotFound): ingestruns.ingestrun.dev "{name}" not found', ExitCode.NOT_FOUND)
    page = Page(session, follower.runs[key], follower.clock)
    while key in follower.runs and not follower.runs[key].ended:
        page.show(follower.runs[key])
        for _ in follower.changes(REDRAW_SECONDS if session.output.fancy else float("inf")):
            if key not in follower.runs or follower.runs[key].ended:
                break
            page.show(follower.runs[key])
    if key not in follower.runs:
        session.output.complain(f'run "{name}" is deleted')
        return ExitCode.ERROR
    page.show(follower.runs[key])
    return ExitCode.OK if follower.runs[key].phase == Phase.SUCCEEDED else ExitCode.ERROR


class Page:
    """The page about a run, drawn over itself; where that cannot be done, a line for each change."""

    def __init__(self, session: Session, found: Run, clock: Clock) -> None:
        self._session = session
        self._clock = clock
        self._meter = PaceMeter()
        self._before = resumed_run(session, found)
        self._lines = 0
        self._line = ""
        self._jobs: list[Json] | None = None
        self._jobs_at = float("-inf")

    def show(self, found: Run) -> None:
        """Show the run as it is now."""
        now, output = self._clock.now(), self._session.output
        if not output.fancy:
            line = change_line(found, now)
            if line != self._line:
                output.write(line)
                self._line = line
            return
        self._meter.add(found, now)
        if time.monotonic() - self._jobs_at > JOBS_SECONDS or found.ended:
            self._jobs, self._jobs_at = jobs_of(self._session, found), time.monotonic()
        pace = self._meter.pace() or average_pace(found, now, self._before)
        text = status_text(found, now, output, pace=pace, jobs=self._jobs)
        self._lines = output.redraw(text, over=self._lines)
