"""The source `files`: CSV, JSON lines and Parquet files that match a glob, in the order of their names."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import fsspec
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ingestrun.model.text import pluralize
from ingestrun.model.worker import FileFormat, FilesSource
from ingestrun.worker.context import PARTITION_PLACEHOLDER, Context
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.file_formats import FileOffset, reader_for
from ingestrun.worker.stage_io import OutputWriter

_FORMAT_BY_SUFFIX: Final = {
    ".csv": FileFormat.CSV,
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".parquet": FileFormat.PARQUET,
}
_COMPRESSION_SUFFIXES: Final = (".gz", ".bz2", ".xz")
_GLOB_CHARS: Final = "*?["
_BUFFER_BYTES: Final = 2**20


class FilePosition(BaseModel):
    """The place where the next batch goes on; as JSON it is the cursor that is handed on.

    `index`, `file` and `size` (bytes) show whether the files are still the same. The next record begins at `offset`
    (bytes, uncompressed), so that no batch reads records of another again. `row` and `line` are for messages; in
    Parquet files, which have no byte offset, the record is found by `row`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str
    index: NonNegativeInt
    size: NonNegativeInt
    offset: NonNegativeInt = 0
    row: NonNegativeInt = 0
    line: NonNegativeInt = 0


@dataclass(frozen=True)
class _File:
    path: str
    name: str
    size: int


class FilesReader:
    """Reads the files of a glob from where the batch before ended."""

    def __init__(self, source: FilesSource, context: Context) -> None:
        """List the files.

        Raises:
            PermanentError: no file matches, the partition or the cursor does not fit the files, or this image can't
                read the path's protocol.
        """
        self._source = source
        path, partition = source.path, None
        cursor = context.cursor
        if context.partitions is not None:
            if PARTITION_PLACEHOLDER in path:
                path = path.replace(PARTITION_PLACEHOLDER, context.cursor)
            else:
                partition = _partition_index(context.cursor, context.partitions)
            cursor = ""
        self._path = path
        self._fs, pattern = _open_fs(path, context.workspace)
        self._files = self._list(pattern)
        if partition is not None:
            self._files = self._files[partition :: context.partitions]
        self._index, self._start = self._resume(cursor) if cursor else (0, FileOffset())

    def read(self, limit: int | None, output: OutputWriter) -> str | None:
        """Read a batch, as `fetch.BatchReader`.

        Raises:
            PermanentError: a file is empty, missing, broken, or not of its format; the text names it and the line.
        """
        index, start, remaining = self._index, self._start, limit
        while index < len(self._files) and (remaining is None or remaining > 0):
            file = self._files[index]
            before = output.rows
            ended, start = self._read_file(file, start, remaining, output)
            remaining = None if remaining is None else remaining - (output.rows - before)
            if ended:
                index, start = index + 1, FileOffset()
        if index == len(self._files):
            return None
        file = self._files[index]
        position = FilePosition(
            file=file.name, index=index, size=file.size, offset=start.offset, row=start.row, line=start.line
        )
        return position.model_dump_json(exclude_defaults=True)

    def _read_file(
        self, file: _File, start: FileOffset, limit: int | None, output: OutputWriter
    ) -> tuple[bool, FileOffset]:
        read = reader_for(_format(self._source, file.name))
        if file.size == 0:
            raise PermanentError(f"{file.name} is empty (0 bytes): remove it, or have it written again")
        try:
            with self._open(file) as handle:
                return read(handle, file.name, self._source, start, limit, output.add)
        except FileNotFoundError:
            raise PermanentError(f"{file.name} was there when the files were listed, and is not any more") from None
        except PermissionError:
            raise PermanentError(f"{file.name} may not be read: check its mode and the pod's fsGroup") from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise PermanentError(f"{file.name} is not compressed as its name says, or cut off: {error}") from None

    def _open(self, file: _File) -> BinaryIO:
        raw = self._fs.open(file.path, "rb", compression="infer")
        return io.BufferedReader(raw, _BUFFER_BYTES)

    def _list(self, pattern: str) -> list[_File]:
        try:
            found: dict[str, dict[str, Any]] = self._fs.glob(pattern, detail=True)
        except FileNotFoundError:
            found = {}
        paths = sorted(path for path, info in found.items() if info["type"] != "directory")
        if not paths:
            raise PermanentError(f"no file matches {self._path!r}: check the path, and that the volume holds it")
        root = _common_directory(pattern)
        return [_File(path, path.removeprefix(root), found[path].get("size") or 0) for path in paths]

    def _resume(self, cursor: str) -> tuple[int, FileOffset]:
        try:
            position = FilePosition.model_validate_json(cursor)
        except ValidationError:
            raise PermanentError(
                f"the cursor {cursor[:80]!r} is not one of this source: was the source changed under the run?"
            ) from None
        names = [file.name for file in self._files]
        if position.file not in names:
            raise PermanentError(f"{position.file}, where the batch before ended, is no longer among the files")
        index = names.index(position.file)
        if index != position.index:
            raise PermanentError(
                f"{position.file} was file {position.index} of the glob and is now file {index}: "
                "files came or went before it, so records would be missed"
            )
        if self._files[index].size != position.size:
            raise PermanentError(
                f"{position.file} had {pluralize(position.size, 'byte')} and has now {self._files[index].size}: "
                "a file must not change while it is read"
            )
        return index, FileOffset(position.offset, position.row, position.line)


def _open_fs(path: str, workspace: Path) -> tuple[Any, str]:
    url = path if "://" in path or path.startswith("/") else str(workspace / path)
    try:
        fs, pattern = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = path.partition("://")[0]
        raise PermanentError(f"files by {protocol!r} can't be read with this image: {type(error).__name__}") from None
    return fs, str(pattern)


def _common_directory(pattern: str) -> str:
    """Return the leading directories that all matches share; messages and cursors leave them out of the names."""
    glob_start = next((index for index, char in enumerate(pattern) if char in _GLOB_CHARS), len(pattern))
    return pattern[: pattern.rfind("/", 0, glob_start) + 1]


def _partition_index(value: str, partitions: int) -> int:
    if not value.isdecimal() or int(value) >= partitions:
        raise PermanentError(
            f"the partition {value[:80]!r} is no index below {partitions}, and the path has no {PARTITION_PLACEHOLDER}"
        )
    return int(value)


def _format(source: FilesSource, name: str) -> FileFormat:
    if source.format is not None:
        return source.format
    path = Path(name)
    if path.suffix in _COMPRESSION_SUFFIXES:
        path = path.with_suffix("")
    if path.suffix not in _FORMAT_BY_SUFFIX:
        raise PermanentError(f"{name}: its name says no format; set `format` to csv, jsonl or parquet")
    return _FORMAT_BY_SUFFIX[path.suffix]
