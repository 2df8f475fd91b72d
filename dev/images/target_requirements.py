"""Reduce a universal lock file to one target: `target_requirements.py LOCK PYTHON_VERSION MACHINE`, to stdout.

`pip download --python-version` evaluates markers for the Python that runs pip, not for the one asked for, so they are
evaluated here. The build tools' own Python runs this, because it has `packaging`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.markers import Marker


def for_target(lock: str, python_version: str, machine: str) -> str:
    """Return the lock file's entries whose markers hold, without their markers."""
    major, minor = python_version.split(".")[:2]
    target = {
        "implementation_name": "cpython",
        "implementation_version": python_version,
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_system": "Linux",
        "python_full_version": python_version,
        "python_version": f"{major}.{minor}",
        "sys_platform": "linux",
    }
    kept = []
    for entry in re.split(r"\n(?=[A-Za-z0-9])", re.sub(r"^\s*#.*\n", "", lock, flags=re.M)):
        first, _, rest = entry.partition(" \\\n")
        requirement, _, marker = first.partition(" ; ")
        if requirement.strip() and (not marker or Marker(marker).evaluate(target)):
            kept.append(f"{requirement.strip()} \\\n{rest}".rstrip())
    return "\n".join(kept) + "\n"


if __name__ == "__main__":
    sys.stdout.write(for_target(Path(sys.argv[1]).read_text(), sys.argv[2], sys.argv[3]))
