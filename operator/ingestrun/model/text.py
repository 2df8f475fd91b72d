"""Shortening texts for fields that have a limit, and counts in sentences."""

from __future__ import annotations

from typing import Final

_ELLIPSIS: Final = "…"


def truncate(text: str, limit: int) -> str:
    """Return the text or, if it is longer than `limit` characters, its beginning with "…", `limit` in all."""
    if len(text) <= limit:
        return text
    return text[: limit - 1] + _ELLIPSIS if limit > 0 else ""


def truncate_bytes(text: str, limit: int) -> str:
    """Return the text or, if its UTF-8 is longer than `limit` bytes, its beginning with "…", at most `limit` in all.

    A limit with no room for a character before the "…" leaves nothing.
    """
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    beginning = encoded[: max(0, limit - len(_ELLIPSIS.encode()))].decode(errors="ignore")
    return beginning + _ELLIPSIS if beginning else ""


def pluralize(number: int, one: str, many: str | None = None) -> str:
    """Return the number with the noun that fits it; `many` is by default `one` with an s."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"
