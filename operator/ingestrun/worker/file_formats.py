"""Reading one file of records from an offset on: CSV, JSON lines and Parquet.

Each reader takes at most `limit` records, hands them on as tables, and returns whether the file is at its end and
where the next record begins. An offset is always the end of a record, as the format's parser sees it.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Final, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ingestrun.model.text import pluralize
from ingestrun.model.worker import FileFormat, FilesSource
from ingestrun.worker.columns import TEXT, parse_json, table_from_records
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.stage_io import ROW_GROUP_ROWS

_CHUNK_ROWS: Final = 10_000
_MAX_FIELD_CHARS: Final = 64 * 2**20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"

AddTable = Callable[[pa.Table], None]


@dataclass(frozen=True)
class FileOffset:
    """A place between two records: the number of bytes, records and lines before it."""

    offset: int = 0
    row: int = 0
    line: int = 0


class FormatReader(Protocol):
    """Reader of a format."""

    def __call__(
        self, handle: BinaryIO, name: str, source: FilesSource, start: FileOffset, limit: int | None, add: AddTable, /
    ) -> tuple[bool, FileOffset]:
        """Read on from the offset.

        Returns:
            Whether the file is at its end, and the offset after the last record that was taken.

        Raises:
            PermanentError: the file is not of its format; the text names the file and the line.
        """


def reader_for(kind: FileFormat) -> FormatReader:
    """Return the reader of a format."""
    readers: dict[FileFormat, FormatReader] = {
        FileFormat.CSV: read_csv,
        FileFormat.JSONL: read_json_lines,
        FileFormat.PARQUET: read_parquet,
    }
    return readers[kind]


class _LineReader:
    """Reads a file's lines as text, and counts the bytes and lines that were taken so far."""

    def __init__(self, handle: BinaryIO, name: str, start: FileOffset) -> None:
        self.offset = start.offset
        self.line = start.line
        self._readline = handle.readline
        self._name = name

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        raw = self._readline()
        if not raw:
            raise StopIteration
        if not self.offset and raw.startswith(_BYTE_ORDER_MARK):
            self.offset = len(_BYTE_ORDER_MARK)
            raw = raw[len(_BYTE_ORDER_MARK) :]
        self.offset += len(raw)
        self.line += 1
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise PermanentError(f"{self._name}, line {self.line}: not UTF-8 ({error.reason})") from None


def read_csv(
    handle: BinaryIO, name: str, source: FilesSource, start: FileOffset, limit: int | None, add: AddTable
) -> tuple[bool, FileOffset]:
    """Read CSV, as `FormatReader`. All columns are text: a value may look like a number in this batch only."""
    csv.field_size_limit(_MAX_FIELD_CHARS)
    head = _LineReader(handle, name, FileOffset())
    try:
        header = next(csv.reader(head, delimiter=source.delimiter, strict=True), None)
    except csv.Error as error:
        raise PermanentError(f"{name}, line {head.line}: {error}") from None
    if not header:
        raise PermanentError(f"{name} has no header line: a CSV file begins with its columns' names")
    duplicate = next((column for column in header if header.count(column) > 1), None)
    if duplicate is not None:
        raise PermanentError(f"{name}: two columns are named {duplicate!r}")
    if start.offset:
        handle.seek(start.offset)
        lines = _LineReader(handle, name, start)
    else:
        lines = head
    nulls = pa.array(source.null_values, TEXT)
    return _read_rows(
        _csv_rows(lines, name, source.delimiter, len(header)),
        lines,
        start,
        limit,
        lambda rows: add(_csv_table(header, rows, nulls)),
    )


def _csv_rows(lines: _LineReader, name: str, delimiter: str, width: int) -> Iterator[list[str]]:
    # csv.reader takes no more lines than a record needs, so `lines` is at the record's end when the record is yielded.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    last_line = lines.line
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise PermanentError(f"{name}, line {last_line + 1}: {error}") from None
        if row is None:
            return
        last_line, first_line = lines.line, last_line + 1
        if not row:
            continue
        if len(row) != width:
            raise PermanentError(
                f"{name}, line {first_line}: {pluralize(len(row), 'value')} "
                f"where the header has {pluralize(width, 'column')}"
            )
        yield row


def _csv_table(header: list[str], rows: list[list[str]], nulls: pa.Array) -> pa.Table:
    arrays = []
    for values in zip(*rows, strict=True):
        array = pa.array(values, TEXT)
        if len(nulls):
            array = pc.if_else(pc.is_in(array, value_set=nulls), pa.scalar(None, TEXT), array)
        arrays.append(array)
    return pa.Table.from_arrays(arrays, names=header)


def read_json_lines(
    handle: BinaryIO, name: str, source: FilesSource, start: FileOffset, limit: int | None, add: AddTable
) -> tuple[bool, FileOffset]:
    """Read JSON lines, as `FormatReader`: one JSON object a line; blank lines are skipped."""
    handle.seek(start.offset)
    lines = _LineReader(handle, name, start)
    return _read_rows(_json_rows(lines, name), lines, start, limit, lambda rows: add(table_from_records(rows)))


def _json_rows(lines: _LineReader, name: str) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except (ValueError, RecursionError):
            raise PermanentError(f"{name}, line {lines.line}: not JSON") from None
        if type(row) is not dict:
            raise PermanentError(f"{name}, line {lines.line}: no JSON object but a {type(row).__name__}")
        yield row


def _read_rows(
    rows: Iterator[Any], lines: _LineReader, start: FileOffset, limit: int | None, add: Callable[[list[Any]], None]
) -> tuple[bool, FileOffset]:
    taken = 0
    while limit is None or taken < limit:
        size = _CHUNK_ROWS if limit is None else min(_CHUNK_ROWS, limit - taken)
        chunk = list(islice(rows, size))
        if chunk:
            add(chunk)
        taken += len(chunk)
        after = FileOffset(lines.offset, start.row + taken, lines.line)
        if len(chunk) < size:
            return True, after
    # `after` is taken before this reads one more record to see whether there is one.
    return next(rows, None) is None, after


def read_parquet(
    handle: BinaryIO, name: str, source: FilesSource, start: FileOffset, limit: int | None, add: AddTable
) -> tuple[bool, FileOffset]:
    """Read Parquet, as `FormatReader`. Row groups before the offset are skipped by the footer, without reading them."""
    try:
        file = pq.ParquetFile(handle)
        total = file.metadata.num_rows
        end = total if limit is None else min(total, start.row + limit)
        groups: list[int] = []
        skip = group_start = 0
        for index in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(index).num_rows
            if group_start + rows > start.row and group_start < end:
                skip = skip if groups else start.row - group_start
                groups.append(index)
            group_start += rows
        remaining = end - start.row
        for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS, row_groups=groups):
            piece = batch.slice(skip, remaining)
            skip = max(0, skip - batch.num_rows)
            remaining -= piece.num_rows
            if piece.num_rows:
                add(pa.Table.from_batches([piece]).replace_schema_metadata(None))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk or the volume, not of the file's content
        raise PermanentError(f"{name} is no Parquet file, or not a whole one ({type(error).__name__})") from None
    if remaining:
        raise PermanentError(
            f"{name}: its footer speaks of {pluralize(total, 'row')}, {remaining} of them are not there"
        )
    return end == total, FileOffset(row=end)
