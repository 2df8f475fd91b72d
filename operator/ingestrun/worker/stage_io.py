"""Hand-over of rows between containers: a directory of Parquet files, which appears as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ingestrun.worker.columns import InexactCastError, cast_to_schema, common_schema
from ingestrun.worker.errors import PermanentError, RetryableError

DATA_FILE: Final = "data.parquet"
ROW_GROUP_ROWS: Final = 65_536
"""Most rows that are held in memory at a time; also the size of a row group."""
_NO_HARD_LINKS: Final = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def sync_directory(path: Path) -> None:
    """Sync a directory to disk, so that the names in it survive a crash of the node."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_once(temporary: Path, target: Path) -> None:
    """Give a file its name in one step that never replaces another file; where there is one, that one stays."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS:
            raise
        # The file system has no hard links. A rename could replace the file of another attempt in the same moment;
        # those who name a file here compare afterwards what it holds.
        temporary.rename(target)
    sync_directory(target.parent)


@contextmanager
def atomic_directory(final: Path) -> Iterator[Path]:
    """Yield a directory to fill; it gets its final name when the block ends, and is removed if the block raises.

    A directory that has the final name already is replaced, because only an earlier pod of the same attempt can have
    made it. What such a pod left unfinished beside it is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for unfinished in final.parent.glob(f".{final.name}.tmp-*"):
        shutil.rmtree(unfinished, ignore_errors=True)
    temporary = final.with_name(f".{final.name}.tmp-{uuid.uuid4().hex[:12]}")
    temporary.mkdir()
    try:
        yield temporary
        sync_directory(temporary)
        if final.exists():
            final.rename(temporary.with_name(temporary.name + "-old"))
        temporary.rename(final)
        sync_directory(final.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(temporary.with_name(temporary.name + "-old"), ignore_errors=True)


class ParquetFileWriter:
    """Writes a Parquet file whose schema is known from the start; `close` syncs it to disk."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self.schema = schema
        # A file of Python's own, because Arrow's can't be synced.
        self._file: BinaryIO = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")

    def add_metadata(self, metadata: Mapping[str, str]) -> None:
        """Add to what the footer says."""
        self._writer.add_key_value_metadata(dict(metadata))

    def write(self, table: pa.Table) -> None:
        """Append one row group."""
        if table.num_rows:
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def close(self) -> None:
        """Write the footer, and wait until everything is on disk."""
        self._writer.close()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
            return
        # Errors of closing are dropped, because the first error is the one that explains what happened.
        for part in (self._writer, self._file):
            try:
                part.close()
            except (OSError, ValueError, pa.ArrowException):
                continue


class InputReader:
    """Reads what the stage before handed on: all Parquet files of a directory, in the order of their names."""

    def __init__(self, directory: Path) -> None:
        """Read the files' schemas and counts.

        Raises:
            RetryableError: the directory does not exist.
            PermanentError: it has no Parquet file, or one that is broken, or a file that is not Parquet.
        """
        if not directory.is_dir():
            # Never "no rows": a network file system may show it a moment later, a lost volume never does.
            raise RetryableError(f"the stage before left nothing: there is no directory {directory}")
        paths = sorted(path for path in directory.iterdir() if not path.name.startswith((".", "_")))
        foreign = [path.name for path in paths if path.suffix != ".parquet"]
        if foreign or not paths:
            found = f"holds {foreign[0]!r}" if foreign else "is empty"
            raise PermanentError(f"{directory} {found}: stages hand on files named *.parquet, and at least one")
        self.directory = directory
        self._paths = paths
        self.rows = 0
        schemas = []
        for path in paths:
            metadata = _read_metadata(path)
            schemas.append(metadata.schema.to_arrow_schema().remove_metadata())
            self.rows += metadata.num_rows
        self.schema = common_schema(schemas)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows under the common schema, at most `ROW_GROUP_ROWS` at a time.

        Raises:
            PermanentError: a value does not fit the schema, or a file is broken.
        """
        for path in self._paths:
            try:
                for table in read_tables(path):
                    yield cast_to_schema(table, self.schema)
            except InexactCastError as error:
                raise PermanentError(
                    f"column {error.column!r} in {path} does not fit {self.schema.field(error.column).type}, "
                    "its type with the other files of the directory"
                ) from None


def _read_metadata(path: Path) -> pq.FileMetaData:
    try:
        return pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise PermanentError(f"{path} is no Parquet file, or not a whole one") from None


def read_tables(path: Path) -> Iterator[pa.Table]:
    """Yield the rows of a Parquet file, at most `ROW_GROUP_ROWS` at a time."""
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS):
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)


def slices(table: pa.Table) -> Iterator[pa.Table]:
    """Yield the rows of a table, at most `ROW_GROUP_ROWS` at a time, without a copy."""
    for start in range(0, table.num_rows, ROW_GROUP_ROWS):
        yield table.slice(start, ROW_GROUP_ROWS)
