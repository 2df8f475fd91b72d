"""How long `kubectl ingestrun` takes from its start to an answer of the API server, beside kubectl itself."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[2]
ROUNDS: Final = int(os.environ.get("ROUNDS") or 20)
LIMIT_SECONDS: Final = 0.4
PLUGIN: Final = (sys.executable, "-m", "ingestrun.cli")
COMMANDS: Final = {
    "kubectl-ingestrun --help": (*PLUGIN, "--help"),
    "kubectl-ingestrun list": (*PLUGIN, "list", "-n", "default"),
    "kubectl get ir": ("kubectl", "get", "ir", "-n", "default"),
}


def main() -> int:
    """Print the shortest and the median time of each command; 1 if the plugin's shortest is over its limit.

    The shortest is what it takes where nothing else runs.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "operator")}
    shortest = {}
    for name, command in COMMANDS.items():
        times = []
        # The first one compiles, and is not counted.
        for _ in range(ROUNDS + 1):
            begun = time.monotonic()
            subprocess.run(command, env=environment, check=True, capture_output=True)  # noqa: S603
            times.append(time.monotonic() - begun)
        shortest[name] = min(times[1:])
        median = statistics.median(times[1:])
        sys.stdout.write(f"{name:<26} shortest {shortest[name]:.2f} s, median {median:.2f} s\n")
    return int(max(found for name, found in shortest.items() if name.startswith("kubectl-")) > LIMIT_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
