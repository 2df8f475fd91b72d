"""A list of partitions in a file of the workspace, one a line, for lists that are too long for the run itself."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from ingestrun.model.contract import ENV_CURSOR, PARTITION_MAX_BYTES
from ingestrun.model.text import pluralize
from ingestrun.worker.context import Context
from ingestrun.worker.errors import PermanentError, SourceChangedError

_BLOCK_BYTES: Final = 2**20
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"
_CONTROL_CHARACTER: Final = re.compile(r"[\x00-\x1f\x7f]")


def read_partition(context: Context, path: Path) -> tuple[str, str]:
    """Return the partition of this batch, the line whose number, from 0, is the cursor; and the digest of the list.

    Each fetch reads the whole list, and the part before its own line twice. It needs constant memory, and about 0.1 s
    for a million lines. Thereby a list that changes during the run is noticed, and no partition is read under two
    numbers. The digest is the file's SHA-256.

    Raises:
        PermanentError: the list is missing, its length is not the run's count, or this batch's line is not usable.
        SourceChangedError: the list is not the one that the run began with.
    """
    if not context.cursor.isdecimal():
        raise PermanentError(f"{ENV_CURSOR} is {context.cursor[:40]!r}, not the number of a line")
    workspace = context.workspace
    shown = str(path)
    if workspace is not None and path.is_relative_to(workspace):
        shown = str(path.relative_to(workspace))
    digest = hashlib.sha256()
    try:
        value = read_line(path, shown, int(context.cursor), context.partitions, digest.update)
    except FileNotFoundError:
        raise PermanentError(f"{shown}, the list of partitions, is not in the workspace: put it there first") from None
    except (IsADirectoryError, NotADirectoryError):
        raise PermanentError(f"{shown}, the list of partitions, is no file") from None
    except PermissionError:
        raise PermanentError(f"{shown} may not be read: check its mode and the pod's fsGroup") from None
    if context.source_digest not in (None, digest.hexdigest()):
        raise SourceChangedError(
            f"{shown} has changed since the run began, so partitions would be missed or read twice: "
            "put it back as it was, or start a new run"
        )
    return value, digest.hexdigest()


def read_line(
    path: Path, shown: str, index: int, count: int | None, seen: Callable[[bytes], None] = lambda _: None
) -> str:
    """Return the line with that index of a list that must have `count` different lines; `shown` is its name in errors.

    All bytes of the list are given to `seen`, in order.

    Raises:
        PermanentError: the list has another length, or the line is not usable.
        OSError: the file can't be read.
    """
    own, total = None, 0
    for number, block in _read_blocks(path, shown, seen):
        total = number + block.count(b"\n") + 1
        if number <= index < total:
            own = _without_carriage_return(block.split(b"\n")[index - number])
    if own is None or total != count:
        raise PermanentError(
            f"{shown} has {pluralize(total, 'line')}, and batches.partitions.count is {count}: they must agree, "
            "and the list must not change while the run goes on"
        )
    value = _decode_line(own, shown, index)
    first = _first_occurrence(path, shown, own)
    if first != index:
        raise PermanentError(f"{shown}: line {index + 1} is the same as line {first + 1} ({value[:80]!r}): remove one")
    return value


def _decode_line(line: bytes, shown: str, index: int) -> str:
    if len(line) > PARTITION_MAX_BYTES:
        raise _too_long(shown, index)
    try:
        value = line.decode()
    except UnicodeDecodeError:
        raise PermanentError(f"{shown}: line {index + 1} is not UTF-8") from None
    if not value.strip():
        raise PermanentError(f"{shown}: line {index + 1} is empty")
    if _CONTROL_CHARACTER.search(value):
        raise PermanentError(f"{shown}: line {index + 1} has a control character in it")
    return value


def _first_occurrence(path: Path, shown: str, own: bytes) -> int:
    """Return the number of the first line that equals `own`, which is one of the list's lines."""
    for number, block in _read_blocks(path, shown):
        if own in block:
            for at, line in enumerate(block.split(b"\n")):
                if _without_carriage_return(line) == own:
                    return number + at
    raise PermanentError(f"{shown} changed while it was read: it must stay as it is while the run goes on")


def _without_carriage_return(line: bytes) -> bytes:
    """Return a line that ends in CR LF as if it ended in LF."""
    return line.removesuffix(b"\r")


def _read_blocks(path: Path, shown: str, seen: Callable[[bytes], None] = lambda _: None) -> Iterator[tuple[int, bytes]]:
    """Yield blocks of whole lines, about a MiB each: the first line's number, and the block without its last LF."""
    with path.open("rb", buffering=0) as handle:
        number, rest = 0, b""
        while chunk := handle.read(_BLOCK_BYTES):
            seen(chunk)
            whole, end, rest = (rest + chunk).rpartition(b"\n")
            if not end and len(rest) > PARTITION_MAX_BYTES + len(_BYTE_ORDER_MARK):
                raise _too_long(shown, number)
            if end:
                yield number, whole if number else whole.removeprefix(_BYTE_ORDER_MARK)
                number += whole.count(b"\n") + 1
        if rest:
            yield number, rest if number else rest.removeprefix(_BYTE_ORDER_MARK)


def _too_long(shown: str, number: int) -> PermanentError:
    return PermanentError(f"{shown}: line {number + 1} is longer than {PARTITION_MAX_BYTES} bytes")
