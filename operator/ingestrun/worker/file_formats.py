"""Reading one file of records from a mark on: CSV, JSON lines and Parquet.

Each reader takes at most `budget` records, gives them on as tables, and says whether the file is at its end and
where the next record begins. A mark is always at the end of a record, as the format's parser sees it.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, BinaryIO, Final, NoReturn, Protocol

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ingestrun.model.worker import FileFormat, FilesSource
from ingestrun.worker.columns import TEXT, table_of
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.stage_io import BATCH_ROWS

_CHUNK_ROWS: Final = 10_000
_FIELD_CHARS: Final = 64 * 2**20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"

Keep = Callable[[pa.Table], None]


@dataclass(frozen=True)
class Mark:
    """A place between two records: bytes, records and lines before it."""

    offset: int = 0
    row: int = 0
    line: int = 0


class FormatReader(Protocol):
    """How a format is read."""

    def __call__(
        self, handle: BinaryIO, name: str, source: FilesSource, mark: Mark, budget: int | None, keep: Keep, /
    ) -> tuple[bool, Mark]:
        """Read on from the mark.

        Returns:
            Whether the file is at its end, and the mark after the last record that was kept.

        Raises:
            PermanentError: the file is not of its format; the text names it and the line.
        """


def reader_of(kind: FileFormat) -> FormatReader:
    """The reader of a format."""
    readers: dict[FileFormat, FormatReader] = {
        FileFormat.CSV: read_csv,
        FileFormat.JSONL: read_json_lines,
        FileFormat.PARQUET: read_parquet,
    }
    return readers[kind]


class _Lines:
    """A file's lines as text, with the bytes and lines that were taken so far."""

    def __init__(self, handle: BinaryIO, name: str, mark: Mark) -> None:
        self.offset = mark.offset
        self.line = mark.line
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
    handle: BinaryIO, name: str, source: FilesSource, mark: Mark, budget: int | None, keep: Keep
) -> tuple[bool, Mark]:
    """See `FormatReader`. All columns are text: what looks like a number in one batch may not in the next."""
    csv.field_size_limit(_FIELD_CHARS)
    head = _Lines(handle, name, Mark())
    try:
        header = next(csv.reader(head, delimiter=source.delimiter, strict=True), None)
    except csv.Error as error:
        raise PermanentError(f"{name}, line {head.line}: {error}") from None
    if not header:
        raise PermanentError(f"{name} has no header line: a CSV file begins with its columns' names")
    twice = next((column for column in header if header.count(column) > 1), None)
    if twice is not None:
        raise PermanentError(f"{name}: two columns are named {twice!r}")
    if mark.offset:
        handle.seek(mark.offset)
        lines = _Lines(handle, name, mark)
    else:
        lines = head
    nulls = pa.array(source.null_values, TEXT)
    return _read_rows(
        _csv_rows(lines, name, source.delimiter, len(header)),
        lines,
        mark,
        budget,
        lambda rows: keep(_csv_table(header, rows, nulls)),
    )


def _csv_rows(lines: _Lines, name: str, delimiter: str, width: int) -> Iterator[list[str]]:
    # The reader takes no more lines than the record needs: `lines` stands at the record's end when it is given on.
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    first = lines.line
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise PermanentError(f"{name}, line {first + 1}: {error}") from None
        if row is None:
            return
        first, start = lines.line, first + 1
        if not row:
            continue
        if len(row) != width:
            raise PermanentError(f"{name}, line {start}: {len(row)} values where the header has {width} columns")
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
    handle: BinaryIO, name: str, source: FilesSource, mark: Mark, budget: int | None, keep: Keep
) -> tuple[bool, Mark]:
    """See `FormatReader`. One JSON object a line; blank lines are passed over."""
    handle.seek(mark.offset)
    lines = _Lines(handle, name, mark)
    return _read_rows(_json_rows(lines, name), lines, mark, budget, lambda rows: keep(table_of(rows)))


def _json_rows(lines: _Lines, name: str) -> Iterator[dict[str, Any]]:
    for line in lines:
        if not line.strip():
            continue
        try:
            row = json.loads(line, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise PermanentError(f"{name}, line {lines.line}: not JSON") from None
        if type(row) is not dict:
            raise PermanentError(f"{name}, line {lines.line}: no JSON object but a {type(row).__name__}")
        yield row


def _read_rows(
    rows: Iterator[Any], lines: _Lines, mark: Mark, budget: int | None, keep: Callable[[list[Any]], None]
) -> tuple[bool, Mark]:
    taken = 0
    while budget is None or taken < budget:
        size = _CHUNK_ROWS if budget is None else min(_CHUNK_ROWS, budget - taken)
        chunk = list(islice(rows, size))
        if chunk:
            keep(chunk)
        taken += len(chunk)
        after = Mark(lines.offset, mark.row + taken, lines.line)
        if len(chunk) < size:
            return True, after
    # The mark is before the record that this looks at.
    return next(rows, None) is None, after


def read_parquet(
    handle: BinaryIO, name: str, source: FilesSource, mark: Mark, budget: int | None, keep: Keep
) -> tuple[bool, Mark]:
    """See `FormatReader`. Row groups before the mark are passed over by the footer alone."""
    try:
        file = pq.ParquetFile(handle)
        total = file.metadata.num_rows
        end = total if budget is None else min(total, mark.row + budget)
        groups: list[int] = []
        skip = start = 0
        for index in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(index).num_rows
            if start + rows > mark.row and start < end:
                skip = skip if groups else mark.row - start
                groups.append(index)
            start += rows
        left = end - mark.row
        for batch in file.iter_batches(batch_size=BATCH_ROWS, row_groups=groups):
            piece = batch.slice(skip, left)
            skip = max(0, skip - batch.num_rows)
            left -= piece.num_rows
            if piece.num_rows:
                keep(pa.Table.from_batches([piece]).replace_schema_metadata(None))
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk or the volume, not the file's contents
        raise PermanentError(f"{name} is no Parquet file, or not a whole one ({type(error).__name__})") from None
    if left:
        raise PermanentError(f"{name}: its footer speaks of {total} rows, {left} of them are not there")
    return end == total, Mark(row=end)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON")
