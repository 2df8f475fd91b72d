"""The resident memory of the worker, and when it has grown so much that another worker should go on."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Final

from ingestrun.model.text import pluralize

_PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")
_MIB: Final = 2**20
_GROWTH_BYTES: Final = 256 * _MIB
_LIMIT_SHARE: Final = 0.75
_FIRST_BATCHES: Final = 3
"""The batches after which memory has the size that a batch needs; from there on it should not grow."""
_UNLIMITED: Final = 2**60


class MemoryBound:
    """The bound of the resident memory.

    It is 256 MiB above what it was after the third batch, or 3/4 of the container's limit if that is less. It does not
    hold for the first batches, because a worker that ends after each would be worse than one that is large.
    """

    def __init__(self, limit: int | None) -> None:
        """Take the limit of the container's memory, in bytes; None: there is none."""
        self._limit = limit
        self._batches = 0
        self._base: int | None = None

    def add_batch(self, resident: int) -> None:
        """Take note of the memory after one more batch, in bytes."""
        self._batches += 1
        if self._batches == _FIRST_BATCHES:
            self._base = resident

    def growth(self, resident: int) -> str | None:
        """Return a sentence if so many bytes are beyond the bound."""
        if self._base is None:
            return None
        bound = self._base + _GROWTH_BYTES
        if self._limit is not None:
            bound = min(bound, max(self._base, int(_LIMIT_SHARE * self._limit)))
        if resident <= bound:
            return None
        batches = pluralize(self._batches, "batch", "batches")
        return f"memory has grown from {self._base // _MIB} to {resident // _MIB} MiB in {batches}"


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE_BYTES


def limit_bytes(root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the memory limit of this container's cgroup; None if it has none, or it can't be read."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            text = (root / name).read_text().strip()
        except OSError:
            continue
        return int(text) if text.isdecimal() and int(text) < _UNLIMITED else None
    return None


def release_memory() -> None:
    """Give back to the system what is not in use."""
    import pyarrow as pa

    gc.collect()
    pa.default_memory_pool().release_unused()
