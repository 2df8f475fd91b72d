"""The demo's data source: pages that neither overlap nor leave a gap, whatever their size."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from dev.demo.source_server import BadRequestError, Server, Table, answer, read_data
from hypothesis import given
from hypothesis import strategies as st

HEADER = b"year,dep_time,carrier,air_time,time_hour"
ROWS = [b"2013,517,UA,227,2013-01-01T10:00:00Z", b"2013,NA,NA,-3.5,2013-01-01T11:00:00Z"]


def table(rows: int) -> Table:
    lines = [ROWS[number % 2].replace(b"517", str(number).encode()) for number in range(rows)]
    return Table(b"\n".join([HEADER, *lines]) + b"\n")


def page(of: Table, query: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(answer(of, query).body)
    return body


def test_numbers_are_numbers_text_is_text_and_na_is_null() -> None:
    assert page(table(2), "page=1&per_page=10") == {
        "data": [
            {
                "id": 1,
                "year": 2013,
                "dep_time": 0,
                "carrier": "UA",
                "air_time": 227,
                "time_hour": "2013-01-01T10:00:00Z",
            },
            {
                "id": 2,
                "year": 2013,
                "dep_time": None,
                "carrier": None,
                "air_time": -3.5,
                "time_hour": "2013-01-01T11:00:00Z",
            },
        ],
        "page": 1,
        "per_page": 10,
        "total": 2,
    }


@given(rows=st.integers(0, 60), size=st.integers(1, 25), by_offset=st.booleans())
def test_following_the_pages_gives_every_row_once(rows: int, size: int, by_offset: bool) -> None:
    source = table(rows)
    query: str | None = f"offset=0&limit={size}" if by_offset else f"page=1&per_page={size}"
    ids: list[int] = []
    asked = 0
    while query is not None:
        found = answer(source, query)
        ids += [row["id"] for row in json.loads(found.body)["data"]]
        query = "&".join(f"{k}={v}" for k, v in found.next_query.items()) if found.next_query else None
        asked += 1
    assert ids == list(range(1, rows + 1))
    assert asked == max(1, -(-rows // size))


@given(offset=st.integers(0, 70), limit=st.integers(1, 70))
def test_an_offset_is_exact(offset: int, limit: int) -> None:
    ids = [row["id"] for row in page(table(50), f"offset={offset}&limit={limit}")["data"]]
    assert ids == list(range(1, 51))[offset : offset + limit]


def test_past_the_end_there_are_no_rows_and_no_next_page() -> None:
    found = answer(table(5), "page=9&per_page=3")
    assert json.loads(found.body)["data"] == []
    assert found.next_query is None


def test_the_last_line_needs_no_line_break() -> None:
    assert Table(HEADER + b"\n" + ROWS[0]).total == 1


@pytest.mark.parametrize(
    ("query", "why"),
    [
        ("page=0", "page must be a number from 1"),
        ("page=two", "page must be a number"),
        ("page=-1", "page must be a number"),
        ("per_page=50001", "per_page must be a number from 1 to 50000"),
        ("limit=0", "limit must be a number from 1"),
        ("offset=1&page=1", "unknown parameter 'page'"),
        ("cursor=x", "unknown parameter 'cursor'"),
        ("page=" + "9" * 400, "page must be a number"),
    ],
)
def test_a_query_that_cannot_be_meant_is_refused(query: str, why: str) -> None:
    with pytest.raises(BadRequestError, match=why):
        answer(table(3), query)


def test_data_that_the_index_of_lines_could_misread_is_refused() -> None:
    with pytest.raises(ValueError, match="quoted"):
        Table(HEADER + b'\n2013,1,"U\nA",2,x\n')


def test_a_column_of_numbers_with_something_else_in_it_is_refused() -> None:
    with pytest.raises(ValueError, match="'dep_time' holds something that is no number"):
        Table(HEADER + b"\n2013,0x1,UA,2,x\n").rows(0, 1)


@pytest.mark.parametrize("name", ["flights.csv", "flights.csv.zip"])
def test_a_file_or_an_archive_of_one_is_read(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("flights.csv", HEADER + b"\n" + ROWS[0])
    else:
        path.write_bytes(HEADER + b"\n" + ROWS[0])
    assert Table(read_data(path)).total == 1


@pytest.fixture
def url() -> Iterator[str]:
    server = Server(("127.0.0.1", 0), table(5))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_over_http_the_link_leads_to_the_next_page_and_ends(url: str) -> None:
    with urllib.request.urlopen(f"{url}/flights?page=1&per_page=3") as response:
        assert response.headers["Link"] == '</flights?page=2&per_page=3>; rel="next"'
        assert [row["id"] for row in json.load(response)["data"]] == [1, 2, 3]
    with urllib.request.urlopen(f"{url}/flights?page=2&per_page=3") as response:
        assert response.headers["Link"] is None
        assert [row["id"] for row in json.load(response)["data"]] == [4, 5]


def test_over_http_it_is_healthy_and_says_what_is_wrong(url: str) -> None:
    with urllib.request.urlopen(f"{url}/healthz") as response:
        assert json.load(response) == {"status": "ok", "total": 5}
    for path, status in (("/flights?page=0", 400), ("/nothing", 404)):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(url + path)
        assert refused.value.code == status
        assert "error" in json.load(refused.value)
        refused.value.close()


def test_the_front_page_is_text(url: str) -> None:
    with urllib.request.urlopen(f"{url}/") as response:
        assert response.headers["Content-Type"].startswith("text/plain")
        assert b"/flights" in response.read()
