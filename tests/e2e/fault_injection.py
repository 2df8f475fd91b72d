"""The worker with faults on purpose, for tests of the operator. It is in no image: a ConfigMap brings it into the pods.

`INGEST_FAULT` names the fault:

    exit:1                   exit code 1 before any work, without a result
    permanent                exit code 65 before any work, with a result
    oom                      take memory until the kernel kills the process; without a memory limit, kill itself
    hang | hang:deaf         never end; `deaf` ignores SIGTERM too
    garbage | missing        do the work, then exit with 0 and a result that is no JSON, or without a result
    exit-after:1             do the work, then exit with 1 and without a result

`exit:1,attempts:2,stage:fetch,batch:3` is for the attempts 0 and 1 of batch 3's fetch, `hook:<name>` for one hook.
Several faults are separated by ";"; the first that is meant for this attempt is done.
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
from ingestrun.model.contract import Outcome, parse_result
from ingestrun.worker import main as worker
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.logs import log_event
from ingestrun.worker.result import failed_result, termination_path, write_result
from ingestrun.worker.shutdown import EXIT_STOPPED, Stop, Stopped

ENV_FAULT: Final = "INGEST_FAULT"
_BEFORE_THE_WORK: Final = ("exit", "permanent", "oom", "hang")
_AFTER_THE_WORK: Final = ("garbage", "missing", "exit-after")
_WITH_EXIT_CODE: Final = ("exit", "exit-after")
_EXACT_FILTERS: Final = {"stage": contract.ENV_STAGE, "hook": contract.ENV_HOOK, "batch": contract.ENV_BATCH}
_CHUNK: Final = 32 * 2**20
_UNLIMITED: Final = 2**60


@dataclass(frozen=True)
class Fault:
    """A fault's kind, its argument ("" if it has none), and the attempts that it is meant for."""

    kind: str
    argument: str
    filters: Mapping[str, str]

    def is_meant_for(self, env: Mapping[str, str]) -> bool:
        """Return whether the environment is that of an attempt that is to have this fault."""
        exact = {name: variable for name, variable in _EXACT_FILTERS.items() if name in self.filters}
        if any(env.get(variable, "") != self.filters[name] for name, variable in exact.items()):
            return False
        return int(env.get(contract.ENV_ATTEMPT) or 0) < int(self.filters.get("attempts", 2**31))


def main() -> None:
    """Run the stage with its fault and exit."""
    stop = Stop()
    stop.install()
    try:
        code = run(os.environ, stop)
    except Stopped:
        code = EXIT_STOPPED
    sys.exit(code)


def run(env: Mapping[str, str], stop: Stop) -> int:
    """Do as the worker's `run`, with the fault that is meant for this attempt."""
    try:
        fault = find_fault(env)
        if fault is not None:
            log_event(env, "fault on purpose", kind=fault.kind)
            if fault.kind in _BEFORE_THE_WORK:
                return _fail_at_once(fault)
    except Stopped:
        write_result(env, failed_result("stopped by SIGTERM, nothing published"))
        return EXIT_STOPPED
    except PermanentError as error:
        write_result(env, failed_result(str(error)))
        return contract.EXIT_PERMANENT
    code = worker.run(env, stop)
    path = termination_path(env)
    if fault is None or code != contract.EXIT_DONE or parse_result(path.read_text()).outcome is not Outcome.DONE:
        return code
    # In a pod the file is a mount, so it can only be emptied, not removed; the kubelet then finds no message either.
    path.write_text("this is { not a result" if fault.kind == "garbage" else "")
    return int(fault.argument or contract.EXIT_DONE)


def find_fault(env: Mapping[str, str]) -> Fault | None:
    """Return the first fault that is meant for this attempt.

    Raises:
        PermanentError: `INGEST_FAULT` is malformed.
    """
    texts = [text.strip() for text in env.get(ENV_FAULT, "").split(";")]
    faults = [_parse_fault(text) for text in texts if text]
    return next((fault for fault in faults if fault.is_meant_for(env)), None)


def _parse_fault(text: str) -> Fault:
    first, *rest = (part.strip() for part in text.split(","))
    kind, _, argument = first.partition(":")
    filters = dict(part.partition(":")[::2] for part in rest)
    if kind not in _BEFORE_THE_WORK + _AFTER_THE_WORK or not filters.keys() <= {*_EXACT_FILTERS, "attempts"}:
        raise PermanentError(f"{ENV_FAULT}: {text[:60]!r} is not a fault this worker knows")
    numbers = [argument] if kind in _WITH_EXIT_CODE else []
    numbers += [filters["attempts"]] if "attempts" in filters else []
    if not all(number.isdecimal() for number in numbers):
        raise PermanentError(f"{ENV_FAULT}: {text[:60]!r} lacks a number")
    return Fault(kind, argument, filters)


def _fail_at_once(fault: Fault) -> int:
    if fault.kind == "permanent":
        raise PermanentError("a permanent failure, asked for by INGEST_FAULT")
    if fault.kind == "oom":
        _exhaust_memory()
    if fault.kind == "hang":
        _hang(deaf=fault.argument == "deaf")
    return int(fault.argument)


def _hang(*, deaf: bool) -> NoReturn:
    if deaf:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdout.write("hanging\n")
    sys.stdout.flush()
    while True:
        time.sleep(3600)


def _exhaust_memory() -> NoReturn:
    if memory_is_limited():
        held = []
        while True:
            held.append(bytearray(os.urandom(4096) * (_CHUNK // 4096)))
    # Without a limit of its own the process would take the machine's memory, so it dies as the kernel would let it die.
    os.kill(os.getpid(), signal.SIGKILL)
    # Process 1 of a container can't SIGKILL itself.
    os._exit(128 + signal.SIGKILL)


def memory_is_limited(root: Path = Path("/sys/fs/cgroup")) -> bool:
    """Return whether the cgroup has a memory limit; version 1 writes "no limit" as a number beyond all memory."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        path = root / name
        if path.exists():
            text = path.read_text().strip()
            return text != "max" and int(text) < _UNLIMITED
    return False


if __name__ == "__main__":
    main()
