"""The publish stage: write, audit, publish. One batch becomes one file, by one atomic step, however often it runs."""

from __future__ import annotations

import errno
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.worker import Sink
from ingestrun.worker.context import Context, parse
from ingestrun.worker.errors import PermanentError, RetryableError
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import Input, ParquetFile, sync_directory

META_KEY: Final = "ingestrun.key"
META_ROWS: Final = "ingestrun.rows"
TEMPORARY: Final = "_tmp"
"""Readers of a dataset pass over names that begin with an underscore."""
_MANIFEST_CHARS: Final = 256
_KEY: Final = re.compile(r"(?P<uid>[A-Za-z0-9][A-Za-z0-9.-]{0,62})/(?P<batch>[0-9]{1,18})")
_NO_LINKS: Final = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def publish(context: Context, stop: Stop) -> StageResult:
    """Publish the batch, or find that an earlier attempt did.

    A batch without rows publishes no file: there would be nothing to read in it, and some readers refuse it.

    Raises:
        PermanentError: the sink or the key is not usable, or other rows stand published under this key.
        WorkerError: the input or the workspace failed; then nothing is published.
    """
    sink = parse(Sink, context.config, "the sink").parquet
    target = _directory(context.workspace, sink.path) / _file_name(context.key)
    manifest = target.relative_to(context.workspace).as_posix()
    if not target.exists():  # what an earlier attempt has published is published, cancelled or not
        stop.check()
    source = Input(context.need(contract.ENV_INPUT, context.input))
    if len(manifest) > _MANIFEST_CHARS:
        raise PermanentError(f"the sink's path is too long: {len(manifest)} characters with the file's name")
    if not target.exists() and source.rows:
        with _temporary(target) as temporary:
            _write(source, temporary, context.key, stop)
            _audit(temporary, source.rows, context.key)
            stop.progress(source.rows, source.rows)
            stop.last_call()
            _commit(temporary, target)
    if source.rows or target.exists():
        _confirm(target, source.rows, context.key)
    _clean(target)
    return StageResult(
        v=contract.VERSION,
        outcome=Outcome.DONE,
        read=source.rows,
        written=source.rows,
        manifest=manifest if source.rows else None,
    )


def _directory(workspace: Path, path: str) -> Path:
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
    match = _KEY.fullmatch(key)
    if match is None:
        raise PermanentError(f"{contract.ENV_IDEMPOTENCY_KEY} is {key[:80]!r}, not <run uid>/<batch>")
    return f"{match['uid']}-{int(match['batch']):06d}.parquet"


@contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A name to write to, on the file system of the target. What earlier attempts left of the batch is removed.

    Should one of them still run, on a node that was given up, it fails for want of its file: two can't collide.
    """
    directory = target.parent / TEMPORARY / target.stem
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    # Not *.parquet: a recursive glob must not find it.
    path = directory / uuid.uuid4().hex
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _write(source: Input, path: Path, key: str, stop: Stop) -> None:
    with ParquetFile(path, source.schema, {META_KEY: key, META_ROWS: str(source.rows)}) as out:
        rows = 0
        for table in source.tables():
            stop.progress(rows, source.rows)
            stop.check()
            out.write(table)
            rows += table.num_rows


def _audit(path: Path, rows: int, key: str) -> None:
    """Read back what was written, before anyone can see it.

    Raises:
        RetryableError: it is not what it should be; nothing was published.
    """
    try:
        found = _stamp(path)
        read = sum(batch.num_rows for batch in pq.ParquetFile(path).iter_batches())
    except (pa.ArrowException, OSError) as error:
        name = type(error).__name__
        raise RetryableError(f"the audit could not read the file back ({name}), nothing was published") from None
    if found != (key, rows) or read != rows:
        raise RetryableError(f"the audit found {read} rows where {rows} were written, nothing was published")


def _commit(temporary: Path, target: Path) -> None:
    """Make the file seen under its name: in one step, and never over another."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return  # an earlier attempt that still ran; the caller looks at what it published
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        # A file system without hard links: this step could replace, but only by the same rows of the same key.
        temporary.rename(target)
    sync_directory(target.parent)


def _confirm(target: Path, rows: int, key: str) -> None:
    """See that what stands published is this batch.

    Raises:
        PermanentError: it is another, or has other rows.
    """
    found = _stamp(target)
    if found != (key, rows):
        raise PermanentError(
            f"{target.name} stands published with {found[1]} rows of key {found[0]!r}, this attempt has {rows} "
            f"of {key!r}: the source or a hook gave other rows than before; what is published was left as it is"
        )


def _stamp(path: Path) -> tuple[str | None, int]:
    metadata = pq.read_metadata(path)
    stamps = metadata.metadata or {}
    key, rows = stamps.get(META_KEY.encode()), stamps.get(META_ROWS.encode(), b"")
    # The stamp and the rows must agree with each other too.
    agreed = metadata.num_rows if rows == str(metadata.num_rows).encode() else -1
    return (key.decode() if key else None), agreed


def _clean(target: Path) -> None:
    # `_tmp` itself stays: another batch may be about to write into it.
    shutil.rmtree(target.parent / TEMPORARY / target.stem, ignore_errors=True)
