"""A list of partitions in a file of the workspace: one a line, for lists that are too long for the run itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ingestrun.model.contract import ENV_CURSOR, PARTITION_MAX_BYTES
from ingestrun.worker.context import Context
from ingestrun.worker.failure import PermanentError

_BUFFER: Final = 2**20
_BOM: Final = b"\xef\xbb\xbf"
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


def partition_of(context: Context, path: Path) -> str:
    """The partition of this batch: the line with its number, from 0.

    Each fetch reads the whole list, and the part before its line twice, in constant memory: 0.2 s for a million
    lines. So a list that was changed amid the run is noticed, and no partition is read under two numbers.

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
    for number, line in enumerate(_lines(path, shown)):
        total = number + 1
        if number == index:
            own = line
    if own is None or total != count:
        raise PermanentError(
            f"{shown} has {total} lines, and batches.partitions.count is {count}: they must agree, and the list must "
            "not change while the run goes on"
        )
    value = _text(own, shown, index)
    first = next(number for number, line in enumerate(_lines(path, shown)) if line == own)
    if first != index:
        raise PermanentError(f"{shown}: line {index + 1} is the same as line {first + 1} ({value[:80]!r}): remove one")
    return value


def _text(line: bytes, shown: str, index: int) -> str:
    try:
        value = line.decode()
    except UnicodeDecodeError:
        raise PermanentError(f"{shown}: line {index + 1} is not UTF-8") from None
    if not value.strip():
        raise PermanentError(f"{shown}: line {index + 1} is empty")
    if _CONTROL.search(value):
        raise PermanentError(f"{shown}: line {index + 1} has a control character in it")
    return value


def _lines(path: Path, shown: str) -> Iterator[bytes]:
    """The lines without their ends, LF or CR LF; the last one may have none."""
    with path.open("rb", buffering=_BUFFER) as handle:
        number = 0
        while line := handle.readline(PARTITION_MAX_BYTES + 2):
            number += 1
            text = line.removesuffix(b"\n").removesuffix(b"\r")
            if len(text) > PARTITION_MAX_BYTES:
                raise PermanentError(f"{shown}: line {number} is longer than {PARTITION_MAX_BYTES} bytes")
            yield text.removeprefix(_BOM) if number == 1 else text
