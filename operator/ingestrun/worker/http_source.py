"""The source `http`: reads JSON records page by page."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Final
from urllib.parse import quote, urlsplit

import httpx
import pyarrow as pa

from ingestrun.model.text import pluralize
from ingestrun.model.worker import ENV_HTTP_AUTHORIZATION, HttpSource
from ingestrun.worker.collector import RowCollector
from ingestrun.worker.columns import parse_json, table_from_records
from ingestrun.worker.context import PARTITION_PLACEHOLDER, Context
from ingestrun.worker.errors import PermanentError, RetryableError, WorkerError
from ingestrun.worker.page_history import PageHistory, table_digest
from ingestrun.worker.pagination import Page, Position, is_absent, pager_for, same_origin, value_at
from ingestrun.worker.shutdown import Stop

_OK: Final = 200
_RETRYABLE_STATUS: Final = frozenset({408, 425, 429})
_SERVER_ERROR: Final = 500
_TRIES: Final = 4
WAIT_BUDGET: Final = 60.0
"""Most seconds that one page may take with all its tries and waits; after that the operator retries the stage."""
_MAX_REDIRECTS: Final = 5
_HINTS: Final = {
    401: ": check the authorization Secret",
    403: ": check the authorization Secret",
    404: ": check the url; a missing page is never taken for the end of the data",
}


class HttpReader:
    """Reads a paged HTTP source from where the batch before ended."""

    source_digest: str | None = None
    """A source over HTTP has no list that could be fixed: its pages are what it sends when they are asked for."""

    def __init__(self, source: HttpSource, context: Context, stop: Stop) -> None:
        """Find the first page; nothing is sent yet.

        Raises:
            PermanentError: the cursor, the partition or the authorization does not fit the source.
        """
        url, params, cursor = source.url, dict(source.params), context.cursor
        if context.partitions is not None:
            url, params = _fill_in_partition(url, params, context.cursor)
            cursor = ""
        self._base = url
        self._records = source.records
        self._pager = pager_for(source, url, params)
        self._position = self._pager.start_position(cursor)
        self._stop = stop
        self._client = PageClient(source, url, context.authorization, stop)
        self._history = PageHistory(context.state, repeats_allowed=source.allow_repeated_pages)

    def read(self, limit: int | None, output: RowCollector) -> str | None:
        """Read a batch, as `fetch.BatchReader`.

        Raises:
            WorkerError: a page can't be got, or is not a page of records.
        """
        position, remaining = self._position, limit
        with self._client as client:
            while remaining is None or remaining > 0:
                self._stop.raise_if_stopped()
                url, params = self._pager.request(position)
                page = client.page(url, params, self._records, self._pager.describe(position))
                fresh = page.records[position.taken :]
                kept = fresh if remaining is None else fresh[:remaining]
                try:
                    table = table_from_records(kept)
                    self._remember(position, page, table)
                    following = self._pager.next_position(position, page, len(kept))
                    output.add(table)
                except WorkerError as error:
                    raise type(error)(f"{error} ({without_secrets(self._base)})") from None
                if following is None:
                    return None
                remaining = None if remaining is None else remaining - len(kept)
                position = following
        return position.cursor()

    def state(self) -> str:
        """Return the history of the pages so far, as `fetch.BatchReader`."""
        return self._history.state()

    def _remember(self, position: Position, page: Page, kept: pa.Table) -> None:
        if position.taken:
            return  # the batch before has seen this page
        rows = len(page.records)
        whole = kept if kept.num_rows == rows else table_from_records(page.records)
        digest = table_digest(whole) if rows else ""
        self._history.add(self._pager.describe(position), position.place(), rows, digest)


class PageClient:
    """Gets pages, and retries a few times itself, because most failures of a source pass before a new pod would run."""

    def __init__(self, source: HttpSource, base: str, authorization: str | None, stop: Stop) -> None:
        """Make the client; nothing is sent yet. Waits between tries are interrupted by `stop`.

        Raises:
            PermanentError: an authorization is configured but missing, or is no header value.
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
            verify=_tls_context(),
            timeout=source.timeout_seconds,
            follow_redirects=True,
            max_redirects=_MAX_REDIRECTS,
            headers={"accept": "application/json", "user-agent": "ingestrun-worker"},
        )

    def __enter__(self) -> PageClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def page(self, url: str, params: dict[str, str], records: str | None, label: str) -> Page:
        """Get one page.

        Raises:
            PermanentError: a retry can't help (404, say), or a record is no object.
            RetryableError: the source failed in a way that may pass, or the page is not a page of records.
        """
        where = f"{label} of {without_secrets(url)}"
        response = self._get(url, params, where)
        try:
            body = parse_json(response.content)
        except (ValueError, RecursionError):
            # Retried in spite of the status 200, because it is mostly the page of a proxy or a login in between. If the
            # source really sends no JSON, it only costs a few attempts.
            content_type = response.headers.get("content-type", "no content-type")[:60]
            raise RetryableError(
                f"{where}: the page is not JSON ({pluralize(len(response.content), 'byte')}, {content_type})"
            ) from None
        found = value_at(body, records)
        if is_absent(found) or not isinstance(found, list):
            # Retried as well: it is mostly an error object that was sent with the status 200.
            place = f"at {records!r}" if records else "as the page itself"
            raise RetryableError(f"{where}: there is no list of records {place}")
        for index, record in enumerate(found):
            if type(record) is not dict:
                raise PermanentError(f"{where}: record {index} of the page is no object but {_json_kind(record)}")
        return Page(found, body, _next_link(response))

    def _get(self, url: str, params: dict[str, str], where: str) -> httpx.Response:
        elapsed = 0.0
        for tries_left in reversed(range(_TRIES)):
            started = time.monotonic()
            failure, asked_wait = self._try(url, params, where)
            if isinstance(failure, httpx.Response):
                return failure
            elapsed += time.monotonic() - started
            wait = asked_wait if asked_wait is not None else 0.5 * 2 ** (_TRIES - 1 - tries_left)
            if asked_wait is not None and elapsed + asked_wait > WAIT_BUDGET:
                raise RetryableError(
                    f"{failure}; it asks to wait {asked_wait:.0f} s (Retry-After), more than the "
                    f"{WAIT_BUDGET:.0f} s that are waited here: the next attempt goes on"
                )
            if tries_left == 0 or elapsed + wait > WAIT_BUDGET:
                raise failure
            self._stop.wait(wait)
            elapsed += wait
        raise AssertionError("unreachable")

    def _try(
        self, url: str, params: dict[str, str], where: str
    ) -> tuple[httpx.Response, None] | tuple[RetryableError, float | None]:
        """Send one request; return the response, or the error and the seconds that the source asks to wait, if any."""
        # Sent to the source's own origin alone, because a next link may lead to another host.
        authorized = self._authorization is not None and same_origin(self._base, url)
        try:
            target = httpx.URL(url).copy_merge_params(params) if params else httpx.URL(url)
            response = self._client.get(
                target, headers={"authorization": self._authorization or ""} if authorized else None
            )
        except httpx.TooManyRedirects:
            raise PermanentError(f"{where}: more than {_MAX_REDIRECTS} redirects") from None
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
        if status in _RETRYABLE_STATUS or status >= _SERVER_ERROR:
            return RetryableError(text), retry_after(response.headers.get("retry-after"))
        raise PermanentError(text + _HINTS.get(status, ""))


@cache
def _tls_context() -> ssl.SSLContext:
    """Make the context of all clients, once, because to read the certificates takes longer than many a page."""
    return httpx.create_ssl_context()


def retry_after(value: str | None, now: datetime | None = None) -> float | None:
    """Return the seconds to wait by a Retry-After header, which holds seconds or a date; None if it holds neither."""
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


def without_secrets(url: str) -> str:
    """Return a URL fit for a message: without credentials, and without the query, which may hold a token."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


def _fill_in_partition(url: str, params: dict[str, str], value: str) -> tuple[str, dict[str, str]]:
    if PARTITION_PLACEHOLDER not in url and not any(PARTITION_PLACEHOLDER in text for text in params.values()):
        raise PermanentError(
            "the run has partitions, but neither url nor params has {partition}: each would read all the data again"
        )
    filled = {name: text.replace(PARTITION_PLACEHOLDER, value) for name, text in params.items()}
    return url.replace(PARTITION_PLACEHOLDER, quote(value, safe="")), filled


def _next_link(response: httpx.Response) -> str | None:
    url = response.links.get("next", {}).get("url")
    return None if not url else str(response.url.join(url))


def _json_kind(value: Any) -> str:
    if value is None:
        return "null"
    return {bool: "a boolean", int: "a number", float: "a number", str: "a string"}.get(type(value), "a list")
