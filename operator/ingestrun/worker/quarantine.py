"""The rows that a hook rejects: a directory beside the data, which appears when the hook's result stands."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

import pyarrow as pa

from ingestrun.worker.stage_io import DATA_FILE, ParquetFileWriter, atomic_directory


class Quarantine:
    """The quarantine of one attempt at a hook. Unless it is kept, nothing of it is seen."""

    def __init__(self, directory: Path) -> None:
        """Note the directory; it is made with the first row."""
        self.directory = directory
        self._stack = ExitStack()
        self._file: ParquetFileWriter | None = None

    def add(self, table: pa.Table) -> None:
        """Add rejected rows, which all have one schema."""
        if self._file is None:
            path = self._stack.enter_context(atomic_directory(self.directory)) / DATA_FILE
            self._file = self._stack.enter_context(ParquetFileWriter(path, table.schema))
        self._file.write(table)

    def keep(self) -> None:
        """Give the directory its name."""
        if self._file is None:
            # An earlier pod of this attempt may have left some, if it found another input.
            shutil.rmtree(self.directory, ignore_errors=True)
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Remove what was not kept."""
        reason = error if error is not None else _NotKeptError()
        self._stack.__exit__(type(reason), reason, reason.__traceback__)


class _NotKeptError(Exception):
    """The reason for which a quarantine is removed when nothing failed."""
