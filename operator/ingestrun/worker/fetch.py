"""The fetch stage: one batch of the source into the output directory."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.worker import Source
from ingestrun.worker.context import Context, parse
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.partition_list import partition_of
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import Spool, new_output


class BatchReader(Protocol):
    """A source, ready to be read from where the batch before ended."""

    def read(self, limit: int | None, spool: Spool) -> str | None:
        """Put at most `limit` records into the spool.

        Returns:
            The cursor to go on from, or None where the source itself said that there is no more.
        """


def fetch(context: Context, stop: Stop) -> StageResult:
    """Read one batch, or one partition to its end.

    Raises:
        WorkerError: the source or the workspace failed; nothing was handed on.
    """
    source = parse(Source, context.config, "the source")
    output = context.need(contract.ENV_OUTPUT, context.output)
    limit = None if context.partitions else context.limit
    stop.progress(0, limit)
    stop.check()
    if context.partition_file is not None:
        context = replace(context, cursor=partition_of(context, context.partition_file))
    reader = _open(source, context, stop)
    with new_output(output, stop, limit) as spool:
        cursor = reader.read(limit, spool)
        if limit is not None and spool.rows > limit:
            raise AssertionError(f"{spool.rows} records read, {limit} allowed")
        if cursor is not None and len(cursor) > contract.CURSOR_MAX_CHARS:
            raise PermanentError(
                f"the cursor to go on from has {len(cursor)} characters, at most {contract.CURSOR_MAX_CHARS} "
                "can be kept: use partitions, or another pagination"
            )
    return StageResult(
        v=contract.VERSION,
        outcome=Outcome.DONE,
        read=spool.rows,
        written=spool.rows,
        next_cursor=cursor,
        exhausted=cursor is None,
    )


def _open(source: Source, context: Context, stop: Stop) -> BatchReader:
    if source.http is not None:
        from ingestrun.worker.http_source import HttpReader

        return HttpReader(source.http, context, stop)
    if source.files is None:
        raise PermanentError("the source has neither files nor http")
    from ingestrun.worker.file_source import FilesReader

    return FilesReader(source.files, context)
