"""The rows that one link of the pipeline takes from the one before, table by table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import pyarrow as pa


class Rows(Protocol):
    """The rows of a directory, of a whole batch that was collected, or those that a hook hands on."""

    @property
    def schema(self) -> pa.Schema:
        """The schema of all the tables."""

    @property
    def rows(self) -> int | None:
        """The number of all the rows. None: not known yet; when the last table was taken it is."""

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows once, bounded by number and bytes."""
