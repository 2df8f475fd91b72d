"""The operator as a process of its own, from this checkout, as `ingestrun-operator run --dev` starts it.

It is forked from a server that has imported the operator already (importing takes longer than many a test), and calls
the command's own `main`: all else is its own, as is its end by SIGKILL or SIGTERM.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timedelta, tzinfo
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any, Final, Self

ROOT: Final = Path(__file__).parents[2]
START_SECONDS: Final = 180
STOP_SECONDS: Final = 90
FORKS: Final = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["ingestrun.controller.main"])


KOPFS_CLOCK: Final = "ingestrun.controller.operator"
"""The module whose one time, that of the credentials' end, kopf compares with its own clock, which is not set here."""


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def api_settings(port: int) -> dict[str, str]:
    """The settings of an operator that serves its HTTP API on this port, also after a restart."""
    return {"INGESTRUN_API_URL": f"http://127.0.0.1:{port}", "INGESTRUN_API_PORT": str(port)}


def _set_clock(ahead: timedelta) -> None:
    """Put the wall clock of this process ahead, or back, as the operator's own modules read it.

    Where the clock is wrong it is so for kopf as well. With the two apart, the credentials would always be over, and
    kopf would ask for new ones with each request, until its watches stand still.
    """

    class Shifted(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Self:
            return cls.fromtimestamp((datetime.now(tz) + ahead).timestamp(), tz)

    right = time.time
    time.time = lambda: right() + ahead.total_seconds()
    for name, module in list(sys.modules.items()):
        own = name.startswith("ingestrun.") and name != KOPFS_CLOCK
        if own and getattr(module, "datetime", None) is datetime:
            vars(module)["datetime"] = Shifted


def _run(arguments: list[str], environment: dict[str, str], log: str, ahead: timedelta) -> None:
    """The body of the forked process: the command, with this environment, all it says in this file."""
    os.environ.clear()
    os.environ.update(environment)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for standard in (1, 2):
        os.dup2(out, standard)
    main = importlib.import_module("ingestrun.controller.main").main
    _set_clock(ahead)
    sys.exit(main(arguments))


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
        ahead: timedelta = timedelta(),
    ) -> None:
        """`settings`: environment variables on top of these here. `elect`: with the lease, as deployed.

        `ahead`: how wrong its wall clock is.
        """
        self._ahead = ahead
        self.log = log
        self._arguments = [
            *("run", "--dev"),
            *("--kubeconfig", str(kubeconfig), "--context", context),
            *(["--lease"] if elect else []),
        ]
        self._environment = {
            **os.environ,
            "INGESTRUN_NAMESPACES": namespace,
            "INGESTRUN_HEALTH_PORT": "0",
            "INGESTRUN_LOG_FORMAT": "json",
            "INGESTRUN_WORKER_IMAGE": "example/worker:1",
            **(settings or {}),
        }
        self._process: ForkServerProcess | None = None

    def start(self, *, elect: bool = False, leads: bool = True) -> None:
        """Start it, with `elect` as a candidate for the lease, and wait until it leads if it is to."""
        leading = len(self.lines("leading"))
        arguments = [*self._arguments, *(["--lease"] if elect else [])]
        given = (arguments, self._environment, str(self.log), self._ahead)
        self._process = FORKS.Process(target=_run, args=given, daemon=True)
        self._process.start()
        if not leads:
            return
        deadline = time.monotonic() + START_SECONDS
        while len(self.lines("leading")) == leading:
            assert self._process.is_alive(), f"the operator ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the operator does not lead: {self.log.read_text()[-3000:]}"
            time.sleep(0.05)

    @property
    def pid(self) -> int:
        """Of the process, which must have been started."""
        assert self._process is not None, "not started"
        assert self._process.pid is not None
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
        if self._process is not None and self._process.is_alive():
            os.kill(self.pid, number)
            self._process.join(timeout=STOP_SECONDS)
            assert not self._process.is_alive(), f"the operator does not end: {self.log.read_text()[-3000:]}"
        self._process = None
