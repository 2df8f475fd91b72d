"""The history of a paged source, in constant memory: it recognizes a source that repeats itself and never ends.

Such a source sends its last page for every number beyond it, sends its first pages again after the last, or hands out
cursors that lead back. Three things show it:

- a page has the same records as the page before it;
- a stretch of pages, of any length, has the same records as the stretch before it;
- a cursor or a link that the source has sent leads to a page that was read before.

A single page that equals an older one shows nothing, because two days without data may look the same.

Only one older page is remembered at a time: the latest whose number is a power of two (Brent's way to find a cycle).
So a circle of n pages is found before they have come about eight times, whatever n is.
"""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import astuple, dataclass
from typing import Final

import pyarrow as pa

from ingestrun.model.text import pluralize
from ingestrun.worker.errors import NoProgressError

MAX_EMPTY_PAGES: Final = 10_000
"""Most pages without a record in a row that one fetch reads, though each leads to a next one."""
_DIGEST_BYTES: Final = 9
_NUMBER: Final = r"(\d{1,10})"
_DIGEST: Final = r"([\w-]{0,12})"
_STATE: Final = re.compile(
    r"\.".join([_NUMBER, _DIGEST, _NUMBER, _DIGEST, _DIGEST, _DIGEST, _NUMBER, _DIGEST, _DIGEST]), re.ASCII
)


def table_digest(table: pa.Table) -> str:
    """Return a digest of the rows: equal for pages whose records become the same rows."""
    digest = hashlib.blake2b(f"{table.num_rows} {table.schema}".encode(), digest_size=_DIGEST_BYTES)
    for column in table.columns:
        for chunk in column.chunks:
            for buffer in chunk.buffers():
                digest.update(buffer if buffer is not None else b"-")
    return _text(digest.digest())


@dataclass
class _Memory:
    """The knowledge of the pages so far. A stretch of pages is a digest of their digests."""

    pages: int = 0
    place_mark: str = ""
    """Place of the marked page: the latest whose number, from 0, is a power of two."""
    filled: int = 0
    """Number of pages with records; of these alone the rest is about."""
    last: str = ""
    mark: str = ""
    since_mark: str = ""
    """The stretch from the marked page on."""
    period: int = 0
    """Length of the stretch that is being compared with the pages after it; 0: none is."""
    once: str = ""
    """The stretch from the marked page up to the page that equals it."""
    again: str = ""
    """The stretch from that page on."""


class PageHistory:
    """The pages that a chain has read so far. Its state is carried from batch to batch."""

    def __init__(self, state: str = "", *, repeats_allowed: bool = False) -> None:
        """Go on from a state; anything that is none is a new beginning, which costs time to find a circle, no more."""
        self._repeats_allowed = repeats_allowed
        self._memory = _Memory()
        self._empty = 0
        match = _STATE.fullmatch(state)
        if match is not None:
            pages, place, filled, last, mark, since, period, once, again = match.groups()
            self._memory = _Memory(int(pages), place, int(filled), last, mark, since, int(period), once, again)

    def state(self) -> str:
        """Return the state, about 100 characters."""
        return ".".join(str(value) for value in astuple(self._memory))

    def add(self, label: str, place: str | None, rows: int, digest: str) -> None:
        """Take in the next page, which messages call `label`. `place` is what the source calls it, if it does.

        Raises:
            NoProgressError: the source repeats itself.
        """
        memory = self._memory
        if place is not None:
            self._compare_place(label, _digest_of(place))
        memory.pages += 1
        if not rows:
            self._empty += 1
            if self._empty >= MAX_EMPTY_PAGES:
                raise NoProgressError(
                    f"{label}: {pluralize(self._empty, 'page')} in a row had no record, and each leads to another"
                )
            return
        self._empty = 0
        if self._repeats_allowed:
            return
        if digest == memory.last:
            records = "record" if rows == 1 else pluralize(rows, "record")
            raise NoProgressError(
                f"{label} has the same {records} as the page before it, word for word: the source repeats itself and "
                "would never end. If such pages are right, set allowRepeatedPages"
            )
        self._compare_stretch(label, digest)
        memory.last = digest
        memory.filled += 1

    def _compare_place(self, label: str, place: str) -> None:
        memory = self._memory
        if memory.pages and place == memory.place_mark:
            ago = pluralize(memory.pages - _marked_before(memory.pages), "page")
            raise NoProgressError(
                f"{label} was read before, {ago} ago: the source goes in a circle and would never end"
            )
        if _is_marked(memory.pages):
            memory.place_mark = place

    def _compare_stretch(self, label: str, digest: str) -> None:
        memory, number = self._memory, self._memory.filled
        distance = number - _marked_before(number)
        if memory.period:
            memory.again = _digest_of(memory.again + digest)
            if distance + 1 == 2 * memory.period:
                if memory.again == memory.once:
                    pages = pluralize(memory.period, "page")
                    raise NoProgressError(
                        f"{label}: the last {pages} have the same records as the {memory.period} before "
                        "them, word for word: the source goes in a circle and would never end. If such pages are "
                        "right, set allowRepeatedPages"
                    )
                memory.period = 0
        elif number and digest == memory.mark:
            memory.period, memory.once, memory.again = distance, memory.since_mark, _digest_of(digest)
        memory.since_mark = _digest_of(memory.since_mark + digest)
        if _is_marked(number):
            memory.mark, memory.since_mark = digest, _digest_of(digest)
            memory.period, memory.once, memory.again = 0, "", ""


def _is_marked(number: int) -> bool:
    return number.bit_count() <= 1


def _marked_before(number: int) -> int:
    """Return the number of the page that is marked when page `number` comes: the latest marked one before it."""
    return 1 << ((number - 1).bit_length() - 1) if number > 1 else 0


def _digest_of(text: str) -> str:
    return _text(hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES).digest())


def _text(digest: bytes) -> str:
    return base64.urlsafe_b64encode(digest).decode()
