"""The fetch stage: reads one batch of the source."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.text import pluralize
from ingestrun.model.worker import Source
from ingestrun.worker.collector import RowCollector
from ingestrun.worker.context import Context, parse_config
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.partition_list import read_partition
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import DATA_FILE, atomic_directory


class BatchReader(Protocol):
    """Reads a source from where the batch before ended."""

    source_digest: str | None
    """The digest of the list that all fetches of the run read from; None if there is none."""

    def read(self, limit: int | None, output: RowCollector) -> str | None:
        """Read at most `limit` records into the output.

        Returns:
            The cursor of the next batch, or None if the source itself has reported its end.
        """

    def state(self) -> str | None:
        """Return what the next batch's reader has to know beside the cursor."""


class FetchLink:
    """The first link of the pipeline: reads one batch, or one whole partition, into a collector."""

    def __init__(self, context: Context, stop: Stop) -> None:
        """Open the source; no record is read yet.

        Raises:
            WorkerError: the configuration, the cursor or the partition is not usable.
        """
        source = parse_config(Source, context.config, "the source")
        self.limit = None if context.partitions else context.limit
        stop.set_progress(0, self.limit)
        stop.raise_if_stopped()
        self._list_digest = None
        if context.partition_file is not None:
            partition, self._list_digest = read_partition(context, context.partition_file)
            context = replace(context, cursor=partition)
        self._reader = _open_reader(source, context, stop)

    def read(self, output: RowCollector) -> StageResult:
        """Read the batch.

        Raises:
            WorkerError: the source failed.
        """
        limit = self.limit
        cursor = self._reader.read(limit, output)
        if limit is not None and output.rows > limit:
            raise AssertionError(f"{pluralize(output.rows, 'record')} read, {limit} allowed")
        if cursor is not None and len(cursor) > contract.CURSOR_MAX_CHARS:
            raise PermanentError(
                f"the cursor to go on from has {len(cursor)} characters, at most {contract.CURSOR_MAX_CHARS} "
                "can be kept: use partitions, or another pagination"
            )
        return StageResult(
            v=contract.VERSION,
            outcome=Outcome.DONE,
            read=output.rows,
            written=output.rows,
            next_cursor=cursor,
            exhausted=cursor is None,
            source_digest=self._list_digest or self._reader.source_digest,
            state=self._reader.state() if cursor is not None else None,
        )


def fetch(context: Context, stop: Stop) -> StageResult:
    """Read one batch, or one whole partition, into the output directory.

    Raises:
        WorkerError: the source or the workspace failed; nothing was handed on.
    """
    directory = context.require(contract.ENV_OUTPUT, context.output)
    link = FetchLink(context, stop)
    with atomic_directory(directory) as temporary:
        output = RowCollector(lambda: temporary, stop, link.limit)
        try:
            result = link.read(output)
            output.finish()
            output.write_to(temporary / DATA_FILE)
            stop.commit_point()
        except BaseException:
            output.abort()
            raise
    return result


def _open_reader(source: Source, context: Context, stop: Stop) -> BatchReader:
    if source.http is not None:
        from ingestrun.worker.http_source import HttpReader

        return HttpReader(source.http, context, stop)
    if source.files is None:
        raise PermanentError("the source has neither files nor http")
    from ingestrun.worker.file_source import FilesReader

    return FilesReader(source.files, context)
