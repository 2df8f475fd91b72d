"""Quantities: held against the client library's own reading."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kubernetes.utils.quantity import parse_quantity as theirs

from ingestrun.model.quantity import QuantityError, parse_quantity, read_bytes, render_bytes

SUFFIXES = ("Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "n", "u", "m", "", "k", "M", "G", "T", "P", "E")
NUMBERS = st.integers(0, 10**9).map(str) | st.decimals(0, 10**6, places=3).map(str)
POWERS = st.sampled_from(["e", "E"]).flatmap(lambda e: st.integers(-9, 9).map(lambda n: f"{e}{n}"))


@given(sign=st.sampled_from(["", "+", "-"]), number=NUMBERS, suffix=st.sampled_from(SUFFIXES) | POWERS)
def test_the_same_as_the_client_library(sign: str, number: str, suffix: str) -> None:
    text = f"{sign}{number}{suffix}"
    assert parse_quantity(text) == theirs(text)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("text", "number"),
    [("512Mi", 512 * 2**20), ("1.5Gi", 1.5 * 2**30), ("2G", 2 * 10**9), (1024, 1024), ("1e3", 1000), ("1E", 10**18),
     ("1E3", 1000), (".5k", 500), ("5.", 5), ("128974848000m", 128974848)],
)  # fmt: skip
def test_forms(text: str | int, number: float) -> None:
    assert parse_quantity(text) == Decimal(number)


@pytest.mark.parametrize(
    "text", ["", " 1Gi", "1Gi ", "1 Gi", "1KI", "1ki", "1K", "1mi", "Gi", "1GiB", "1e", "1e1.5", "1e3Mi", "0x10", "NaN",
             "inf", "1_000", "\u0661Mi", "--1", "1e9999999"]
)  # fmt: skip
def test_what_is_none(text: str) -> None:
    with pytest.raises(QuantityError):
        parse_quantity(text)


def test_a_part_of_a_byte_is_a_byte() -> None:
    assert read_bytes("1500m") == 2
    assert read_bytes("1Ki") == 1024


@given(st.integers(0, 2**62))
def test_what_is_rendered_is_read_the_same(number: int) -> None:
    assert read_bytes(render_bytes(number)) == number


def test_rendered_for_people() -> None:
    assert [render_bytes(n) for n in (512 * 2**20, 2**30, 3 * 2**29, 10**9, 1025)] == [
        "512Mi",
        "1Gi",
        "1536Mi",
        "1000000000",
        "1025",
    ]
