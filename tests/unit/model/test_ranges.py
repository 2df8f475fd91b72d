"""Index ranges against Python's own sets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.ranges import IndexRanges

INDEXES = st.sets(st.integers(0, 60), max_size=40) | st.sets(st.integers(0, 2_000_000), max_size=40)


@given(INDEXES)
def test_is_the_set_of_its_indexes(indexes: set[int]) -> None:
    ranges = IndexRanges(indexes)

    assert list(ranges) == sorted(indexes)
    assert len(ranges) == len(indexes)
    assert bool(ranges) == bool(indexes)
    assert all((index in ranges) == (index in indexes) for index in range(62))
    assert all(index in ranges for index in indexes)


@given(INDEXES, INDEXES)
def test_union_and_difference(left: set[int], right: set[int]) -> None:
    assert set(IndexRanges(left) | IndexRanges(right)) == left | right
    assert set(IndexRanges(left) - IndexRanges(right)) == left - right


@given(INDEXES, INDEXES)
def test_one_set_has_one_form(left: set[int], right: set[int]) -> None:
    """Equality, hash and text depend on the set alone, not on how it came about."""
    made = (IndexRanges(left) - IndexRanges(right)) | IndexRanges(left & right)

    assert made == IndexRanges(left)
    assert hash(made) == hash(IndexRanges(left))
    assert str(made) == str(IndexRanges(left))
    assert (IndexRanges(left) == IndexRanges(right)) == (left == right)


@given(INDEXES)
def test_text_round_trip(indexes: set[int]) -> None:
    ranges = IndexRanges(indexes)

    assert IndexRanges.parse(str(ranges)) == ranges
    assert str(IndexRanges.parse(str(ranges))) == str(ranges)


@given(INDEXES)
def test_first_gap(indexes: set[int]) -> None:
    assert IndexRanges(indexes).first_gap == next(n for n in range(len(indexes) + 1) if n not in indexes)


@given(st.integers(0, 50), st.integers(-2, 50))
def test_span(first: int, last: int) -> None:
    assert set(IndexRanges.span(first, last)) == set(range(first, last + 1))


def test_size_does_not_grow_with_the_number_of_indexes() -> None:
    million = IndexRanges.span(0, 999_999)

    assert str(million) == "0-999999"
    assert str(million - IndexRanges([42])) == "0-41,43-999999"
    assert len(million) == 1_000_000


@pytest.mark.parametrize(
    ("text", "indexes"),
    [
        ("", []),
        ("0", [0]),
        ("0-0", [0]),
        ("0-2,4", [0, 1, 2, 4]),
        ("0-1,2-3", [0, 1, 2, 3]),
        ("007", [7]),
    ],
)
def test_parse(text: str, indexes: list[int]) -> None:
    assert list(IndexRanges.parse(text)) == indexes


@pytest.mark.parametrize(
    "text",
    [
        *["-1", "1-", "1,", ",1", "a", "1-2-3", "2-1", "1,1", "1-3,2", "3,1", "1,,2", "0x1", "1.5", "²", "∞"],
        "1 ",
        " 1",
        "1\n",
        "٣",
    ],
)
def test_parse_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="index ranges"):
        IndexRanges.parse(text)


@given(st.text(alphabet="0123456789-, ", max_size=12))
def test_parse_takes_only_what_is_ascending(text: str) -> None:
    """Whatever it takes, it takes whole: no part is dropped, no index comes up twice."""
    try:
        parsed = IndexRanges.parse(text)
    except ValueError:
        return
    mentioned = [int(part) for piece in text.split(",") if piece for part in piece.split("-")]
    assert mentioned == sorted(mentioned)
    assert all(index in parsed for index in mentioned)


def test_an_error_shows_only_the_beginning_of_a_long_text() -> None:
    with pytest.raises(ValueError, match="ranges") as caught:
        IndexRanges.parse("x" * 10_000)

    assert len(str(caught.value)) < 200
