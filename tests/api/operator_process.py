"""The operator as a process of its own, from this checkout, as `ingestrun-operator run --dev` starts it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
START_SECONDS: Final = 180
STOP_SECONDS: Final = 90


class OperatorProcess:
    """One replica that watches one namespace; its log lines are read from a file."""

    def __init__(
        self,
        *,
        kubeconfig: Path,
        context: str,
        namespace: str,
        log: Path,
        settings: Mapping[str, str] | None = None,
        elect: bool = False,
    ) -> None:
        """`settings`: environment variables on top of these here. `elect`: with the lease, as deployed."""
        self.log = log
        self._arguments = [
            *(sys.executable, "-m", "ingestrun.control.main", "run", "--dev"),
            *("--kubeconfig", str(kubeconfig), "--context", context),
            *(["--lease"] if elect else []),
        ]
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "operator"),
            "INGESTRUN_NAMESPACES": namespace,
            "INGESTRUN_HEALTH_PORT": "0",
            "INGESTRUN_LOG_FORMAT": "json",
            "INGESTRUN_WORKER_IMAGE": "example/worker:1",
            **(settings or {}),
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, elect: bool = False, leads: bool = True) -> None:
        """Start it, with `elect` as a candidate for the lease, and wait until it leads if it is to."""
        leading = len(self.lines("leading"))
        with self.log.open("ab") as out:
            arguments = [*self._arguments, *(["--lease"] if elect else [])]
            self._process = subprocess.Popen(arguments, env=self._environment, stderr=out, stdout=out)
        if not leads:
            return
        deadline = time.monotonic() + START_SECONDS
        while len(self.lines("leading")) == leading:
            assert self._process.poll() is None, f"the operator ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the operator does not lead: {self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Of the process, which must have been started."""
        assert self._process is not None, "not started"
        return self._process.pid

    def kill(self) -> None:
        """SIGKILL: it gets no word in."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """SIGTERM, as the kubelet does."""
        self._end(signal.SIGTERM)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """The log lines of that text so far."""
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            if line.startswith("{") and line.endswith("}"):
                entry = json.loads(line)
                if entry.get("event") == event:
                    found.append(entry)
        return found

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)
            self._process.wait(timeout=STOP_SECONDS)
        self._process = None
