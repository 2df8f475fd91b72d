"""Next position of a paged source, for each kind of pagination. It does no I/O, so exactness can be tested alone.

A position names a page, and how many of its records are taken already, because a batch may end within a page. The
next batch asks for the same page again and skips these. The position as JSON is the cursor that is handed on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from ingestrun.model.text import pluralize
from ingestrun.model.worker import CursorPagination, HttpSource, LinkPagination, OffsetPagination, PagePagination
from ingestrun.worker.errors import NoProgressError, PermanentError, RetryableError

_ABSENT: Final = object()


@dataclass(frozen=True)
class Page:
    """A page as the source sent it; `body` is the whole JSON, `next_link` the Link header's rel="next"."""

    records: list[dict[str, Any]]
    body: Any
    next_link: str | None = None


class Position(BaseModel):
    """Position to go on from; `taken` is the number of records of the page that the batch before has taken."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    taken: NonNegativeInt = 0

    def cursor(self) -> str:
        """Return the position as JSON in ASCII."""
        return json.dumps(self.model_dump(exclude_defaults=True), separators=(",", ":"))

    def place(self) -> str | None:
        """Return what the source itself has said where the page is; None if the worker counts the pages by itself."""
        return None


class PagePosition(Position):
    """A page's number; `size` is the page size that it counts by, `seen` how many records were taken in all."""

    page: NonNegativeInt
    size: NonNegativeInt
    seen: NonNegativeInt = 0


class OffsetPosition(Position):
    """An offset, which moves by the records that were taken, so that it needs no `taken`."""

    offset: NonNegativeInt


class CursorPosition(Position):
    """The source's own cursor; null for the first page."""

    at: str | int | None = None

    def place(self) -> str:
        """Return the source's cursor."""
        return "" if self.at is None else str(self.at)


class LinkPosition(Position):
    """The next page's URL, without scheme and host if they are the source's; null for the first page."""

    next: str | None = None

    def place(self) -> str:
        """Return the link."""
        return self.next or ""


class Pager(Protocol):
    """One kind of pagination."""

    def describe(self, position: Any) -> str:
        """Return the page's name for messages."""

    def start_position(self, cursor: str) -> Position:
        """Parse a cursor; an empty one is the beginning.

        Raises:
            PermanentError: it is not a cursor of this source.
        """

    def request(self, position: Any) -> tuple[str, dict[str, str]]:
        """Return the page's URL, and the parameters to add."""

    def next_position(self, position: Any, page: Page, kept: int) -> Position | None:
        """Return where to go on after taking `kept` more records; None if the source has reported its end."""


def pager_for(source: HttpSource, url: str, params: Mapping[str, str]) -> Pager:
    """Return the pager that the source's `pagination` names."""
    requests = _Requests(url, dict(params), source.page_size)
    kind = source.pagination
    if kind.page is not None:
        return PagePager(kind.page, requests)
    if kind.offset is not None:
        return OffsetPager(kind.offset, requests)
    if kind.cursor is not None:
        return CursorPager(kind.cursor, requests)
    if kind.link is not None:
        return LinkPager(kind.link, requests)
    raise PermanentError("the pagination has none of page, offset, cursor and link")


def value_at(body: Any, path: str | None) -> Any:
    """Return the value at a dotted path, or a sentinel that `is_absent` recognizes."""
    for part in path.split(".") if path else ():
        if not isinstance(body, dict) or part not in body:
            return _ABSENT
        body = body[part]
    return body


def is_absent(value: Any) -> bool:
    """Return whether `value_at` found nothing."""
    return value is _ABSENT


@dataclass(frozen=True)
class _Requests:
    """Settings that the requests of all pages share."""

    url: str
    params: dict[str, str]
    page_size: int

    def params_with_size(self, size_param: str | None) -> dict[str, str]:
        return {**self.params, size_param: str(self.page_size)} if size_param else dict(self.params)


_Pagination = TypeVar("_Pagination", PagePagination, OffsetPagination, CursorPagination, LinkPagination)
_Position = TypeVar("_Position", bound=Position)


class _Pager(Generic[_Pagination]):
    def __init__(self, pagination: _Pagination, requests: _Requests) -> None:
        self._pagination: _Pagination = pagination
        self._requests = requests


def _parse_cursor(kind: type[_Position], cursor: str) -> _Position:
    try:
        return kind.model_validate_json(cursor)
    except ValidationError:
        raise PermanentError(
            f"the cursor {cursor[:80]!r} is not one of this source: was the pagination changed under the run?"
        ) from None


def _page_shrank(where: str, taken: int, now: int) -> RetryableError:
    return RetryableError(
        f"{where}: the batch before took {pluralize(taken, 'record')} of this page, now it has {now}: "
        "the source changed under the run"
    )


def _total_reached(body: Any, path: str | None, seen: int, *, empty: bool, where: str) -> bool:
    """Return whether all records were read, by the total that the source states; False if it states none.

    Raises:
        RetryableError: the page has no total, or is empty before the total is reached.
    """
    if path is None:
        return False
    total = value_at(body, path)
    if isinstance(total, str) and total.isdecimal():
        total = int(total)
    if not isinstance(total, int) or isinstance(total, bool):
        raise RetryableError(f"{where}: the page has no number at totalPath {path!r}")
    if empty and seen < total:
        # An empty page before the total is a missing page, and that is never the end of the data.
        raise RetryableError(f"{where}: no records on this page, but {path!r} says {total} and only {seen} were read")
    return seen >= total


class PagePager(_Pager[PagePagination]):
    """Numbered pages. A short page is not the end, because a source may send fewer records than it was asked for."""

    def start_position(self, cursor: str) -> PagePosition:
        size = self._requests.page_size
        if not cursor:
            return PagePosition(page=self._pagination.first, size=size)
        position = _parse_cursor(PagePosition, cursor)
        if position.size != size:
            raise PermanentError(
                f"the cursor counts pages of {pluralize(position.size, 'record')}, pageSize is {size}: "
                "a page number means nothing under another size"
            )
        return position

    def describe(self, position: PagePosition) -> str:
        return f"page {position.page}"

    def request(self, position: PagePosition) -> tuple[str, dict[str, str]]:
        params = self._requests.params_with_size(self._pagination.size_param)
        return self._requests.url, {**params, self._pagination.param: str(position.page)}

    def next_position(self, position: PagePosition, page: Page, kept: int) -> PagePosition | None:
        where = self.describe(position)
        taken, count = position.taken + kept, len(page.records)
        if position.taken > count:
            raise _page_shrank(where, position.taken, count)
        seen = position.seen + kept
        complete = _total_reached(page.body, self._pagination.total_path, seen, empty=not count, where=where)
        if taken < count:
            return PagePosition(page=position.page, size=position.size, seen=seen, taken=taken)
        if complete or not count:
            return None
        return PagePosition(page=position.page + 1, size=position.size, seen=seen)


class OffsetPager(_Pager[OffsetPagination]):
    """Offsets. A page may begin at any record, so no page is asked for twice."""

    def start_position(self, cursor: str) -> OffsetPosition:
        return _parse_cursor(OffsetPosition, cursor) if cursor else OffsetPosition(offset=0)

    def describe(self, position: OffsetPosition) -> str:
        return f"offset {position.offset}"

    def request(self, position: OffsetPosition) -> tuple[str, dict[str, str]]:
        params = self._requests.params_with_size(self._pagination.size_param)
        return self._requests.url, {**params, self._pagination.param: str(position.offset)}

    def next_position(self, position: OffsetPosition, page: Page, kept: int) -> OffsetPosition | None:
        count, offset = len(page.records), position.offset + kept
        where = self.describe(position)
        complete = _total_reached(page.body, self._pagination.total_path, offset, empty=not count, where=where)
        if not count or (complete and kept == count):
            return None
        return OffsetPosition(offset=offset)


class CursorPager(_Pager[CursorPagination]):
    """Cursors. Each response carries the next one; the source ends with a response that carries none."""

    def start_position(self, cursor: str) -> CursorPosition:
        return _parse_cursor(CursorPosition, cursor) if cursor else CursorPosition()

    def describe(self, position: CursorPosition) -> str:
        return "the first page" if position.at is None else f"the page at cursor {str(position.at)[:40]!r}"

    def request(self, position: CursorPosition) -> tuple[str, dict[str, str]]:
        params = self._requests.params_with_size(self._pagination.size_param)
        if position.at is not None:
            params[self._pagination.param] = str(position.at)
        return self._requests.url, params

    def next_position(self, position: CursorPosition, page: Page, kept: int) -> CursorPosition | None:
        taken, count = position.taken + kept, len(page.records)
        if position.taken > count:
            raise _page_shrank(self.describe(position), position.taken, count)
        if taken < count:
            return CursorPosition(at=position.at, taken=taken)
        path = self._pagination.path
        following = value_at(page.body, path)
        if is_absent(following) or following is None or following == "":
            return None
        if isinstance(following, bool) or not isinstance(following, str | int):
            raise PermanentError(f"the cursor at {path!r} is a {type(following).__name__}, not a string or a number")
        if following == position.at:
            raise NoProgressError(f"the cursor at {path!r} is the one that was sent: the source would never end")
        return CursorPosition(at=following)


class LinkPager(_Pager[LinkPagination]):
    """Links. The Link header carries the next page's URL; the source ends with a response that has none."""

    def start_position(self, cursor: str) -> LinkPosition:
        return _parse_cursor(LinkPosition, cursor) if cursor else LinkPosition()

    def describe(self, position: LinkPosition) -> str:
        return "the first page" if position.next is None else "a linked page"

    def request(self, position: LinkPosition) -> tuple[str, dict[str, str]]:
        if position.next is None:
            return self._requests.url, self._requests.params_with_size(self._pagination.size_param)
        return urljoin(self._requests.url, position.next), {}

    def next_position(self, position: LinkPosition, page: Page, kept: int) -> LinkPosition | None:
        taken, count = position.taken + kept, len(page.records)
        if position.taken > count:
            raise _page_shrank(self.describe(position), position.taken, count)
        if taken < count:
            return LinkPosition(next=position.next, taken=taken)
        if page.next_link is None:
            return None
        following = relative_url(self._requests.url, page.next_link)
        if following == position.next:
            raise NoProgressError('the Link header\'s rel="next" is the page itself: the source would never end')
        return LinkPosition(next=following)


def same_origin(one: str, other: str) -> bool:
    """Return whether two URLs share scheme, host and port."""
    return _origin(one) == _origin(other)


def relative_url(base: str, url: str) -> str:
    """Return a URL as path and query if it has the base's origin, else in full; credentials are dropped."""
    parts = urlsplit(url)
    if same_origin(base, url) and not parts.path.startswith("//"):
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, fragment="").geturl()


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
