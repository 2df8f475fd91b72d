"""Kubernetes' times as text: metav1.Time in whole seconds, metav1.MicroTime with a fraction, both in RFC 3339."""

from __future__ import annotations

from datetime import datetime


def parse_time(text: str) -> datetime:
    """Read "2026-11-23T03:04:05Z" or "2026-11-23T03:04:05.123456Z".

    Raises:
        ValueError: it is no time, or has no zone and so could be compared with no other.
    """
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return time
