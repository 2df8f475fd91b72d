"""A source that repeats itself is recognized, in constant memory, and one that does not is not suspected."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.contract import NO_PROGRESS, STATE_MAX_CHARS
from ingestrun.worker.columns import table_from_records
from ingestrun.worker.errors import NoProgressError
from ingestrun.worker.page_history import MAX_EMPTY_PAGES, PageHistory, table_digest

from .support import Answer, Bench, Reply, Request, Site, page


def pages_until_told(
    content: Callable[[int], str], place: Callable[[int], str] | None = None, *, most: int = 5000, restart: int = 0
) -> int | None:
    """Feed the pages; after each `restart` of them a new history goes on from the state, as a new batch does."""
    history = PageHistory()
    for number in range(most):
        if restart and number % restart == 0:
            state = history.state()
            assert len(state) <= STATE_MAX_CHARS
            history = PageHistory(state)
            assert history.state() == state
        try:
            history.add(f"page {number}", place(number) if place else None, 5, content(number))
        except NoProgressError:
            return number
    return None


@given(before=st.integers(0, 60), length=st.integers(1, 90), restart=st.integers(0, 7))
def test_a_circle_of_any_length_is_found(before: int, length: int, restart: int) -> None:
    """Of pages that the worker numbers itself, so that only their records show it."""

    def content(number: int) -> str:
        return f"page-{number if number < before else before + (number - before) % length}"

    told = pages_until_told(content, restart=restart)
    assert told is not None
    assert told >= before + length, "the first time round nothing is repeated"
    assert told <= 8 * max(before, length) + 2
    if length == 1:
        assert told == before + 1, "the page before is enough"


@given(before=st.integers(0, 60), length=st.integers(1, 90), restart=st.integers(0, 7))
def test_a_circle_of_cursors_is_found_though_the_records_differ(before: int, length: int, restart: int) -> None:
    def place(number: int) -> str:
        return f"cursor {number if number < before else before + (number - before) % length}"

    told = pages_until_told(str, place, restart=restart)
    assert told is not None
    assert before + length <= told <= 4 * max(before, length) + 2


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=60), st.integers(0, 5))
def test_what_is_told_was_repeated(letters: list[str], restart: int) -> None:
    """Whatever the pages: a stretch of them, or one page, must stand twice in a row."""
    told = pages_until_told(lambda number: letters[number], most=len(letters), restart=restart)
    if told is not None:
        read = letters[: told + 1]
        assert any(read[-n:] == read[-2 * n : -n] for n in range(1, len(read) // 2 + 1))


def test_a_page_that_comes_again_now_and_then_is_no_circle() -> None:
    """Two days without measurements look the same; what lies between them does not."""
    assert pages_until_told(lambda number: "nothing" if number % 2 else f"day {number}", most=20_000) is None
    assert pages_until_told(lambda number: "nothing" if number % 7 == 4 else f"day {number}", most=20_000) is None


def test_a_circle_in_which_a_page_comes_twice_is_found() -> None:
    for circle in ("abac", "abcabd", "aabb"[1:] + "cacdc"):
        assert pages_until_told(lambda number, circle=circle: circle[number % len(circle)]) is not None  # type: ignore[misc]


def test_pages_that_repeat_can_be_allowed_and_cursors_that_go_back_cannot() -> None:
    history = PageHistory(repeats_allowed=True)
    for number in range(100):
        history.add("page", f"cursor {number}", 5, "the same")
    with pytest.raises(NoProgressError, match="36 pages ago"):
        history.add("page", "cursor 64", 5, "the same")


def test_pages_without_records_are_no_repetition_but_have_an_end() -> None:
    history = PageHistory()
    for number in range(MAX_EMPTY_PAGES - 1):
        history.add("page", f"cursor {number}", 0, "")
    history.add("page", "cursor with records", 5, "a")
    for number in range(MAX_EMPTY_PAGES - 1):
        history.add("page", f"other cursor {number}", 0, "")
    with pytest.raises(NoProgressError, match="10000 pages in a row had no record"):
        history.add("the page at cursor 'x'", "x", 0, "")


@pytest.mark.parametrize("state", ["", "nonsense", "1.2.3", "x" * 112, PageHistory().state() + "."])
def test_a_state_of_another_version_is_a_new_beginning(state: str) -> None:
    assert PageHistory(state).state() == PageHistory().state()


VALUES = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3)
ROWS = st.lists(st.dictionaries(st.sampled_from("xyz"), VALUES | st.lists(VALUES, max_size=2)), max_size=12)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return table_from_records([{name: value for name, value in row.items() if value != "\ud800"} for row in rows])


@given(ROWS, ROWS)
def test_the_digest_is_that_of_the_rows(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> None:
    assert table_digest(table(one)) == table_digest(table([dict(row) for row in one]))
    same = table(one).equals(table(other))
    assert (table_digest(table(one)) == table_digest(table(other))) == same


PAGES = {"http": {"pageSize": 5, "pagination": {"page": {}}}}


def clamp(last: int, size: int = 5) -> Callable[[Request], Reply]:
    """A source of `last` pages that sends the last one for every number beyond it."""

    def answer(request: Request) -> Reply:
        number = min(int(request.params["page"]), last)
        # What is said about the page changes with each request; its records do not.
        return page({"page": request.params["page"], "rows": [{"id": size * number + n} for n in range(size)]})

    return answer


def config(site: Site, way: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    return {"http": {"url": site.url, "records": "rows", "pageSize": 5, "pagination": way or {"page": {}}, **more}}


def assert_no_progress(answer: Answer, *words: str) -> None:
    assert answer.code == 65, answer
    assert answer.result is not None
    assert answer.result.reason == NO_PROGRESS
    for word in words:
        assert word in answer.message


def chain_until_told(bench: Bench, source: dict[str, Any], limit: int, most: int = 60) -> tuple[list[int], Answer]:
    """The ids that a chain hands on before it fails, and how it does."""
    ids: list[int] = []
    told: dict[str, Any] = {"cursor": ""}
    for batch in range(most):
        answer = bench.run("fetch", source, batch=batch, limit=limit, **told)
        if answer.code:
            return ids, answer
        assert answer.result is not None
        ids += [row["id"] for row in bench.rows(batch=batch)]
        told = {"cursor": answer.result.next_cursor, "state": answer.result.state}
    raise AssertionError(f"no end after {most} batches: {ids}")


@pytest.mark.parametrize("limit", [3, 4, 5, 7, 10, 12, 100])
def test_a_source_that_sends_its_last_page_for_ever(bench: Bench, site: Site, limit: int) -> None:
    """A page counts the same whether the one before it is of its batch or of another."""
    site.answer = clamp(3)
    ids, answer = chain_until_told(bench, config(site), limit)
    assert_no_progress(answer, "page 4 has the same 5 records as the page before it", "allowRepeatedPages")
    assert len(set(ids)) == len(ids), "no record was handed on twice"
    assert len(site.requests) <= 4 + 3 * 5 // limit + 1


def test_a_last_page_of_one_record(bench: Bench, site: Site) -> None:
    site.answer = clamp(2, size=1)
    _, answer = chain_until_told(bench, config(site), 1)
    assert_no_progress(answer, "page 3 has the same record as the page before it, word for word")


def test_a_partition_has_an_end_too(bench: Bench, site: Site) -> None:
    site.answer = clamp(3)
    source = config(site, params={"day": "{partition}"})
    assert_no_progress(bench.run("fetch", source, partitions=3, cursor="monday"), "page 4 has the same 5 records")


def test_a_page_that_is_asked_for_again_is_no_repetition(bench: Bench, site: Site) -> None:
    """A batch ends within a page, an attempt is tried again: the same page comes twice, and that is right."""
    site.answer = lambda request: page(
        {"rows": [{"id": 1}, {"id": 2}, {"id": 3}] if request.params["page"] == "1" else []}
    )
    first = bench.run("fetch", config(site), limit=2)
    assert first.result is not None
    told: dict[str, Any] = {"cursor": first.result.next_cursor, "state": first.result.state}
    for attempt in range(3):
        assert bench.run("fetch", config(site), batch=1, attempt=attempt, limit=2, **told).code == 0
        assert bench.rows(batch=1, attempt=attempt) == [{"id": 3}]


def test_pages_that_may_look_the_same(bench: Bench, site: Site) -> None:
    site.answer = lambda request: page({"rows": [{"wet": 0}] * 5 if int(request.params["page"]) < 9 else []})
    assert_no_progress(bench.run("fetch", config(site), limit=1000), "page 2 ")
    answer = bench.run("fetch", config(site, allowRepeatedPages=True), limit=1000)
    assert answer.result is not None
    assert (answer.code, answer.result.read, answer.result.exhausted) == (0, 40, True)


@pytest.mark.parametrize("limit", [3, 10, 1000])
def test_a_source_that_begins_again_after_its_end(bench: Bench, site: Site, limit: int) -> None:
    """Its pages are numbered without end: 1, 2, 3 and 1 again."""
    site.answer = lambda request: page({"rows": [{"id": int(request.params["page"]) % 3 * 5 + n} for n in range(5)]})
    _, answer = chain_until_told(bench, config(site), limit)
    assert_no_progress(answer, "the last 3 pages have the same records as the 3 before them")
    assert len(site.requests) <= 30 + 100 // limit


def circle(length: int, *, rows: int, at: Callable[[Request], str | None]) -> Callable[[Request], Reply]:
    """A source whose cursors, or links, lead from page 0 to `length` and from there to 1; its records are all new."""
    sent = iter(range(10**9))

    def answer(request: Request) -> Reply:
        number = int(at(request) or 0)
        following = number + 1 if number < length else 1
        body = {"rows": [{"id": next(sent)} for _ in range(rows)], "next": str(following)}
        return page(body, link=f'</x?at={following}>; rel="next"')

    return answer


@pytest.mark.parametrize("limit", [4, 10, 1000])
@pytest.mark.parametrize("rows", [5, 0])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_cursors_in_a_circle(bench: Bench, site: Site, length: int, rows: int, limit: int) -> None:
    site.answer = circle(length, rows=rows, at=lambda request: request.params.get("cursor"))
    _, answer = chain_until_told(bench, config(site, {"cursor": {"path": "next"}}), limit)
    assert_no_progress(answer, "would never end")
    assert len({request.params.get("cursor") for request in site.requests}) <= length + 1


@pytest.mark.parametrize("length", [1, 3])
def test_links_in_a_circle(bench: Bench, site: Site, length: int) -> None:
    site.answer = circle(length, rows=5, at=lambda request: request.params.get("at"))
    _, answer = chain_until_told(bench, config(site, {"link": {}}), 5)
    assert_no_progress(answer, "would never end")


def test_a_total_that_never_comes(bench: Bench, site: Site) -> None:
    def answer(request: Request) -> Reply:
        start = min(int(request.params["offset"]), 10)
        return page({"rows": [{"id": start + n} for n in range(5)], "total": int(request.params["offset"]) + 100})

    site.answer = answer
    source = config(site, {"offset": {"totalPath": "total"}})
    ids, answer_ = chain_until_told(bench, source, 5)
    assert_no_progress(answer_, "offset 15 has the same 5 records as the page before it")
    assert ids == list(range(15))
