"""Durations as kubectl reads and writes them."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

from ingestrun.cli.errors import UsageError

_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|[smhd])")
_SECONDS: Final = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_duration(text: str) -> timedelta:
    """Read "10m", "1h30m" or "2d". A unit is required, because "10" may be seconds to one and minutes to another.

    Raises:
        UsageError: it is no duration.
    """
    parts = _PART.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise UsageError(f'invalid duration "{text}": give a number with a unit, such as 90s, 10m or 1h30m')
    return timedelta(seconds=sum(float(number) * _SECONDS[unit] for number, unit in parts))


def human_duration(duration: timedelta) -> str:
    """Write a duration as kubectl's AGE column does: two units at most, the second only where it still matters."""
    seconds = max(0, int(duration.total_seconds()))
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if seconds < 120:
        return f"{seconds}s"
    if minutes < 10:
        return _two(minutes, "m", seconds % 60, "s")
    if minutes < 180:
        return f"{minutes}m"
    if hours < 8:
        return _two(hours, "h", minutes % 60, "m")
    if hours < 48:
        return f"{hours}h"
    if days < 8:
        return _two(days, "d", hours % 24, "h")
    if days < 365 * 2:
        return f"{days}d"
    return _two(days // 365, "y", days % 365, "d") if days < 365 * 8 else f"{days // 365}y"


def _two(major: int, unit: str, minor: int, lesser: str) -> str:
    return f"{major}{unit}{minor}{lesser}" if minor else f"{major}{unit}"
