"""A list of partitions in a file of the workspace: one a line, for lists that are too long for the run itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ingestrun.model.contract import ENV_CURSOR, PARTITION_MAX_BYTES
from ingestrun.worker.context import Context
from ingestrun.worker.errors import PermanentError

_BLOCK: Final = 2**20
_BOM: Final = b"\xef\xbb\xbf"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def partition_of(context: Context, path: Path) -> str:
    """The partition of this batch: the line with its number, from 0.

    Each fetch reads the whole list, and the part before its line twice, in constant memory: below 0.1 s for a
    million lines. So a list whose length changed amid the run is noticed, and no partition is read under two numbers.

    Raises:
        PermanentError: the list is missing, is not as long as the run says, or has no line fit for this batch.
    """
    if not context.cursor.isdecimal():
        raise PermanentError(f"{ENV_CURSOR} is {context.cursor[:40]!r}, not the number of a line")
    shown = str(path.relative_to(context.workspace)) if path.is_relative_to(context.workspace) else str(path)
    try:
        return _partition(path, shown, int(context.cursor), context.partitions)
    except FileNotFoundError:
        raise PermanentError(f"{shown}, the list of partitions, is not in the workspace: put it there first") from None
    except (IsADirectoryError, NotADirectoryError):
        raise PermanentError(f"{shown}, the list of partitions, is no file") from None
    except PermissionError:
        raise PermanentError(f"{shown} may not be read: check its mode and the pod's fsGroup") from None


def _partition(path: Path, shown: str, index: int, count: int | None) -> str:
    own, total = None, 0
    for number, block in _blocks(path, shown):
        total = number + block.count(b"\n") + 1
        if number <= index < total:
            own = _line(block.split(b"\n")[index - number])
    if own is None or total != count:
        raise PermanentError(
            f"{shown} has {total} lines, and batches.partitions.count is {count}: they must agree, and the list must "
            "not change while the run goes on"
        )
    value = _text(own, shown, index)
    first = _first(path, shown, own)
    if first != index:
        raise PermanentError(f"{shown}: line {index + 1} is the same as line {first + 1} ({value[:80]!r}): remove one")
    return value


def _text(line: bytes, shown: str, index: int) -> str:
    if len(line) > PARTITION_MAX_BYTES:
        raise _too_long(shown, index)
    try:
        value = line.decode()
    except UnicodeDecodeError:
        raise PermanentError(f"{shown}: line {index + 1} is not UTF-8") from None
    if not value.strip():
        raise PermanentError(f"{shown}: line {index + 1} is empty")
    if _CONTROL.search(value):
        raise PermanentError(f"{shown}: line {index + 1} has a control character in it")
    return value


def _first(path: Path, shown: str, own: bytes) -> int:
    """The number of the first line that says the same as `own`, which is one of them."""
    for number, block in _blocks(path, shown):
        if own in block:
            for at, line in enumerate(block.split(b"\n")):
                if _line(line) == own:
                    return number + at
    raise PermanentError(f"{shown} changed while it was read: it must stay as it is while the run goes on")


def _line(line: bytes) -> bytes:
    """A line that ends in CR LF is one that ends in LF."""
    return line.removesuffix(b"\r")


def _blocks(path: Path, shown: str) -> Iterator[tuple[int, bytes]]:
    """Whole lines, a MiB or so at a time: the number of the first, and all without the last one's end."""
    with path.open("rb", buffering=0) as handle:
        number, rest = 0, b""
        while chunk := handle.read(_BLOCK):
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            if not end and len(rest) > PARTITION_MAX_BYTES + len(_BOM):
                raise _too_long(shown, number)
            if end:
                yield number, whole if number else whole.removeprefix(_BOM)
                number += whole.count(b"\n") + 1
        if rest:
            yield number, rest if number else rest.removeprefix(_BOM)


def _too_long(shown: str, number: int) -> PermanentError:
    return PermanentError(f"{shown}: line {number + 1} is longer than {PARTITION_MAX_BYTES} bytes")
