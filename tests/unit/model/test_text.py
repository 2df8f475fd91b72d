"""Texts are cut to their limit, in characters or in bytes, and the cut is marked."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.text import truncate, truncate_bytes


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("", 0, ""),
        ("abc", 4, "abc"),
        ("abc", 3, "abc"),
        ("abcd", 3, "ab…"),
        ("größer", 3, "gr…"),
        ("abcd", 1, "…"),
        ("abcd", 0, ""),
        ("abcd", -1, ""),
    ],
)
def test_a_text_is_cut_to_characters(text: str, limit: int, expected: str) -> None:
    assert truncate(text, limit) == expected


@pytest.mark.parametrize(
    ("text", "limit", "expected"),
    [
        ("", 0, ""),
        ("größer", 8, "größer"),
        ("größer", 7, "grö…"),
        ("größer", 6, "gr…"),  # half of the ö would be no text
        ("größer", 4, "g…"),
        ("größer", 3, ""),
        ("ölig", 4, ""),  # half of the ö again, and nothing before it
        ("größer", -1, ""),
    ],
)
def test_a_text_is_cut_to_bytes(text: str, limit: int, expected: str) -> None:
    assert truncate_bytes(text, limit) == expected


@given(text=st.text(), limit=st.integers(min_value=0, max_value=40))
def test_no_text_is_longer_than_its_limit_and_a_short_one_is_as_it_was(text: str, limit: int) -> None:
    by_characters, by_bytes = truncate(text, limit), truncate_bytes(text, limit)
    assert len(by_characters) <= limit
    assert len(by_bytes.encode()) <= limit
    assert text.startswith(by_characters.removesuffix("…"))
    assert text.startswith(by_bytes.removesuffix("…"))
    if len(text) <= limit:
        assert by_characters == text
    if len(text.encode()) <= limit:
        assert by_bytes == text
