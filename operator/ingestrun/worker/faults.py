"""Faults on purpose, for tests of the operator: set by `INGEST_FAULT`, never in production.

    exit:1,attempts:2,stage:fetch,batch:3    exit code 1, in the attempts 0 and 1 of that fetch
    permanent | oom | hang | hang:deaf       a permanent failure; memory without end; no end (deaf: to SIGTERM also)
    garbage | missing                        exit 0 with a result that is no JSON, or with none
    exit-after:1                             exit code 1 after all the work was done, the result lost

Several are separated by ";". `attempts`, `stage`, `hook` and `batch` say when it is for; without one, always.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NoReturn

from ingestrun.model import contract
from ingestrun.worker.errors import PermanentError

ENV_FAULT: Final = "INGEST_FAULT"
_AT_START: Final = ("exit", "permanent", "oom", "hang")
_AT_END: Final = ("garbage", "missing", "exit-after")
_FILTERS: Final = ("attempts", "stage", "hook", "batch")
_CHUNK: Final = 32 * 2**20
_UNLIMITED: Final = 2**60


@dataclass(frozen=True)
class Fault:
    """One fault: its kind, and the kind's argument ("" where it has none)."""

    kind: str
    argument: str


def find_fault(env: Mapping[str, str]) -> Fault | None:
    """The first fault that is meant for this attempt.

    Raises:
        PermanentError: `INGEST_FAULT` is not of the form above.
    """
    for text in filter(None, (part.strip() for part in env.get(ENV_FAULT, "").split(";"))):
        first, *rest = (part.strip() for part in text.split(","))
        kind, _, argument = first.partition(":")
        filters = dict(part.partition(":")[::2] for part in rest)
        if kind not in _AT_START + _AT_END or not set(filters) <= set(_FILTERS):
            raise PermanentError(f"{ENV_FAULT}: {text[:60]!r} is not a fault this worker knows")
        if kind in ("exit", "exit-after") or "attempts" in filters:
            numbers = [argument] if kind in ("exit", "exit-after") else []
            numbers += [filters["attempts"]] if "attempts" in filters else []
            if not all(number.isdecimal() for number in numbers):
                raise PermanentError(f"{ENV_FAULT}: {text[:60]!r} lacks a number")
        if _meant(env, filters):
            return Fault(kind, argument)
    return None


def _meant(env: Mapping[str, str], filters: Mapping[str, str]) -> bool:
    exact = {"stage": contract.ENV_STAGE, "hook": contract.ENV_HOOK, "batch": contract.ENV_BATCH}
    if any(env.get(variable, "") != filters[name] for name, variable in exact.items() if name in filters):
        return False
    return int(env.get(contract.ENV_ATTEMPT) or 0) < int(filters.get("attempts", 2**31))


def at_start(fault: Fault | None) -> int | None:
    """Do the fault before any work; an exit code means: end with it, and leave no result.

    Raises:
        PermanentError: the fault is one.
    """
    if fault is None or fault.kind not in _AT_START:
        return None
    if fault.kind == "permanent":
        raise PermanentError("a permanent failure, asked for by INGEST_FAULT")
    if fault.kind == "oom":
        _exhaust_memory()
    if fault.kind == "hang":
        _hang(deaf=fault.argument == "deaf")
    return int(fault.argument)


def at_end(fault: Fault | None) -> tuple[int, str | None] | None:
    """What takes the place of exit code and result after the work is done; None: they stand."""
    if fault is None or fault.kind not in _AT_END:
        return None
    if fault.kind == "garbage":
        return 0, "this is { not a result"
    return (int(fault.argument) if fault.argument else 0), None


def _hang(*, deaf: bool) -> NoReturn:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.write("hanging\n")
    sys.stdout.flush()
    while True:
        time.sleep(3600)


def _exhaust_memory() -> NoReturn:
    if _memory_is_limited():
        held = []
        while True:
            held.append(bytearray(os.urandom(4096) * (_CHUNK // 4096)))
    # Without a limit of our own the machine's memory would go: die as the kernel would let us die.
    os.kill(os.getpid(), signal.SIGKILL)
    # A container's process 1 is spared its own SIGKILL.
    os._exit(128 + signal.SIGKILL)


def _memory_is_limited(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Whether our own cgroup has a limit; as version 1 writes it, none is a number beyond all memory."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / name
        if path.exists():
            text = path.read_text().strip()
            return text != "max" and int(text) < _UNLIMITED
    return False
