"""What a process has used so far, from /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

REST_SECONDS: Final = 3.0
"""How long a process must have done next to nothing to count as at rest."""
REST_SHARE: Final = 0.02
"""Of one core: what timers and keep-alives take."""
_TICKS: Final = os.sysconf("SC_CLK_TCK")


def cpu_seconds(pid: int) -> float:
    """Return the CPU time of the process and all its threads, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def resident_mib(pid: int) -> int:
    """Return the resident memory in MiB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) // 1024


def await_rest(pid: int, *, timeout: float) -> float:
    """Wait until the process has used next to no CPU for a while; return its CPU time at the beginning of that while.

    Raises TimeoutError when it is still busy after so many seconds.
    """
    deadline = time.monotonic() + timeout
    since, before = time.monotonic(), cpu_seconds(pid)
    while time.monotonic() - since < REST_SECONDS:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} is not at rest after {timeout:.0f} s")
        time.sleep(0.1)
        used = cpu_seconds(pid)
        if used - before > REST_SHARE * REST_SECONDS:
            since, before = time.monotonic(), used
    return before
