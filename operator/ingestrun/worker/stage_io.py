"""How stages hand rows on: a directory of Parquet files, there as a whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Final, Self

import pyarrow as pa
import pyarrow.parquet as pq

from ingestrun.worker.columns import NotExactError, as_text, common_schema, conform
from ingestrun.worker.errors import PermanentError, RetryableError
from ingestrun.worker.shutdown import Stop

DATA_FILE: Final = "data.parquet"
BATCH_ROWS: Final = 65_536
"""Rows held in memory at a time, at most; a row group as well."""
_BUFFER_BYTES: Final = 64 * 2**20


def sync_directory(path: Path) -> None:
    """Make the names in a directory outlive a crash of the node."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A directory to fill; it takes its name only if the block ends without an exception, else it goes.

    A directory of that name is replaced: only an earlier pod of the same attempt can have made it. What such
    a pod left unfinished beside it is removed.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f".{final.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
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


class ParquetFile:
    """A Parquet file being written, of a schema known from the start; synced to disk by `close`."""

    def __init__(self, path: Path, schema: pa.Schema, metadata: Mapping[str, str] | None = None) -> None:
        self.schema = schema
        # A file of Python's own: Arrow's can't be synced.
        self._file: BinaryIO = path.open("wb")
        self._writer = pq.ParquetWriter(self._file, schema, compression="zstd")
        if metadata:
            self._writer.add_key_value_metadata(dict(metadata))

    def write(self, table: pa.Table) -> None:
        """Append one row group."""
        if table.num_rows:
            self._writer.write_table(table, row_group_size=max(table.num_rows, 1))

    def close(self) -> None:
        """Write the footer, and wait until the disk has it all."""
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
        # Whatever the writer says now, the first error is the one that tells what happened.
        for part in (self._writer, self._file):
            try:
                part.close()
            except (OSError, ValueError, pa.ArrowException):
                continue


class Spool:
    """Takes tables whose schema is found out on the way, and leaves one `data.parquet` in the end.

    Small tables are gathered to row groups. Where a later table does not fit the schema so far, a new part is
    begun, and at the end the parts are written again under the schema that holds for all.
    """

    def __init__(self, directory: Path, stop: Stop, limit: int | None = None) -> None:
        self.rows = 0
        self._limit = limit
        self._directory = directory
        self._stop = stop
        self._schema = pa.schema([])
        self._held: list[pa.Table] = []
        self._held_rows = 0
        self._held_bytes = 0
        self._open: ParquetFile | None = None
        self._parts: list[Path] = []

    def add(self, table: pa.Table) -> None:
        """Take rows.

        Raises:
            PermanentError: a column's types can't go together.
        """
        self.rows += table.num_rows
        self._stop.progress(self.rows, self._limit)
        self._stop.check()
        self._held.append(table)
        self._held_rows += table.num_rows
        self._held_bytes += table.nbytes
        if self._held_rows >= BATCH_ROWS or self._held_bytes >= _BUFFER_BYTES:
            self._flush()

    def finish(self) -> Path:
        """Write what is held; `data.parquet` is complete after this, with no rows as well."""
        self._flush()
        if self._open is None:
            self._begin()
        self._end()
        target = self._directory / DATA_FILE
        if len(self._parts) == 1:
            self._parts[0].rename(target)
            return target
        self._rewrite(target)
        for part in self._parts:
            part.unlink()
        return target

    def abandon(self) -> None:
        """Close what is open after an error."""
        if self._open is not None:
            self._open.__exit__(Exception)

    def _flush(self) -> None:
        if not self._held:
            return
        schema = common_schema([self._schema, *(table.schema for table in self._held)])
        while True:
            try:
                table = pa.concat_tables([conform(held, schema) for held in self._held])
                break
            except NotExactError as error:
                schema = as_text(schema, error.name)
        if self._open is None or not schema.equals(self._schema):
            self._end()
            self._schema = schema
            self._begin()
        assert self._open is not None  # noqa: S101 - for mypy
        self._open.write(table)
        self._held, self._held_rows, self._held_bytes = [], 0, 0

    def _begin(self) -> None:
        path = self._directory / f"_part-{len(self._parts):05d}"
        self._open = ParquetFile(path, self._schema)
        self._parts.append(path)

    def _end(self) -> None:
        if self._open is not None:
            self._open.close()
            self._open = None

    def _rewrite(self, target: Path) -> None:
        schema = self._schema
        while True:
            try:
                with ParquetFile(target, schema) as out:
                    for part in self._parts:
                        for table in _tables(part):
                            self._stop.check()
                            out.write(conform(table, schema))
                return
            except NotExactError as error:
                schema = as_text(schema, error.name)


@contextmanager
def new_output(final: Path, stop: Stop, limit: int | None = None) -> Iterator[Spool]:
    """A spool for a stage's output directory, which appears when the block ends without an exception.

    `limit`: how many rows there will be at most, where that is known.
    """
    with new_directory(final) as directory:
        spool = Spool(directory, stop, limit)
        try:
            yield spool
            spool.finish()
            stop.last_call()
        except BaseException:
            spool.abandon()
            raise


class Input:
    """What the stage before handed on: all the Parquet files of a directory, in the order of their names."""

    def __init__(self, directory: Path) -> None:
        """Open it.

        Raises:
            RetryableError: the directory is not there.
            PermanentError: it holds no Parquet, a broken file, or something that is no Parquet file.
        """
        if not directory.is_dir():
            # Never "no rows": a network file system may show it a moment later, a lost volume never does.
            raise RetryableError(f"the stage before left nothing: there is no directory {directory}")
        names = sorted(path for path in directory.iterdir() if not path.name.startswith((".", "_")))
        alien = [path.name for path in names if path.suffix != ".parquet"]
        if alien or not names:
            found = f"holds {alien[0]!r}" if alien else "is empty"
            raise PermanentError(f"{directory} {found}: stages hand on files named *.parquet, and at least one")
        self.directory = directory
        self._files = names
        self.rows = 0
        schemas = []
        for path in names:
            try:
                metadata = pq.read_metadata(path)
            except (pa.ArrowException, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise PermanentError(f"{path} is no Parquet file, or not a whole one") from None
            schemas.append(metadata.schema.to_arrow_schema().remove_metadata())
            self.rows += metadata.num_rows
        self.schema = common_schema(schemas)

    def tables(self) -> Iterator[pa.Table]:
        """The rows under the common schema, at most `BATCH_ROWS` at a time.

        Raises:
            PermanentError: a value does not fit the schema, or a file is broken.
        """
        for path in self._files:
            try:
                for table in _tables(path):
                    yield conform(table, self.schema)
            except NotExactError as error:
                raise PermanentError(
                    f"column {error.name!r} in {path} does not fit {self.schema.field(error.name).type}, "
                    "its type with the other files of the directory"
                ) from None


def _tables(path: Path) -> Iterator[pa.Table]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=BATCH_ROWS):
            yield pa.Table.from_batches([batch]).replace_schema_metadata(None)
