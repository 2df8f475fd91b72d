"""The source `files`: CSV, JSON lines and Parquet by a glob, in the order of their names."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Final

import fsspec
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ingestrun.model.worker import FileFormat, FilesSource
from ingestrun.worker.context import Context
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.file_formats import Mark, reader_of
from ingestrun.worker.stage_io import Spool

PARTITION: Final = "{partition}"
_SUFFIXES: Final = {
    ".csv": FileFormat.CSV,
    ".jsonl": FileFormat.JSONL,
    ".ndjson": FileFormat.JSONL,
    ".parquet": FileFormat.PARQUET,
}
_COMPRESSED: Final = (".gz", ".bz2", ".xz")
_MAGIC: Final = "*?["
_BUFFER: Final = 2**20

Natural = Annotated[int, Field(ge=0)]


class FilePosition(BaseModel):
    """Where in which file to go on. `index`, `name` and `size` (bytes) tell whether the files are still the same.

    `offset` (bytes, uncompressed) is where the next record begins, so that no batch reads again what others did;
    `row` and `line` are counted for messages, and for Parquet, which is found by row.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    file: str
    index: Natural
    size: Natural
    offset: Natural = 0
    row: Natural = 0
    line: Natural = 0


@dataclass(frozen=True)
class _File:
    path: str
    name: str
    size: int


class FilesReader:
    """The files of a glob, from where the batch before ended."""

    def __init__(self, source: FilesSource, context: Context) -> None:
        """List the files.

        Raises:
            PermanentError: none matches, the partition or the cursor does not go with them, or the path's protocol
                is not in this image.
        """
        self._source = source
        path, share = source.path, None
        cursor = context.cursor
        if context.partitions is not None:
            if PARTITION in path:
                path = path.replace(PARTITION, context.cursor)
            else:
                share = _share(context.cursor, context.partitions)
            cursor = ""
        self._shown = path
        self._fs, pattern = _open_fs(path, context.workspace)
        self._files = self._list(pattern)
        if share is not None:
            self._files = self._files[share :: context.partitions]
        self._index, self._mark = self._start(cursor) if cursor else (0, Mark())

    def read(self, limit: int | None, spool: Spool) -> str | None:
        """See `fetch.BatchReader`.

        Raises:
            PermanentError: a file is empty, missing, broken, or not of its format; the text names it and the line.
        """
        index, mark, left = self._index, self._mark, limit
        while index < len(self._files) and (left is None or left > 0):
            file = self._files[index]
            before = spool.rows
            ended, mark = self._read_file(file, mark, left, spool)
            left = None if left is None else left - (spool.rows - before)
            if ended:
                index, mark = index + 1, Mark()
        if index == len(self._files):
            return None
        file = self._files[index]
        position = FilePosition(
            file=file.name, index=index, size=file.size, offset=mark.offset, row=mark.row, line=mark.line
        )
        return position.model_dump_json(exclude_defaults=True)

    def _read_file(self, file: _File, mark: Mark, left: int | None, spool: Spool) -> tuple[bool, Mark]:
        read = reader_of(_format(self._source, file.name))
        if file.size == 0:
            raise PermanentError(f"{file.name} is empty (0 bytes): remove it, or have it written again")
        try:
            with self._open(file) as handle:
                return read(handle, file.name, self._source, mark, left, spool.add)
        except FileNotFoundError:
            raise PermanentError(f"{file.name} was there when the files were listed, and is not any more") from None
        except PermissionError:
            raise PermanentError(f"{file.name} may not be read: check its mode and the pod's fsGroup") from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise PermanentError(f"{file.name} is not compressed as its name says, or cut off: {error}") from None

    def _open(self, file: _File) -> BinaryIO:
        raw = self._fs.open(file.path, "rb", compression="infer")
        return io.BufferedReader(raw, _BUFFER)

    def _list(self, pattern: str) -> list[_File]:
        try:
            found: dict[str, dict[str, Any]] = self._fs.glob(pattern, detail=True)
        except FileNotFoundError:
            found = {}
        paths = sorted(path for path, info in found.items() if info["type"] != "directory")
        if not paths:
            raise PermanentError(f"no file matches {self._shown!r}: check the path, and that the volume holds it")
        root = _root(pattern)
        return [_File(path, path.removeprefix(root), found[path].get("size") or 0) for path in paths]

    def _start(self, cursor: str) -> tuple[int, Mark]:
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
                f"{position.file} had {position.size} bytes and has now {self._files[index].size}: "
                "a file must not change while it is read"
            )
        return index, Mark(position.offset, position.row, position.line)


def _open_fs(path: str, workspace: Path) -> tuple[Any, str]:
    url = path if "://" in path or path.startswith("/") else str(workspace / path)
    try:
        fs, pattern = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        protocol = path.partition("://")[0]
        raise PermanentError(f"files by {protocol!r} can't be read with this image: {type(error).__name__}") from None
    return fs, str(pattern)


def _root(pattern: str) -> str:
    """The directories that all matches have in common, for names as short as they can be."""
    fixed = next((index for index, char in enumerate(pattern) if char in _MAGIC), len(pattern))
    return pattern[: pattern.rfind("/", 0, fixed) + 1]


def _share(value: str, partitions: int) -> int:
    if not value.isdecimal() or int(value) >= partitions:
        raise PermanentError(
            f"the partition {value[:80]!r} is no index below {partitions}, and the path has no {PARTITION}"
        )
    return int(value)


def _format(source: FilesSource, name: str) -> FileFormat:
    if source.format is not None:
        return source.format
    path = Path(name)
    if path.suffix in _COMPRESSED:
        path = path.with_suffix("")
    if path.suffix not in _SUFFIXES:
        raise PermanentError(f"{name}: its name says no format; set `format` to csv, jsonl or parquet")
    return _SUFFIXES[path.suffix]
