"""Sets of batch indexes as ranges ("0-41,43"), as an Indexed Job keeps its `completedIndexes`.

Ranges keep a run's status small, because batches end nearly in order: the published batches are one long range and a
few short ones, however many there are.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import Final

_TEXT: Final = re.compile(r"([0-9]+(-[0-9]+)?(,[0-9]+(-[0-9]+)?)*)?")


class IndexRanges:
    """An immutable set of indexes, kept as sorted, disjoint, inclusive ranges."""

    __slots__ = ("_ranges",)

    def __init__(self, indexes: Iterable[int] = ()) -> None:
        self._ranges = _merge((index, index) for index in indexes)

    @classmethod
    def span(cls, first: int, last: int) -> IndexRanges:
        """Make the set of all indexes from `first` to `last`, both included; it is empty if `last` is below `first`."""
        return cls._of(((first, last),) if last >= first else ())

    @classmethod
    def parse(cls, text: str) -> IndexRanges:
        """Parse a text such as "0-41,43".

        Raises:
            ValueError: the text has another form, or its ranges are not ascending.
        """
        if not _TEXT.fullmatch(text):
            raise ValueError(f"{text[:40]!r} is not a list of index ranges such as '0-41,43'")
        ranges = []
        for part in text.split(",") if text else ():
            first, _, last = part.partition("-")
            ranges.append((int(first), int(last or first)))
        ascending = all(low <= high for low, high in ranges) and all(
            before[1] < after[0] for before, after in pairwise(ranges)
        )
        if not ascending:
            raise ValueError(f"the index ranges {text[:40]!r} are not ascending")
        return cls._of(_merge(ranges))

    @classmethod
    def _of(cls, ranges: tuple[tuple[int, int], ...]) -> IndexRanges:
        made = cls.__new__(cls)
        made._ranges = ranges
        return made

    @property
    def first_gap(self) -> int:
        """The lowest index, from 0, that is not in the set."""
        return self._ranges[0][1] + 1 if self._ranges and self._ranges[0][0] == 0 else 0

    @property
    def end(self) -> int:
        """One more than the highest index; 0 if the set is empty."""
        return self._ranges[-1][1] + 1 if self._ranges else 0

    def __contains__(self, index: int) -> bool:
        at = bisect_right(self._ranges, (index, float("inf"))) - 1
        return at >= 0 and self._ranges[at][0] <= index <= self._ranges[at][1]

    def __iter__(self) -> Iterator[int]:
        for first, last in self._ranges:
            yield from range(first, last + 1)

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self._ranges)

    def __bool__(self) -> bool:
        return bool(self._ranges)

    def __or__(self, other: IndexRanges) -> IndexRanges:
        return self._of(_merge((*self._ranges, *other._ranges)))

    def __sub__(self, other: IndexRanges) -> IndexRanges:
        kept = []
        for first, last in self._ranges:
            for low, high in other._ranges[max(0, bisect_right(other._ranges, (first, -1)) - 1) :]:
                if high < first:
                    continue
                if low > last:
                    break
                if low > first:
                    kept.append((first, low - 1))
                first = high + 1
            if first <= last:
                kept.append((first, last))
        return self._of(tuple(kept))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexRanges) and self._ranges == other._ranges

    def __hash__(self) -> int:
        return hash(self._ranges)

    def __str__(self) -> str:
        return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in self._ranges)

    def __repr__(self) -> str:
        return f"IndexRanges.parse({str(self)!r})"


def _merge(ranges: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)
