"""Kubernetes' times as text: metav1.Time in whole seconds, metav1.MicroTime with a fraction, both in RFC 3339."""

from __future__ import annotations

from datetime import datetime, timedelta


def parse_time(text: str) -> datetime:
    """Read "2026-11-23T03:04:05Z" or "2026-11-23T03:04:05.123456Z".

    Raises:
        ValueError: it is no time, or has no zone and so could be compared with no other.
    """
    time = datetime.fromisoformat(text)
    if time.tzinfo is None:
        raise ValueError(f"{text!r} has no time zone")
    return time


def human_duration(duration: timedelta) -> str:
    """Write a duration as kubectl writes ages and durations: "43s", "2m5s", "17m", "3h12m", "2d3h", "12d", "1y34d"."""
    seconds = max(0, int(duration.total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if minutes < 2:
        return f"{seconds}s"
    if minutes < 10:
        return f"{minutes}m{_rest(seconds % 60, 's')}"
    if hours < 3:
        return f"{minutes}m"
    if hours < 8:
        return f"{hours}h{_rest(minutes % 60, 'm')}"
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return f"{days}d{_rest(hours % 24, 'h')}"
    if days < 2 * 365:
        return f"{days}d"
    if days < 8 * 365:
        return f"{days // 365}y{_rest(days % 365, 'd')}"
    return f"{days // 365}y"


def _rest(number: int, unit: str) -> str:
    return f"{number}{unit}" if number else ""
