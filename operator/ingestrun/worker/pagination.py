"""Where a paged source is read next, for each way of paging: pure, so that exactness can be tested alone.

A position says which page, and how many of its records were taken already: a batch may end within a page. The
next batch asks for the same page again and skips these. As JSON the position is the cursor that is handed on.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Protocol, TypeVar
from urllib.parse import urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ingestrun.model.worker import HttpSource
from ingestrun.worker.errors import PermanentError, RetryableError

Natural = Annotated[int, Field(ge=0)]
_ABSENT: Final = object()


@dataclass(frozen=True)
class Page:
    """A page as the source gave it. `body` is the whole JSON, `next_link` the Link header's rel="next"."""

    records: list[dict[str, Any]]
    body: Any
    next_link: str | None = None


class Position(BaseModel):
    """Where to go on. `taken`: so many records of the page were taken by the batch before."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    taken: Natural = 0

    def cursor(self) -> str:
        """The position as it is handed on: JSON in ASCII."""
        return json.dumps(self.model_dump(exclude_defaults=True), separators=(",", ":"))


class PagePosition(Position):
    """`seen`: records taken from the source in all. `size`: the page size that the numbers go by."""

    page: Natural
    size: Natural
    seen: Natural = 0


class OffsetPosition(Position):
    """The offset moves by the records that were taken, so that it needs no `taken`."""

    offset: Natural


class CursorPosition(Position):
    """The source's own cursor; null for the first page."""

    at: str | int | None = None


class LinkPosition(Position):
    """The next page's URL, without scheme and host where these are the source's; null for the first page."""

    next: str | None = None


P = TypeVar("P", bound=Position)


class Pager(Protocol):
    """One way of paging."""

    def label(self, position: Any) -> str:
        """What the page is called in messages."""

    def start(self, cursor: str) -> Position:
        """The position that a cursor stands for; an empty one for the beginning.

        Raises:
            PermanentError: it is not a cursor of this source.
        """

    def request(self, position: Any) -> tuple[str, dict[str, str]]:
        """The URL of the page, and the parameters to add."""

    def after(self, position: Any, page: Page, kept: int) -> Position | None:
        """Where to go on when `kept` more records of the page were taken; None: the source said it has no more."""


def pager_of(source: HttpSource, url: str, params: Mapping[str, str]) -> Pager:
    """The pager that the source's `pagination` asks for."""
    way = source.pagination
    if way.page is not None:
        return PagePager(source, url, dict(params))
    if way.offset is not None:
        return OffsetPager(source, url, dict(params))
    if way.cursor is not None:
        return CursorPager(source, url, dict(params))
    return LinkPager(source, url, dict(params))


def find(body: Any, path: str | None) -> Any:
    """The value at a dotted path, or a sentinel that `is_absent` knows."""
    for part in path.split(".") if path else ():
        if not isinstance(body, dict) or part not in body:
            return _ABSENT
        body = body[part]
    return body


def is_absent(value: Any) -> bool:
    """Whether `find` found nothing."""
    return value is _ABSENT


class _Base:
    def __init__(self, source: HttpSource, url: str, params: dict[str, str]) -> None:
        self._way = source.pagination
        self._size = source.page_size
        self._url = url
        self._params = params

    def _sized(self, name: str | None) -> dict[str, str]:
        return {**self._params, name: str(self._size)} if name else dict(self._params)


def _parse(kind: type[P], cursor: str) -> P:
    try:
        return kind.model_validate_json(cursor)
    except ValidationError:
        raise PermanentError(
            f"the cursor {cursor[:80]!r} is not one of this source: was the pagination changed under the run?"
        ) from None


def _shrunk(what: str, taken: int, now: int) -> RetryableError:
    return RetryableError(
        f"{what}: the batch before took {taken} records of this page, now it has {now}: "
        "the source changed under the run"
    )


def _check_total(body: Any, path: str | None, seen: int, *, empty: bool, what: str) -> bool:
    """Whether the source's own total says that all was read."""
    if path is None:
        return False
    total = find(body, path)
    if isinstance(total, str) and total.isdecimal():
        total = int(total)
    if not isinstance(total, int) or isinstance(total, bool):
        raise RetryableError(f"{what}: the page has no number at totalPath {path!r}")
    if empty and seen < total:
        # An empty page before the total is a missing page, and that is never the end of the data.
        raise RetryableError(f"{what}: no records on this page, but {path!r} says {total} and only {seen} were read")
    return seen >= total


class PagePager(_Base):
    """Numbered pages. A short page is no end: a source may give fewer records a page than it was asked for."""

    def start(self, cursor: str) -> PagePosition:
        """See `Pager`."""
        way = self._way.page
        assert way is not None  # noqa: S101 - for mypy
        if not cursor:
            return PagePosition(page=way.first, size=self._size)
        position = _parse(PagePosition, cursor)
        if position.size != self._size:
            raise PermanentError(
                f"the cursor counts pages of {position.size} records, pageSize is {self._size}: "
                "a page number means nothing under another size"
            )
        return position

    def label(self, position: PagePosition) -> str:
        """See `Pager`."""
        return f"page {position.page}"

    def request(self, position: PagePosition) -> tuple[str, dict[str, str]]:
        """See `Pager`."""
        way = self._way.page
        assert way is not None  # noqa: S101 - for mypy
        return self._url, {**self._sized(way.size_param), way.param: str(position.page)}

    def after(self, position: PagePosition, page: Page, kept: int) -> PagePosition | None:
        """See `Pager`."""
        way = self._way.page
        assert way is not None  # noqa: S101 - for mypy
        what = self.label(position)
        used, count = position.taken + kept, len(page.records)
        if position.taken > count:
            raise _shrunk(what, position.taken, count)
        seen = position.seen + kept
        over = _check_total(page.body, way.total_path, seen, empty=not count, what=what)
        if used < count:
            return PagePosition(page=position.page, size=self._size, seen=seen, taken=used)
        if over or not count:
            return None
        return PagePosition(page=position.page + 1, size=self._size, seen=seen)


class OffsetPager(_Base):
    """Offsets, which can begin anywhere: no page is asked for twice."""

    def start(self, cursor: str) -> OffsetPosition:
        """See `Pager`."""
        return _parse(OffsetPosition, cursor) if cursor else OffsetPosition(offset=0)

    def label(self, position: OffsetPosition) -> str:
        """See `Pager`."""
        return f"offset {position.offset}"

    def request(self, position: OffsetPosition) -> tuple[str, dict[str, str]]:
        """See `Pager`."""
        way = self._way.offset
        assert way is not None  # noqa: S101 - for mypy
        return self._url, {**self._sized(way.size_param), way.param: str(position.offset)}

    def after(self, position: OffsetPosition, page: Page, kept: int) -> OffsetPosition | None:
        """See `Pager`."""
        way = self._way.offset
        assert way is not None  # noqa: S101 - for mypy
        count, offset = len(page.records), position.offset + kept
        what = self.label(position)
        over = _check_total(page.body, way.total_path, offset, empty=not count, what=what)
        if not count or (over and kept == count):
            return None
        return OffsetPosition(offset=offset)


class CursorPager(_Base):
    """The response carries the next cursor; the end is where it carries none."""

    def start(self, cursor: str) -> CursorPosition:
        """See `Pager`."""
        return _parse(CursorPosition, cursor) if cursor else CursorPosition()

    def label(self, position: CursorPosition) -> str:
        """See `Pager`."""
        return "the first page" if position.at is None else f"the page at cursor {str(position.at)[:40]!r}"

    def request(self, position: CursorPosition) -> tuple[str, dict[str, str]]:
        """See `Pager`."""
        way = self._way.cursor
        assert way is not None  # noqa: S101 - for mypy
        params = self._sized(way.size_param)
        return self._url, params if position.at is None else {**params, way.param: str(position.at)}

    def after(self, position: CursorPosition, page: Page, kept: int) -> CursorPosition | None:
        """See `Pager`."""
        way = self._way.cursor
        assert way is not None  # noqa: S101 - for mypy
        used, count = position.taken + kept, len(page.records)
        if position.taken > count:
            raise _shrunk(self.label(position), position.taken, count)
        if used < count:
            return CursorPosition(at=position.at, taken=used)
        following = find(page.body, way.path)
        if is_absent(following) or following is None or following == "":
            return None
        if isinstance(following, bool) or not isinstance(following, str | int):
            raise PermanentError(
                f"the cursor at {way.path!r} is a {type(following).__name__}, not a string or a number"
            )
        if following == position.at:
            raise PermanentError(f"the cursor at {way.path!r} is the one that was sent: the source would never end")
        return CursorPosition(at=following)


class LinkPager(_Base):
    """The Link header carries the next URL; the end is where there is none."""

    def start(self, cursor: str) -> LinkPosition:
        """See `Pager`."""
        return _parse(LinkPosition, cursor) if cursor else LinkPosition()

    def label(self, position: LinkPosition) -> str:
        """See `Pager`."""
        return "the first page" if position.next is None else "a linked page"

    def request(self, position: LinkPosition) -> tuple[str, dict[str, str]]:
        """See `Pager`."""
        way = self._way.link
        assert way is not None  # noqa: S101 - for mypy
        if position.next is None:
            return self._url, self._sized(way.size_param)
        return urljoin(self._url, position.next), {}

    def after(self, position: LinkPosition, page: Page, kept: int) -> LinkPosition | None:
        """See `Pager`."""
        used, count = position.taken + kept, len(page.records)
        if position.taken > count:
            raise _shrunk(self.label(position), position.taken, count)
        if used < count:
            return LinkPosition(next=position.next, taken=used)
        if page.next_link is None:
            return None
        following = shorten(self._url, page.next_link)
        if following == position.next:
            raise PermanentError('the Link header\'s rel="next" is the page itself: the source would never end')
        return LinkPosition(next=following)


def same_origin(one: str, other: str) -> bool:
    """Whether two URLs have scheme, host and port in common."""
    return _origin(one) == _origin(other)


def shorten(base: str, url: str) -> str:
    """A URL as short as the base allows: path and query where the origin is the base's. Credentials are dropped."""
    parts = urlsplit(url)
    if same_origin(base, url) and not parts.path.startswith("//"):
        return (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    host = parts.netloc.rpartition("@")[2]
    return parts._replace(netloc=host, fragment="").geturl()


def _origin(url: str) -> tuple[str, str, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
