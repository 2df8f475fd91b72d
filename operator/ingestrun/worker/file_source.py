"""The source `files`: CSV, JSON lines and Parquet files that match a glob, in the order of their names."""

from __future__ import annotations

import gzip
import io
import lzma
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Final

import fsspec
from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ingestrun.model.text import pluralize
from ingestrun.model.worker import FileFormat, FilesSource
from ingestrun.worker.collector import RowCollector
from ingestrun.worker.context import PARTITION_PLACEHOLDER, Context
from ingestrun.worker.errors import PermanentError, SourceChangedError
from ingestrun.worker.file_formats import FileOffset, reader_for
from ingestrun.worker.file_list import ListedFile, fixed_list, listed_file

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


class FilesReader:
    """Reads the files of a glob from where the batch before ended."""

    source_digest: str | None = None

    def __init__(self, source: FilesSource, context: Context) -> None:
        """Find the files: by the list that is the same for the whole run, or those of this partition's own glob.

        Raises:
            PermanentError: no file matches, the partition or the cursor does not fit the files, or this image can't
                read the path's protocol.
            SourceChangedError: the files are not those that the run began with.
        """
        self._source = source
        own_glob = context.partitions is not None and PARTITION_PLACEHOLDER in source.path
        self._path = source.path.replace(PARTITION_PLACEHOLDER, context.cursor) if own_glob else source.path
        self._fs, self._pattern = _open_fs(self._path, context.workspace)
        self._root = _common_directory(self._pattern)
        if own_glob:
            self._files = self._find()
        else:
            self._files, self.source_digest = fixed_list(context, source.path, self._find)
        self._index, self._start = 0, FileOffset()
        if context.partitions is None and context.cursor:
            self._index, self._start = self._resume(context.cursor)
        elif context.partitions is not None and not own_glob:
            self._files = self._files[_partition_index(context.cursor, context.partitions) :: context.partitions]

    def read(self, limit: int | None, output: RowCollector) -> str | None:
        """Read a batch, as `fetch.BatchReader`.

        Raises:
            PermanentError: a file is empty, broken, or not of its format; the text names it and the line.
            SourceChangedError: a file is not as it was when it was listed.
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

    def state(self) -> None:
        """Return nothing, as `fetch.BatchReader`: the cursor says it all."""

    def _read_file(
        self, file: ListedFile, start: FileOffset, limit: int | None, output: RowCollector
    ) -> tuple[bool, FileOffset]:
        read = reader_for(_format(self._source, file.name))
        try:
            self._verify_unchanged(file)
            if file.size == 0:
                raise PermanentError(f"{file.name} is empty (0 bytes): remove it, or have it written again")
            try:
                with self._open(file) as handle:
                    end = read(handle, file.name, self._source, start, limit, output.add)
            except Exception:
                self._verify_unchanged(file)  # it may be broken because it has changed
                raise
            self._verify_unchanged(file)
            return end
        except FileNotFoundError:
            raise SourceChangedError(f"{file.name} was there when the run began, and is not any more") from None
        except PermissionError:
            raise PermanentError(f"{file.name} may not be read: check its mode and the pod's fsGroup") from None
        except (EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
            raise PermanentError(f"{file.name} is not compressed as its name says, or cut off: {error}") from None

    def _verify_unchanged(self, file: ListedFile) -> None:
        self._fs.invalidate_cache()
        now = listed_file(file.name, self._fs.info(self._root + file.name))
        if now != file:
            size = (
                f"it had {pluralize(file.size, 'byte')}, and has now {now.size}"
                if now.size != file.size
                else "with as many bytes"
            )
            raise SourceChangedError(
                f"{file.name} has changed since the run began ({size}): "
                "a file must not change while it is read, so start a new run"
            )

    def _open(self, file: ListedFile) -> BinaryIO:
        raw = self._fs.open(self._root + file.name, "rb", compression="infer")
        return io.BufferedReader(raw, _BUFFER_BYTES)

    def _find(self) -> list[ListedFile]:
        try:
            found: dict[str, dict[str, Any]] = self._fs.glob(self._pattern, detail=True)
        except FileNotFoundError:
            found = {}
        paths = sorted(path for path, info in found.items() if info["type"] != "directory")
        if not paths:
            raise PermanentError(f"no file matches {self._path!r}: check the path, and that the volume holds it")
        return [listed_file(path.removeprefix(self._root), found[path]) for path in paths]

    def _resume(self, cursor: str) -> tuple[int, FileOffset]:
        try:
            position = FilePosition.model_validate_json(cursor)
        except ValidationError:
            raise PermanentError(
                f"the cursor {cursor[:80]!r} is not one of this source: was the source changed under the run?"
            ) from None
        names = [file.name for file in self._files]
        if position.file not in names:
            raise SourceChangedError(f"{position.file}, where the batch before ended, is no longer among the files")
        index = names.index(position.file)
        if index != position.index:
            raise SourceChangedError(
                f"{position.file} was file {position.index} of the glob and is now file {index}: "
                "files came or went before it, so records would be missed"
            )
        if self._files[index].size != position.size:
            raise SourceChangedError(
                f"{position.file} had {pluralize(position.size, 'byte')} and has now {self._files[index].size}: "
                "a file must not change while it is read"
            )
        return index, FileOffset(position.offset, position.row, position.line)


def _open_fs(path: str, workspace: Path | None) -> tuple[Any, str]:
    if "://" in path or path.startswith("/"):
        url = path
    elif workspace is not None:
        url = str(workspace / path)
    else:
        raise PermanentError(f"{path!r} is in the workspace, and the run has none: use a URI, or give the run one")
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
