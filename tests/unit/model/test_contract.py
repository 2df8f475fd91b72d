"""The container contract: what counts as a result, and what a container is told about one that does not."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from ingestrun.model.contract import (
    CURSOR_MAX_CHARS,
    RESULT_MAX_BYTES,
    Outcome,
    ResultError,
    StageResult,
    parse_result,
    render_result,
)


def result(**changes: Any) -> str:
    return json.dumps({"v": "v1", "outcome": "done", "read": 3, "written": 2, "rejected": 1} | changes)


def test_a_full_result() -> None:
    text = result(nextCursor="c-2", exhausted=True, manifest="out/1.parquet", message="fine")

    parsed = parse_result(text)

    assert parsed.outcome is Outcome.DONE
    assert (parsed.read, parsed.written, parsed.rejected) == (3, 2, 1)
    assert (parsed.next_cursor, parsed.exhausted) == ("c-2", True)
    assert (parsed.manifest, parsed.message) == ("out/1.parquet", "fine")


def test_what_may_be_left_out() -> None:
    parsed = parse_result('{"v":"v1","outcome":"failed"}')

    assert parsed == StageResult(v="v1", outcome=Outcome.FAILED)
    assert (parsed.read, parsed.written, parsed.rejected, parsed.exhausted) == (0, 0, 0, False)
    assert parsed.next_cursor is None


def test_unknown_fields_are_for_a_later_version() -> None:
    assert parse_result(result(colour="blue")).read == 3


def test_blanks_around_it_do_no_harm() -> None:
    assert parse_result(f"\n {result()} \n").read == 3


@pytest.mark.parametrize(
    "text",
    [
        None,
        "",
        " \n\t ",
    ],
)
def test_nothing_is_no_result(text: str | None) -> None:
    with pytest.raises(ResultError, match="left no result"):
        parse_result(text)


@pytest.mark.parametrize(
    "text",
    [
        "done",
        "Traceback (most recent call last):",
        "{",
        result()[:-1],
        result() + result(),
        "[]",
        "null",
        "true",
        '"done"',
        "{}",
        "\x00",
        "\ufeff" + result(),
    ],
)
def test_garbage_is_no_result(text: str) -> None:
    with pytest.raises(ResultError, match="not valid under contract v1"):
        parse_result(text)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"v": "v2"}, "v"),
        ({"v": 1}, "v"),
        ({"v": None}, "v"),
        ({"outcome": "ok"}, "outcome"),
        ({"outcome": "Done"}, "outcome"),
        ({"outcome": None}, "outcome"),
        ({"read": -1}, "read"),
        ({"read": 1.5}, "read"),
        ({"read": 1e300}, "read"),
        ({"read": "3"}, "read"),
        ({"read": True}, "read"),
        ({"read": None}, "read"),
        ({"read": 2**53 + 1}, "read"),
        ({"rejected": 10**200}, "rejected"),
        ({"exhausted": "true"}, "exhausted"),
        ({"exhausted": 1}, "exhausted"),
        ({"nextCursor": 7}, "nextCursor"),
        ({"nextCursor": "x" * (CURSOR_MAX_CHARS + 1)}, "nextCursor"),
        ({"nextCursor": "a\nb"}, "nextCursor"),
        ({"nextCursor": "a\n"}, "nextCursor"),
        ({"nextCursor": "\x00"}, "nextCursor"),
        ({"nextCursor": "a\x7f"}, "nextCursor"),
        ({"nextCursor": "\x1b[31m"}, "nextCursor"),
        ({"sourceDigest": "x" * 65}, "sourceDigest"),
        ({"sourceDigest": ""}, "sourceDigest"),
        ({"sourceDigest": "a b"}, "sourceDigest"),
        ({"state": "x" * 113}, "state"),
        ({"state": "ü"}, "state"),
        ({"reason": "x" * 65}, "reason"),
        ({"manifest": "x" * 257}, "manifest"),
        ({"message": "x" * 513}, "message"),
    ],
)
def test_a_wrong_field_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(ResultError, match=f": {field}: "):
        parse_result(result(**change))


@pytest.mark.parametrize("missing", ["v", "outcome"])
def test_a_missing_field_is_named(missing: str) -> None:
    told = json.loads(result())
    del told[missing]

    with pytest.raises(ResultError, match=f": {missing}: "):
        parse_result(json.dumps(told))


def test_cursors_are_data() -> None:
    for cursor in ("", "x" * CURSOR_MAX_CHARS, 'a"b\\c', "größer 🙂", "$(HOME)", "2026-11-01T00:00:00Z", "\u2028"):
        assert parse_result(result(nextCursor=cursor)).next_cursor == cursor


def test_one_kibibyte_and_not_a_byte_more() -> None:
    def padded(size: int) -> str:
        text = result()
        return text + " " * (size - len(text))

    assert parse_result(padded(RESULT_MAX_BYTES)).read == 3
    with pytest.raises(ResultError, match="1025 bytes, at most 1024"):
        parse_result(padded(RESULT_MAX_BYTES + 1))


def test_bytes_count_not_characters() -> None:
    with pytest.raises(ResultError, match="bytes, at most 1024"):
        parse_result(json.dumps(json.loads(result(message="ü" * 500)), ensure_ascii=False))


def test_an_error_is_short_and_does_not_repeat_the_input() -> None:
    with pytest.raises(ResultError) as caught:
        parse_result(result(nextCursor="secret\n" * 50))

    assert "secret" not in str(caught.value)
    assert len(str(caught.value)) < 300


COUNTS = st.integers(0, 2**53)
RESULTS = st.builds(
    StageResult,
    v=st.just("v1"),
    outcome=st.sampled_from(Outcome),
    read=COUNTS,
    written=COUNTS,
    rejected=COUNTS,
    next_cursor=st.none() | st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), max_size=100),
    exhausted=st.booleans(),
    manifest=st.none() | st.text(st.characters(codec="ascii", min_codepoint=32), max_size=100),
    message=st.none() | st.text(st.characters(codec="utf-8"), max_size=512),
)


@given(RESULTS)
def test_what_is_rendered_is_read_the_same_but_for_a_message_that_is_too_long(given_result: StageResult) -> None:
    read = parse_result(render_result(given_result))

    assert read.model_copy(update={"message": None}) == given_result.model_copy(update={"message": None})
    if read.message != given_result.message:
        assert given_result.message is not None
        assert read.message is None or given_result.message.startswith(read.message.removesuffix("…"))


def test_a_short_message_is_kept_whole() -> None:
    given_result = StageResult(v="v1", outcome=Outcome.FAILED, message="no such table: naïve")

    assert parse_result(render_result(given_result)).message == "no such table: naïve"


@pytest.mark.parametrize("letter", ["x", "ü", "🙂", '"', "\n", "\x01"])
def test_a_long_message_is_cut_and_the_counts_are_not(letter: str) -> None:
    given_result = StageResult(
        v="v1",
        outcome=Outcome.DONE,
        read=2**53,
        written=2**53,
        next_cursor="c" * 400,
        manifest="m" * 256,
        message=letter * 512,
    )

    text = render_result(given_result)

    assert len(text.encode()) <= RESULT_MAX_BYTES
    assert parse_result(text).written == 2**53
    assert parse_result(text).next_cursor == "c" * 400


@pytest.mark.parametrize("letter", ["ü", "🙂", '"'])
def test_a_cursor_and_manifest_too_long_for_one_kibibyte_are_never_cut(letter: str) -> None:
    """They are data: the reader refuses such a result, it is not repaired in silence."""
    given_result = StageResult(
        v="v1", outcome=Outcome.DONE, next_cursor=letter * CURSOR_MAX_CHARS, manifest=letter * 256, message="hello"
    )

    with pytest.raises(ResultError, match="at most 1024"):
        parse_result(render_result(given_result))


def test_a_worker_cannot_make_a_result_that_the_operator_would_refuse() -> None:
    with pytest.raises(ValidationError):
        StageResult(v="v1", outcome=Outcome.DONE, read=-1)
    with pytest.raises(ValidationError):
        StageResult(v="v1", outcome=Outcome.DONE, next_cursor="a\nb")
