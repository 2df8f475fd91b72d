"""The source `http`: JSON records, page by page."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Final, NoReturn
from urllib.parse import quote, urlsplit

import httpx

from ingestrun.model.worker import ENV_HTTP_AUTHORIZATION, HttpSource
from ingestrun.worker.columns import table_of
from ingestrun.worker.context import Context
from ingestrun.worker.errors import PermanentError, RetryableError, WorkerError
from ingestrun.worker.pagination import Page, find, is_absent, pager_of, same_origin
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import Spool

PARTITION: Final = "{partition}"
_OK: Final = 200
_MAY_PASS: Final = frozenset({408, 425, 429})
_SERVER_ERROR: Final = 500
_TRIES: Final = 4
WAIT_BUDGET: Final = 60.0
"""Seconds that one page may take with all waits before another try; else it is left to the operator's retry."""
_REDIRECTS: Final = 5
_HINTS: Final = {
    401: ": check the authorization Secret",
    403: ": check the authorization Secret",
    404: ": check the url; a missing page is never taken for the end of the data",
}


class HttpReader:
    """A paged HTTP source, from where the batch before ended."""

    def __init__(self, source: HttpSource, context: Context, stop: Stop) -> None:
        """Find the first page.

        Raises:
            PermanentError: the cursor, the partition or the authorization does not go with the source.
        """
        url, params, cursor = source.url, dict(source.params), context.cursor
        if context.partitions is not None:
            url, params = _in_partition(url, params, context.cursor)
            cursor = ""
        self._base = url
        self._records = source.records
        self._pager = pager_of(source, url, params)
        self._position = self._pager.start(cursor)
        self._stop = stop
        self._client = PageClient(source, url, context.authorization, stop)

    def read(self, limit: int | None, spool: Spool) -> str | None:
        """See `fetch.BatchReader`.

        Raises:
            WorkerError: a page could not be had, or is not what it should be.
        """
        position, left = self._position, limit
        with self._client as client:
            while left is None or left > 0:
                self._stop.check()
                url, params = self._pager.request(position)
                page = client.page(url, params, self._records, self._pager.label(position))
                fresh = page.records[position.taken :]
                kept = fresh if left is None else fresh[:left]
                try:
                    following = self._pager.after(position, page, len(kept))
                    spool.add(table_of(kept))
                except WorkerError as error:
                    raise type(error)(f"{error} ({shown(self._base)})") from None
                if following is None:
                    return None
                left = None if left is None else left - len(kept)
                position = following
        return position.cursor()


class PageClient:
    """Gets pages, with a few retries of its own: most of a source's hiccups are over sooner than a new pod runs."""

    def __init__(self, source: HttpSource, base: str, authorization: str | None, stop: Stop) -> None:
        """Make the client; nothing is sent yet. `stop` is asked while a wait before another try goes on.

        Raises:
            PermanentError: an authorization is configured but not there, or is no header value.
        """
        if source.authorization is not None and authorization is None:
            raise PermanentError(
                f"the source has an authorization, but {ENV_HTTP_AUTHORIZATION} is empty: check the Secret"
            )
        if authorization is not None and not (authorization.isascii() and authorization.isprintable()):
            raise PermanentError(f"{ENV_HTTP_AUTHORIZATION} is no header value: it must be one line of ASCII")
        self._base = base
        self._stop = stop
        self._authorization = authorization
        self._client = httpx.Client(
            timeout=source.timeout_seconds,
            follow_redirects=True,
            max_redirects=_REDIRECTS,
            headers={"accept": "application/json", "user-agent": "ingestrun-worker"},
        )

    def __enter__(self) -> PageClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def page(self, url: str, params: dict[str, str], records: str | None, label: str) -> Page:
        """Get one page.

        Raises:
            PermanentError: the source says that it never will (404, say), or a record is no object.
            RetryableError: it may do so later.
        """
        where = f"{label} of {shown(url)}"
        response = self._get(url, params, where)
        try:
            body = json.loads(response.content, parse_constant=_no_constant)
        except (ValueError, RecursionError):
            # Retried although it came with 200: it is mostly a proxy's or a login's page in between, and a
            # source that truly talks no JSON costs but a few attempts.
            kind = response.headers.get("content-type", "no content-type")[:60]
            raise RetryableError(f"{where}: the page is not JSON ({len(response.content)} bytes, {kind})") from None
        found = find(body, records)
        if is_absent(found) or not isinstance(found, list):
            # With 200 as well: an error object in the place of a page, mostly.
            place = f"at {records!r}" if records else "as the page itself"
            raise RetryableError(f"{where}: there is no list of records {place}")
        for index, record in enumerate(found):
            if type(record) is not dict:
                raise PermanentError(f"{where}: record {index} of the page is no object but {_json_kind(record)}")
        return Page(found, body, _next_link(response))

    def _get(self, url: str, params: dict[str, str], where: str) -> httpx.Response:
        waited = 0.0
        for left in reversed(range(_TRIES)):
            started = time.monotonic()
            failure, asked = self._try(url, params, where)
            if isinstance(failure, httpx.Response):
                return failure
            waited += time.monotonic() - started
            wait = asked if asked is not None else 0.5 * 2 ** (_TRIES - 1 - left)
            if asked is not None and waited + asked > WAIT_BUDGET:
                raise RetryableError(
                    f"{failure}; it asks to wait {asked:.0f} s (Retry-After), more than the "
                    f"{WAIT_BUDGET:.0f} s that are waited here: the next attempt goes on"
                )
            if left == 0 or waited + wait > WAIT_BUDGET:
                raise failure
            self._stop.wait(wait)
            waited += wait
        raise AssertionError("unreachable")

    def _try(
        self, url: str, params: dict[str, str], where: str
    ) -> tuple[httpx.Response, None] | tuple[RetryableError, float | None]:
        """One request: the response, or what went wrong and how long the source asks to wait, if it does."""
        # Only to the source itself: a next link may lead to another host.
        send = self._authorization is not None and same_origin(self._base, url)
        try:
            target = httpx.URL(url).copy_merge_params(params) if params else httpx.URL(url)
            response = self._client.get(target, headers={"authorization": self._authorization or ""} if send else None)
        except httpx.TooManyRedirects:
            raise PermanentError(f"{where}: more than {_REDIRECTS} redirects") from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError):
            raise PermanentError(f"{where}: not a URL that can be asked for") from None
        except httpx.TimeoutException as error:
            return RetryableError(f"{where}: no answer in time ({type(error).__name__})"), None
        except (httpx.RequestError, httpx.StreamError) as error:
            return RetryableError(f"{where}: {type(error).__name__}: {str(error)[:160]}"), None
        status = response.status_code
        if status == _OK:
            return response, None
        text = f"{where}: HTTP {status} {response.reason_phrase}".rstrip()
        if status in _MAY_PASS or status >= _SERVER_ERROR:
            return RetryableError(text), retry_after(response.headers.get("retry-after"))
        raise PermanentError(text + _HINTS.get(status, ""))


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Seconds to wait by a Retry-After header, which has seconds or a date; None where it has neither."""
    text = (value or "").strip()
    if text.isdecimal():
        return float(text[:9])
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=UTC)
    return max(0.0, (date - (now or datetime.now(UTC))).total_seconds())


def shown(url: str) -> str:
    """A URL as it may be shown: without credentials, and without the query, which may hold a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _in_partition(url: str, params: dict[str, str], value: str) -> tuple[str, dict[str, str]]:
    if PARTITION not in url and not any(PARTITION in text for text in params.values()):
        raise PermanentError(
            "the run has partitions, but neither url nor params has {partition}: each would read all the data again"
        )
    filled = {name: text.replace(PARTITION, value) for name, text in params.items()}
    return url.replace(PARTITION, quote(value, safe="")), filled


def _next_link(response: httpx.Response) -> str | None:
    url = response.links.get("next", {}).get("url")
    return None if not url else str(response.url.join(url))


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "a boolean", int: "a number", float: "a number", str: "a string"}.get(type(value), "a list")
