"""Kubernetes' times: what the API server writes is read, in UTC."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from ingestrun.model.times import parse_time

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
