"""The publish stage: write, audit, commit. A batch becomes one file in one atomic step, however often it is tried."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.text import pluralize
from ingestrun.model.worker import Sink
from ingestrun.worker.context import Context, parse_config, parse_key
from ingestrun.worker.errors import PermanentError, RetryableError
from ingestrun.worker.rows import Rows
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import InputReader, ParquetFileWriter, link_once

FOOTER_KEY: Final = "ingestrun.key"
FOOTER_ROWS: Final = "ingestrun.rows"
TEMPORARY_DIRECTORY: Final = "_tmp"
"""Readers of a dataset skip names that begin with an underscore."""
_MAX_MANIFEST_CHARS: Final = 256


class ParquetLink:
    """The last link of the pipeline: one file of the dataset, written and audited, then committed in one step.

    A batch without rows publishes no file, because some readers refuse a file without rows.
    """

    def __init__(self, context: Context) -> None:
        """Find the file's place.

        Raises:
            PermanentError: the sink or the key is not usable.
        """
        sink = parse_config(Sink, context.config, "the sink").parquet
        workspace = context.require(contract.ENV_WORKSPACE, context.workspace)
        self._key = context.key
        self._target = _dataset_directory(workspace, sink.path) / _file_name(context.key)
        self._manifest = self._target.relative_to(workspace).as_posix()
        if len(self._manifest) > _MAX_MANIFEST_CHARS:
            raise PermanentError(f"the sink's path is too long: {len(self._manifest)} characters with the file's name")

    @property
    def published(self) -> bool:
        """True if an attempt has published the batch."""
        return self._target.exists()

    @contextmanager
    def prepare(self, source: Rows, stop: Stop) -> Iterator[PendingFile]:
        """Write the rows and audit them, unless an attempt has published the batch; `PendingFile.commit` publishes.

        Raises:
            WorkerError: the rows or the workspace failed; nothing is published.
        """
        with ExitStack() as stack:
            temporary = None
            if source.rows != 0 and not self.published:
                temporary = stack.enter_context(_temporary_file(self._target))
                _write(source, temporary, self._key, stop)
                if source.rows:
                    _audit(temporary, source.rows, self._key)
                else:
                    temporary = None
            elif source.rows is None:
                for _ in source.tables():
                    stop.raise_if_stopped()
            rows = source.rows or 0
            stop.set_progress(rows, rows)
            yield PendingFile(self._target, temporary, rows, self._key, self._manifest)


@dataclass(frozen=True)
class PendingFile:
    """A batch that is ready to be published; `temporary` is None if there is nothing to do but to verify."""

    target: Path
    temporary: Path | None
    rows: int
    key: str
    manifest: str

    @property
    def published(self) -> bool:
        """True if an earlier attempt has published the batch."""
        return self.temporary is None and self.rows > 0

    def commit(self) -> StageResult:
        """Publish.

        Raises:
            PermanentError: other rows are published under this key.
            OSError: the workspace failed.
        """
        if self.temporary is not None:
            # Where an earlier attempt that still ran has published, the file is verified below.
            link_once(self.temporary, self.target)
        if self.rows or self.target.exists():
            _verify_published(self.target, self.rows, self.key)
        _remove_temporary_files(self.target)
        return StageResult(
            v=contract.VERSION,
            outcome=Outcome.DONE,
            read=self.rows,
            written=self.rows,
            manifest=self.manifest if self.rows else None,
        )


def publish(context: Context, stop: Stop) -> StageResult:
    """Publish the batch from the input directory, unless an earlier attempt has published it.

    Raises:
        PermanentError: the sink or the key is not usable, or other rows are published under this key.
        WorkerError: the input or the workspace failed; then nothing is published.
    """
    link = ParquetLink(context)
    if not link.published:  # else the batch is published, also if its run is cancelled by now
        stop.raise_if_stopped()
    source = InputReader(context.require(contract.ENV_INPUT, context.input))
    with link.prepare(source, stop) as pending:
        if pending.temporary is not None:
            stop.commit_point()
        return pending.commit()


def _dataset_directory(workspace: Path, path: str) -> Path:
    pure = PurePosixPath(path)
    names = pure.parts
    if pure.is_absolute() or "://" in path or ".." in names or not names or "\0" in path:
        raise PermanentError(f"the sink's path {path[:80]!r} must be relative, and stay inside the workspace")
    if any(name.startswith(("_", ".")) for name in names):
        raise PermanentError(f"the sink's path {path[:80]!r} has a name that readers of datasets pass over")
    directory = workspace.joinpath(*names)
    if not directory.resolve().is_relative_to(workspace.resolve()):
        raise PermanentError(f"the sink's path {path[:80]!r} leads out of the workspace")
    return directory


def _file_name(key: str) -> str:
    uid, batch = parse_key(key)
    return f"{uid}-{batch:06d}.parquet"


@contextmanager
def _temporary_file(target: Path) -> Iterator[Path]:
    """Yield a path to write to, on the file system of the target, after removing what earlier attempts left.

    An earlier attempt may still run on a node that was given up. It then fails because its file is gone, so two
    attempts can't disturb each other.
    """
    directory = target.parent / TEMPORARY_DIRECTORY / target.stem
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    # The name does not end in .parquet, so that a recursive glob does not find it.
    path = directory / uuid.uuid4().hex
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(source: Rows, path: Path, key: str, stop: Stop) -> None:
    with ParquetFileWriter(path, source.schema) as out:
        rows = 0
        for table in source.tables():
            stop.set_progress(rows, source.rows)
            stop.raise_if_stopped()
            out.write(table)
            rows += table.num_rows
        if rows != source.rows:
            raise AssertionError(f"{pluralize(source.rows or 0, 'row')} to come in, {rows} came")
        out.add_metadata({FOOTER_KEY: key, FOOTER_ROWS: str(rows)})


def _audit(path: Path, rows: int, key: str) -> None:
    """Read the file back before readers can see it.

    Raises:
        RetryableError: it can't be read, or has other rows than were written; nothing was published.
    """
    try:
        found = _read_footer(path)
        read = sum(batch.num_rows for batch in pq.ParquetFile(path).iter_batches())
    except (pa.ArrowException, OSError) as error:
        name = type(error).__name__
        raise RetryableError(f"the audit could not read the file back ({name}), nothing was published") from None
    if found != (key, rows) or read != rows:
        raise RetryableError(
            f"the audit found {pluralize(read, 'row')} where {rows} were written, nothing was published"
        )


def _verify_published(target: Path, rows: int, key: str) -> None:
    """Check that the published file is this batch.

    Raises:
        PermanentError: the file has another key or other rows.
    """
    found = _read_footer(target)
    if found != (key, rows):
        raise PermanentError(
            f"{target.name} stands published with {pluralize(found[1], 'row')} of key {found[0]!r}, this "
            f"attempt has {rows} of {key!r}: the source or a hook gave other rows than before; "
            "what is published was left as it is"
        )


def _read_footer(path: Path) -> tuple[str | None, int]:
    """Return the key and the number of rows in a file's footer; -1 rows if the footer contradicts the file."""
    metadata = pq.read_metadata(path)
    footer = metadata.metadata or {}
    key, rows = footer.get(FOOTER_KEY.encode()), footer.get(FOOTER_ROWS.encode(), b"")
    consistent = rows == str(metadata.num_rows).encode()
    return (key.decode() if key else None), metadata.num_rows if consistent else -1


def _remove_temporary_files(target: Path) -> None:
    # `_tmp` itself stays, because another batch may be about to write into it.
    shutil.rmtree(target.parent / TEMPORARY_DIRECTORY / target.stem, ignore_errors=True)
