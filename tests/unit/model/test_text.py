"""Texts are cut to their limit, in characters or in bytes, and the cut is marked. Counts have the noun that fits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.text import pluralize, truncate, truncate_bytes


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


@pytest.mark.parametrize(
    ("number", "words", "expected"),
    [
        (0, ["record"], "0 records"),
        (1, ["record"], "1 record"),
        (2, ["record"], "2 records"),
        (1, ["batch", "batches"], "1 batch"),
        (0, ["batch", "batches"], "0 batches"),
        (-1, ["row"], "-1 rows"),
    ],
)
def test_a_number_has_the_noun_that_fits(number: int, words: list[str], expected: str) -> None:
    assert pluralize(number, *words) == expected


COUNTED = re.compile(
    r"\{(?!pluralize)(?![A-Z_]+\})[^{}]*\} (?:records|rows|batches|Jobs|pods|runs|lines|files|pages)\b"
)
PACKAGE = Path(__file__).parents[3] / "operator" / "ingestrun"


def test_no_sentence_puts_a_plural_behind_a_number_of_its_own() -> None:
    """A constant (in capitals) is never one, and "3 of 1 rows" counts what it is of."""
    found = [
        f"{path.relative_to(PACKAGE)}: {match[0]}"
        for path in PACKAGE.rglob("*.py")
        for match in COUNTED.finditer(path.read_text())
    ]
    assert found == []
