"""Kubernetes' times: what the API server writes is read, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ingestrun.model.times import human_duration, parse_time

AT = datetime(2026, 11, 23, 3, 4, 5, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-11-23T03:04:05Z", AT),
        ("2026-11-23T03:04:05.123456Z", AT + timedelta(microseconds=123_456)),
        ("2026-11-23T03:04:05.5Z", AT + timedelta(milliseconds=500)),
        ("2026-11-23T03:04:05.123456789Z", AT + timedelta(microseconds=123_456)),
        ("2026-11-23T05:04:05+02:00", AT),
    ],
    ids=["seconds", "microseconds", "short fraction", "nanoseconds", "another zone"],
)
def test_a_time_is_read(text: str, time: datetime) -> None:
    assert parse_time(text) == time
    assert parse_time(text).tzinfo is not None


@pytest.mark.parametrize("text", ["", "yesterday", "2026-11-23T03:04:05", "2026-11-23", "2026-11-23T25:04:05Z"])
def test_another_text_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"time|isoformat|hour"):
        parse_time(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-5, "0s"),
        (0, "0s"),
        (119, "119s"),
        (120, "2m"),
        (125, "2m5s"),
        (10 * 60 + 59, "10m"),
        (179 * 60, "179m"),
        (3 * 3600, "3h"),
        (3 * 3600 + 12 * 60, "3h12m"),
        (8 * 3600 + 59 * 60, "8h"),
        (48 * 3600 - 1, "47h"),
        (51 * 3600, "2d3h"),
        (8 * 86_400, "8d"),
        (365 * 86_400, "365d"),
        (2 * 365 * 86_400 + 34 * 86_400, "2y34d"),
        (3000 * 86_400, "8y"),
    ],
)
def test_a_duration_is_written_as_kubectl_writes_it(seconds: int, text: str) -> None:
    """The pairs are those of apimachinery's `duration.HumanDuration`."""
    assert human_duration(timedelta(seconds=seconds)) == text
