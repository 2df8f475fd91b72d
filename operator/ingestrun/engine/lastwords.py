"""The last words of a failed container, made fit to be shown: bounded, one text without control characters."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Final

from ingestrun.model.contract import ResultError, parse_result

LOG_BYTES: Final = 350
"""How much of a log is kept: as JSON in UTF-8, so that the status keeps its size whatever the script."""

_ESCAPE: Final = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")
"""Terminal sequences (ECMA-48): colours, cursor movements, titles."""


def clean(text: str) -> str:
    """The text without terminal sequences, control and format characters; newlines stay, tabs become blanks."""
    text = _ESCAPE.sub("", text).replace("\r\n", "\n").replace("\t", " ")
    return "".join(char for char in text if char == "\n" or unicodedata.category(char) not in ("Cc", "Cf", "Cs"))


def last_lines(message: str | None) -> str | None:
    """The end of a log that stands in a termination message; None where a result stands there, or nothing.

    The kubelet puts it there (FallbackToLogsOnError: the last 2048 bytes or 80 lines) when a container fails
    and has left nothing itself.
    """
    if not message or _is_result(message):
        return None
    lines = [line.rstrip() for line in clean(message).split("\n")]
    text = "\n".join(lines).strip("\n")
    while _size(text) > LOG_BYTES:
        # A whole line where there are several, else the line's beginning.
        head, newline, rest = text.partition("\n")
        text = rest if newline else "…" + _end_of(head, LOG_BYTES - len("…".encode()))
    return text or None


def last_line(message: str, *, chars: int) -> str:
    """The last line with something in it, cut at its beginning."""
    lines = [" ".join(line.split()) for line in clean(message).split("\n")]
    line = next((line for line in reversed(lines) if line), "")
    return line if len(line) <= chars else "…" + line[1 - chars :]


def _is_result(message: str) -> bool:
    try:
        parse_result(message)
    except ResultError:
        return False
    return True


def _size(text: str) -> int:
    return len(json.dumps(text, ensure_ascii=False).encode()) - 2


def _end_of(line: str, size: int) -> str:
    kept = line[-size:]
    while _size(kept) > size:
        kept = kept[1:]
    return kept
