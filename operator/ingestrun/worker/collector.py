"""Collecting the rows of a fetch until the schema that fits them all is known.

The types of a column can change with every page, so no row can be handed on before the last one is there. A stage in a
container of its own writes them to its output; a pool's worker holds them in memory up to a bound, and writes the rest
to a temporary directory.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import pyarrow as pa

from ingestrun.worker import stage_io
from ingestrun.worker.columns import InexactCastError, cast_to_schema, common_schema, with_text_column
from ingestrun.worker.errors import RetryableError
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import ParquetFileWriter, read_tables, slices

_BUFFER_BYTES: Final = 64 * 2**20
MEMORY_BYTES: Final = 64 * 2**20
"""Most bytes of a batch that a pool's worker holds in memory, beside the buffer that becomes the next chunk."""


@dataclass
class _Part:
    """Chunks in a row that have one schema: in memory, or in a Parquet file."""

    schema: pa.Schema
    tables: list[pa.Table] = field(default_factory=list)
    path: Path | None = None

    def read(self) -> Iterator[pa.Table]:
        if self.path is not None:
            yield from read_tables(self.path)
        for table in self.tables:
            yield from slices(table)


class RowCollector:
    """Takes tables whose common schema emerges on the way, and hands their rows on under it.

    Tables are joined to chunks of about a row group. A column whose type changes later is cast when all rows are there,
    and becomes text if the cast would change a value.
    """

    def __init__(
        self, directory: Callable[[], Path], stop: Stop, limit: int | None = None, *, memory_bytes: int = 0
    ) -> None:
        """Collect in memory up to `memory_bytes`, then in files of the directory, which is asked for when it is needed.

        `limit` is the most rows that there can be, if that is known.
        """
        self._directory = directory
        self._stop = stop
        self._limit = limit
        self._memory_left = memory_bytes
        self._in_memory = bool(memory_bytes)
        self.rows = 0
        self.schema = pa.schema([])
        self._buffer: list[pa.Table] = []
        self._buffer_rows = 0
        self._buffer_bytes = 0
        self._parts: list[_Part] = []
        self._file: ParquetFileWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Add rows.

        Raises:
            PermanentError: the types of a column have no common one.
        """
        self.rows += table.num_rows
        self._stop.set_progress(self.rows, self._limit)
        self._stop.raise_if_stopped()
        self._buffer.append(table)
        self._buffer_rows += table.num_rows
        self._buffer_bytes += table.nbytes
        if self._buffer_rows >= stage_io.ROW_GROUP_ROWS or self._buffer_bytes >= _BUFFER_BYTES:
            self._flush()

    def finish(self) -> None:
        """Fix the schema, because all rows are there. From here on `tables` yields them."""
        self._flush()
        self._close_file()
        if all(part.schema.equals(self.schema) for part in self._parts):
            return
        while True:
            try:
                for _ in self.tables():
                    self._stop.raise_if_stopped()
                return
            except InexactCastError as error:
                self.schema = with_text_column(self.schema, error.column)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows under the common schema, at most `ROW_GROUP_ROWS` at a time."""
        for part in self._parts:
            for table in part.read():
                yield cast_to_schema(table, self.schema)

    def write_to(self, target: Path) -> None:
        """Write the rows as one file on the file system of the directory; a single part's own file is renamed."""
        if len(self._parts) == 1 and self._parts[0].path is not None:
            self._parts[0].path.rename(target)
            return
        with ParquetFileWriter(target, self.schema) as merged:
            for table in self.tables():
                self._stop.raise_if_stopped()
                merged.write(table)
        for part in self._parts:
            if part.path is not None:
                part.path.unlink()

    def abort(self) -> None:
        """Close the open file after an error."""
        if self._file is not None:
            self._file.__exit__(Exception)

    def _flush(self) -> None:
        if not self._buffer:
            return
        schema = common_schema([self.schema, *(table.schema for table in self._buffer)])
        while True:
            try:
                table = pa.concat_tables([cast_to_schema(buffered, schema) for buffered in self._buffer])
                break
            except InexactCastError as error:
                schema = with_text_column(schema, error.column)
        if not self._parts or not schema.equals(self.schema):
            self._close_file()
            self.schema = schema
            self._parts.append(_Part(schema))
        if self._memory_left and table.nbytes <= self._memory_left:
            self._memory_left -= table.nbytes
            self._parts[-1].tables.append(table)
        else:
            self._write(table)
        self._buffer, self._buffer_rows, self._buffer_bytes = [], 0, 0

    def _write(self, table: pa.Table) -> None:
        try:
            if self._file is None:
                if self._parts[-1].tables:
                    self._parts.append(_Part(self.schema))
                path = self._directory() / f"_part-{len(self._parts):05d}"
                self._parts[-1].path = path
                self._file = ParquetFileWriter(path, self.schema)
                # What comes later goes after it, so nothing is kept in memory any more.
                self._memory_left = 0
            self._file.write(table)
        except OSError as error:
            if self._in_memory and error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
                raise RetryableError(
                    f"the batch does not fit into {MEMORY_BYTES // 2**20} MiB of memory, and the temporary directory "
                    f"can't take the rest ({errno.errorcode[error.errno]}): use smaller batches, or more room at /tmp"
                ) from None
            raise

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
