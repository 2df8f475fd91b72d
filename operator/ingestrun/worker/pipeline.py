"""One batch from its source through its hooks to its sink, in one process: the links of all the stages in a row.

The fetch is read to its end first, because only then is the schema known that fits all its pages, and is the chain's
next cursor. From there on the rows stream: the sink takes table by table from the last hook, and each hook from the one
before. Nothing is seen of the batch until the permission is given, after everything was written and audited.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import pyarrow as pa

from ingestrun.model.contract import RUNS_DIRECTORY, StageResult
from ingestrun.worker.collector import MEMORY_BYTES, RowCollector
from ingestrun.worker.context import Context, parse_key
from ingestrun.worker.fetch import FetchLink
from ingestrun.worker.hook import open_hook, open_quarantine
from ingestrun.worker.publish import ParquetLink
from ingestrun.worker.rows import Rows
from ingestrun.worker.shutdown import Cancelled, Stop
from ingestrun.worker.validate import ValidateLink


@dataclass(frozen=True)
class BatchResult:
    """The account of a batch that was published: the rows written, and those that all hooks rejected."""

    written: int
    rejected: int
    manifest: str | None


class Course(Protocol):
    """The course of a batch, as the pipeline tells it."""

    def enter(self, stage: int) -> int:
        """Take note that this stage, by its index, is at work from now on; return the one that was.

        A stage that is entered for the first time may be refused, by raising.
        """

    def fetched(self, result: StageResult) -> None:
        """Take the result of the fetch, as soon as its rows are all there."""

    def await_permission(self, written: int, rejected: int) -> None:
        """Wait for the permission to publish, which is everything that is left to do. No permission: raise."""


def run_batch(contexts: Sequence[Context], stop: Stop, course: Course) -> BatchResult:
    """Take a batch through its stages, of which each has its context: the fetch, the hooks, the sink.

    Raises:
        WorkerError: a stage failed; nothing was published, unless the error came after the permission. The quarantine
            is kept of a hook that failed because it rejected too many rows.
    """
    fetch, *hooks, sink = contexts
    last = len(contexts) - 1
    with ExitStack() as stack:
        course.enter(0)
        rows: Rows = _fetch(fetch, stop, course, stack)
        links: list[ValidateLink] = []
        quarantines = []
        for index, context in enumerate(hooks, start=1):
            course.enter(index)
            quarantines.append(stack.enter_context(open_quarantine(context)))
            links.append(open_hook(context, _Step(rows, index - 1, course), quarantines[-1], stop))
            rows = links[-1]
        course.enter(last)
        link = ParquetLink(sink)
        pending = stack.enter_context(link.prepare(_Step(rows, last - 1, course), stop))
        rejected = sum(hook.rejected for hook in links)
        try:
            course.await_permission(pending.rows, rejected)
        except Cancelled:
            if not pending.published:
                raise
            # An earlier attempt has published it, and that is to be told.
            stop.ignore_signals()
        # In this order, so that no batch is ever seen without its quarantine.
        for quarantine in quarantines:
            quarantine.keep()
        result = pending.commit()
        return BatchResult(result.written, rejected, result.manifest)


def _fetch(context: Context, stop: Stop, course: Course, stack: ExitStack) -> RowCollector:
    directory: list[Path] = []

    def spill() -> Path:
        if not directory:
            room = tempfile.TemporaryDirectory(prefix="rows-", dir=_spill_root(context))
            directory.append(Path(stack.enter_context(room)))
        return directory[0]

    link = FetchLink(context, stop)
    output = RowCollector(spill, stop, link.limit, memory_bytes=MEMORY_BYTES)
    stack.callback(output.abort)
    result = link.read(output)
    output.finish()
    course.fetched(result)
    return output


def _spill_root(context: Context) -> Path | None:
    """Return the directory for rows that memory has no room for: the run's own in its workspace; None: the system's.

    The root file system of a worker is read-only, so only a run that mounts a volume there has the system's.
    """
    if context.workspace is None:
        return None
    uid, _ = parse_key(context.key)
    root = context.workspace / RUNS_DIRECTORY / uid
    root.mkdir(parents=True, exist_ok=True)
    return root


@dataclass(frozen=True)
class _Step:
    """The rows of a stage, taken by the next one: while a table is taken, it is the stage before that is at work."""

    source: Rows
    stage: int
    course: Course

    @property
    def schema(self) -> pa.Schema:
        return self.source.schema

    @property
    def rows(self) -> int | None:
        return self.source.rows

    def tables(self) -> Iterator[pa.Table]:
        tables = self.source.tables()
        while True:
            # Not put back after an error, so that it is told of the stage where it was raised.
            taker = self.course.enter(self.stage)
            table = next(tables, None)
            self.course.enter(taker)
            if table is None:
                return
            yield table
