"""Durations as kubectl reads and writes them."""

from __future__ import annotations

from datetime import timedelta

import pytest

from ingestrun.cli.durations import human_duration, parse_duration
from ingestrun.cli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "seconds"), [("10m", 600), ("90s", 90), ("1h30m", 5400), ("2d", 172_800), ("1.5h", 5400), ("500ms", 0.5)]
)
def test_a_duration_is_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == timedelta(seconds=seconds)


@pytest.mark.parametrize("text", ["", "10", "m", "10 m", "-5m", "10m!", "1w"])
def test_what_has_no_unit_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="with a unit"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (150, "2m30s"),
        (599, "9m59s"),
        (600, "10m"),
        (3 * 3600 - 1, "179m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 60, "3h1m"),
        (8 * 3600, "8h"),
        (47 * 3600, "47h"),
        (48 * 3600, "2d"),
        (49 * 3600, "2d1h"),
        (8 * 86_400, "8d"),
        (400 * 86_400, "400d"),
        (740 * 86_400, "2y10d"),
        (9 * 365 * 86_400, "9y"),
    ],
)
def test_a_duration_is_written_as_in_kubectls_age_column(seconds: int, text: str) -> None:
    assert human_duration(timedelta(seconds=seconds)) == text
