"""The source `http`: every record once under every way of paging, and what goes wrong said as it is."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.worker import HttpSource
from ingestrun.worker.errors import WorkerError
from ingestrun.worker.http_source import retry_after, without_secrets
from ingestrun.worker.pagination import Page, pager_for, relative_url

from .support import Bench, Reply, Request, Site, page

WAYS: dict[str, dict[str, Any]] = {
    "page": {"page": {}},
    "page from 0": {"page": {"first": 0}},
    "page with total": {"page": {"totalPath": "meta.total"}},
    "offset": {"offset": {}},
    "offset with total": {"offset": {"totalPath": "meta.total"}},
    "cursor": {"cursor": {"path": "meta.next", "sizeParam": "per_page"}},
    "link": {"link": {"sizeParam": "per_page"}},
}


def records(total: int) -> list[dict[str, Any]]:
    return [{"id": index, "name": f"n{index}"} for index in range(total)]


def source(url: str, way: dict[str, Any], size: int = 10, **more: Any) -> dict[str, Any]:
    return {"http": {"url": url, "pageSize": size, "pagination": way, "records": "data", **more}}


def serve(request: Request, way: dict[str, Any], total: int, cap: int = 1000) -> Reply:
    """A source that knows all ways; `cap` is the most records that it gives a page, whatever it is asked for."""
    everything, params = records(total), request.params
    size = min(cap, int(params.get("per_page") or params.get("limit") or 10))
    kind = next(iter(way))
    if kind == "page":
        start = (int(params["page"]) - way["page"].get("first", 1)) * size
    elif kind == "offset":
        start = int(params["offset"])
    else:
        start = int(params.get("cursor", params.get("at", 0)))
    end = start + size
    body: dict[str, Any] = {"data": everything[start:end], "meta": {"total": total}}
    headers = {}
    if kind == "cursor" and end < total:
        body["meta"]["next"] = end
    if kind == "link" and end < total:
        headers["link"] = f'<{request.path}?at={end}&per_page={size}>; rel="next", </>; rel="first"'
    return page(body, **headers)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("total", "limit", "cap"), [(57, 25, 1000), (30, 10, 1000), (23, 7, 4), (0, 5, 1000)])
def test_each_record_once(bench: Bench, site: Site, name: str, total: int, limit: int, cap: int) -> None:
    way = WAYS[name]
    site.answer = lambda request: serve(request, way, total, cap)
    batches = bench.chain(source(site.url + "/items", way), limit)
    assert [row for batch in batches for row in batch] == records(total)
    assert all(len(batch) == limit for batch in batches[:-2])


@pytest.mark.parametrize("name", WAYS)
def test_the_page_size_is_the_same_in_every_request(bench: Bench, site: Site, name: str) -> None:
    way = WAYS[name]
    site.answer = lambda request: serve(request, way, 35)
    bench.chain(source(site.url + "/items", way), 12)
    assert {request.params.get("per_page", request.params.get("limit")) for request in site.requests} == {"10"}


@given(
    name=st.sampled_from(sorted(WAYS)),
    total=st.integers(0, 60),
    size=st.integers(1, 20),
    cap=st.integers(1, 20),
    limit=st.integers(1, 40),
)
def test_any_size_and_limit(name: str, total: int, size: int, cap: int, limit: int) -> None:
    """The pager alone: a chain of batches, each with a cursor from the one before, has every record once."""
    way = WAYS[name]
    config = HttpSource.model_validate(source("http://h/items", way, size)["http"])
    taken: list[dict[str, Any]] = []
    cursor: str | None = ""
    batches = 0
    while cursor is not None:
        pager = pager_for(config, "http://h/items", {})
        position = pager.start_position(cursor)
        left = limit
        batches += 1
        while True:
            url, params = pager.request(position)
            query = dict(part.split("=") for part in url.partition("?")[2].split("&") if part)
            reply = serve(Request("/items", query | params, {}), way, total, cap)
            body = json.loads(reply.body)
            link = reply.headers.get("link", "")
            got = Page(body["data"], body, "http://h" + link[1 : link.index(">")] if link else None)
            kept = got.records[position.taken :][:left]
            following = pager.next_position(position, got, len(kept))
            taken += kept
            left -= len(kept)
            if following is None or left == 0:
                break
            position = following
        cursor = following.cursor() if following else None
        assert batches <= total // limit + 2
    assert taken == records(total)


def test_a_short_page_is_no_end(bench: Bench, site: Site) -> None:
    pages = {1: records(10), 2: records(3), 3: records(10), 4: []}
    site.answer = lambda request: page(pages[int(request.params["page"])])
    config = {"http": {"url": site.url, "pageSize": 10, "pagination": {"page": {}}}}
    assert bench.run("fetch", config, limit=100).result is not None
    assert len(bench.rows()) == 23


def test_an_empty_page_before_the_total_is_an_error(bench: Bench, site: Site) -> None:
    site.answer = lambda _request: page({"data": [], "meta": {"total": 9}})
    answer = bench.run("fetch", source(site.url, WAYS["page with total"]), limit=5)
    assert answer.code == 1
    assert "only 0 were read" in answer.message


def test_an_empty_page_with_a_next_cursor_is_no_end(bench: Bench, site: Site) -> None:
    bodies = [
        {"data": [], "meta": {"next": "a"}},
        {"data": records(2), "meta": {"next": "b"}},
        {"data": [], "meta": {"next": ""}},
    ]
    site.answer = lambda _request: page(bodies[len(site.requests) - 1])
    answer = bench.run("fetch", source(site.url, WAYS["cursor"]), limit=5)
    assert answer.result is not None
    assert (answer.result.read, answer.result.exhausted) == (2, True)


@pytest.mark.parametrize(
    ("reply", "code", "text"),
    [
        (Reply(404), 65, "page 3 of http://127.0.0.1"),
        (Reply(401), 65, "HTTP 401"),
        (Reply(410), 65, "HTTP 410"),
        (Reply(500), 1, "HTTP 500"),
        (Reply(204, b""), 65, "HTTP 204"),
        (Reply(200, b"<html>proxy</html>", {"content-type": "text/html"}), 1, "not JSON (18 bytes, text/html)"),
        (Reply(200, b""), 1, "not JSON (0 bytes"),
        (Reply(200, b'{"error": "later"}'), 1, "no list of records at 'data'"),
        (Reply(200, b'{"data": [{}, 7]}'), 65, "record 1 of the page is no object but a number"),
        (Reply(200, b'{"data": [{"x": NaN}]}'), 1, "not JSON"),
        (Reply(200, b'{"data": [{"x": "\\ud800"}]}'), 65, "column 'x'"),
    ],
)
def test_a_bad_page(bench: Bench, site: Site, pauses: list[float], reply: Reply, code: int, text: str) -> None:
    good = {"1": page({"data": records(20)[:10]}), "2": page({"data": records(20)[10:]})}
    site.answer = lambda request: good.get(request.params["page"], reply)
    url = site.url.replace("://", "://user:hunter2@") + "/items?token=hunter2"
    answer = bench.run("fetch", source(url, {"page": {}}), limit=100)
    assert answer.code == code
    assert text in answer.message
    assert "hunter2" not in answer.message
    assert answer.result is not None
    assert answer.result.outcome == "failed"
    assert not answer.result.exhausted
    assert list(bench.dir("fetch").parent.iterdir()) == []


def test_retry_after_is_respected(bench: Bench, site: Site, pauses: list[float]) -> None:
    replies = [Reply(429, b"", {"retry-after": "7"}), Reply(503), page({"data": records(1)}), page({"data": []})]
    site.answer = lambda _request: replies[len(site.requests) - 1]
    assert bench.run("fetch", source(site.url, {"page": {}})).code == 0
    assert pauses == [7.0, 1.0]


def test_retry_after_beyond_the_budget_is_left_to_the_operator(bench: Bench, site: Site, pauses: list[float]) -> None:
    site.answer = lambda _request: Reply(429, b"", {"retry-after": "3600"})
    answer = bench.run("fetch", source(site.url, {"page": {}}))
    assert (answer.code, pauses, len(site.requests)) == (1, [], 1)
    assert "3600 s" in answer.message


def test_a_source_that_stays_down(bench: Bench, site: Site, pauses: list[float]) -> None:
    site.answer = lambda _request: Reply(503)
    assert bench.run("fetch", source(site.url, {"page": {}})).code == 1
    assert len(site.requests) == 4
    answer = bench.run("fetch", source("http://127.0.0.1:1/", {"page": {}}))
    assert answer.code == 1
    assert "ConnectError" in answer.message


def test_retry_after_forms() -> None:
    now = datetime(2026, 11, 23, tzinfo=UTC)
    assert retry_after("120") == 120
    assert retry_after("Mon, 23 Nov 2026 00:00:30 GMT", now) == 30
    assert retry_after("Sun, 22 Nov 2026 00:00:30 GMT", now) == 0
    assert retry_after("soon") is retry_after(None) is retry_after("-1") is None
    assert retry_after((now + timedelta(days=1)).isoformat()) is None


def test_authorization_goes_to_the_source_alone(bench: Bench, site: Site, sites: Callable[[], Site]) -> None:
    other = sites()
    config = source(site.url + "/a", {"link": {}}, authorization={"name": "s", "key": "k"})
    first = page({"data": records(1)}, link=f'<{other.url}/b>; rel="next"')
    site.answer = lambda _request: first
    other.answer = lambda _request: page({"data": records(2)})
    assert bench.run("fetch", config, http_authorization="Bearer hunter2\n").code == 0
    assert site.requests[0].headers["authorization"] == "Bearer hunter2"
    assert "authorization" not in other.requests[0].headers
    site.answer = lambda _request: Reply(302, b"", {"location": other.url + "/c"})
    assert bench.run("fetch", config, http_authorization="Bearer hunter2").code == 0
    assert "authorization" not in other.requests[-1].headers


def test_authorization_missing_or_broken(bench: Bench, site: Site) -> None:
    config = source(site.url, {"page": {}}, authorization={"name": "s", "key": "k"})
    assert bench.run("fetch", config).code == 65
    answer = bench.run("fetch", config, http_authorization="Bearer\nhunter2")
    assert answer.code == 65
    assert "hunter2" not in answer.message
    assert site.requests == []


def test_redirects_have_an_end(bench: Bench, site: Site) -> None:
    site.answer = lambda _request: Reply(302, b"", {"location": "/again"})
    answer = bench.run("fetch", source(site.url, {"page": {}}))
    assert (answer.code, len(site.requests)) == (65, 6)


def test_a_partition_is_read_to_its_end(bench: Bench, site: Site) -> None:
    site.answer = lambda request: serve(request, WAYS["offset"], 25)
    config = source(site.url + "/{partition}/items", WAYS["offset"], params={"day": "{partition}"})
    answer = bench.run("fetch", config, cursor="a/b&c", partitions=3, limit=4)
    assert answer.result is not None
    assert (answer.result.read, answer.result.exhausted) == (25, True)
    assert site.requests[0].path == "/a%2Fb%26c/items"
    assert site.requests[0].params["day"] == "a/b&c"
    without = bench.run("fetch", source(site.url, WAYS["offset"]), cursor="a", partitions=3)
    assert without.code == 65
    assert "{partition}" in without.message


@pytest.mark.parametrize("cursor", ["nonsense", '{"page":"x"}', '{"offset":1}', '{"page":2,"size":99}'])
def test_a_cursor_of_another_source(bench: Bench, site: Site, cursor: str) -> None:
    assert bench.run("fetch", source(site.url, {"page": {}}), cursor=cursor, limit=5).code == 65
    assert site.requests == []


def test_a_page_that_shrank(bench: Bench, site: Site) -> None:
    site.answer = lambda _request: page({"data": records(3)})
    cursor = '{"page":2,"size":10,"taken":5}'
    answer = bench.run("fetch", source(site.url, {"page": {}}), cursor=cursor, limit=5)
    assert answer.code == 1
    assert "page 2: the batch before took 5 records of this page, now it has 3" in answer.message


@pytest.mark.parametrize("way", [WAYS["cursor"], WAYS["link"]])
def test_a_source_that_goes_in_circles(bench: Bench, site: Site, way: dict[str, Any]) -> None:
    reply = page({"data": records(1), "meta": {"next": "same"}}, link='</same>; rel="next"')
    site.answer = lambda _request: reply
    assert bench.run("fetch", source(site.url, way)).code == 65
    assert len(site.requests) == 2


def test_a_cursor_too_long(bench: Bench, site: Site) -> None:
    site.answer = lambda _request: page({"data": records(2), "meta": {"next": "x" * 600}})
    answer = bench.run("fetch", source(site.url, WAYS["cursor"]), limit=2)
    assert answer.code == 65
    assert "at most 512" in answer.message
    assert not bench.dir("fetch").exists()


def test_a_cursor_that_fits_but_not_in_the_result(bench: Bench, site: Site) -> None:
    site.answer = lambda _request: page({"data": records(2), "meta": {"next": '"' * 240}})
    answer = bench.run("fetch", source(site.url, WAYS["cursor"]), limit=2)
    assert answer.code in (0, 65)
    assert answer.result is not None


def test_a_cursor_that_leaves_no_room_for_the_state(bench: Bench, site: Site) -> None:
    site.answer = lambda _request: page({"data": records(2), "meta": {"next": '"' * 220}})
    answer = bench.run("fetch", source(site.url, WAYS["cursor"]), limit=2)
    assert answer.result is not None
    assert (answer.code, answer.result.state) == (0, None)
    assert answer.result.next_cursor is not None


def test_urls_in_short() -> None:
    assert relative_url("https://h:443/a", "https://u:p@h/b?c=1#d") == "/b?c=1"
    assert relative_url("https://h/a", "https://u:p@other/b?c=1") == "https://other/b?c=1"
    assert without_secrets("https://u:p@h:8/b?token=1") == "https://h:8/b"


def test_types_over_several_pages(bench: Bench, site: Site) -> None:
    pages: dict[str, list[dict[str, Any]]] = {
        "1": [{"a": None, "b": 1, "c": 1, "d": True, "e": {"x": [1]}, "g": 2**60 + 1}],
        "2": [{"a": 5, "b": 2.5, "c": "x", "d": None, "f": "late", "g": 2**70}],
        "3": [],
    }
    site.answer = lambda request: page(pages[request.params["page"]])
    config = {"http": {"url": site.url, "pageSize": 1, "pagination": {"page": {}}}}
    assert bench.run("fetch", config).code == 0
    assert bench.rows() == [
        {"a": None, "b": 1.0, "c": "1", "d": True, "e": '{"x":[1]}', "g": str(2**60 + 1), "f": None},
        {"a": 5, "b": 2.5, "c": "x", "d": None, "e": None, "g": str(2**70), "f": "late"},
    ]
    assert bench.schema()["a"] == "int64"


def test_parts_of_several_schemas_become_one_file(bench: Bench, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the types change after a row group is on the disk."""
    monkeypatch.setattr("ingestrun.worker.stage_io.ROW_GROUP_ROWS", 2)
    values: list[Any] = [None, 1, 2**60 + 1, 1, 2.5, "x", None, True]
    site.answer = lambda request: page([{"v": v} for v in values[int(request.params["offset"]) :][:1]])
    config = {"http": {"url": site.url, "pageSize": 1, "pagination": {"offset": {}}}}
    assert bench.run("fetch", config).code == 0
    assert [row["v"] for row in bench.rows()] == [None, "1", str(2**60 + 1), "1", "2.5", "x", None, "true"]
    assert [path.name for path in bench.dir("fetch").iterdir()] == ["data.parquet"]


def test_an_unknown_error_is_a_worker_error() -> None:
    assert not WorkerError("x").permanent
