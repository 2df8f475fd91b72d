"""Shortening texts for fields that have a limit."""

from __future__ import annotations

from typing import Final

_ELLIPSIS: Final = "…"


def truncate(text: str, limit: int) -> str:
    """Return the text, or where it is longer than `limit` characters its beginning with "…", `limit` in all."""
    if len(text) <= limit:
        return text
    return text[: limit - 1] + _ELLIPSIS if limit > 0 else ""


def truncate_bytes(text: str, limit: int) -> str:
    """Return the text, or where its UTF-8 is longer than `limit` bytes its beginning with "…", at most `limit` in all.

    A limit with no room for a character before the "…" leaves nothing.
    """
    encoded = text.encode()
    if len(encoded) <= limit:
        return text
    beginning = encoded[: max(0, limit - len(_ELLIPSIS.encode()))].decode(errors="ignore")
    return beginning + _ELLIPSIS if beginning else ""
