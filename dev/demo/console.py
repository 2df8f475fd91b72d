"""The demo's screen: sections, commands as a user would type them with their real output, and failures."""

from __future__ import annotations

import json
import os
import queue
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]


def _pump(source: IO[str] | None, sink: queue.Queue[str]) -> None:
    for line in source or ():
        sink.put(line.strip())


class DemoError(Exception):
    """An error that ends the demo; the text says why."""


class Console:
    """A printer that runs commands in the cluster's environment."""

    def __init__(self, cluster: str) -> None:
        self.cluster = cluster
        self.environment = dict(os.environ)
        self.adopted = False
        self._began = time.monotonic()
        self._colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ

    def adopt(self) -> None:
        """Take over what `python3 dev/cluster env` exports, so that kubectl talks to that cluster and to no other."""
        lines = self.capture([sys.executable, "dev/cluster", "env"]).splitlines()
        for line in lines:
            name, _, value = line.removeprefix("export ").partition("=")
            self.environment[name] = shlex.split(value)[0] if value else ""
        self.adopted = True

    @property
    def elapsed(self) -> float:
        """Seconds since the demo began."""
        return time.monotonic() - self._began

    def section(self, title: str) -> None:
        """Print the heading of a part."""
        line = f"== {title} "
        self._print(f"\n{line:=<100} {self.elapsed:4.0f} s", "1;36")

    def say(self, text: str = "") -> None:
        """Print a text."""
        self._print(text, "")

    def verdict(self, right: bool, text: str) -> bool:
        """Print a finding."""
        self._print(f"  {'ok ' if right else 'BAD'}  {text}", "32" if right else "31;1")
        return right

    def run(self, command: Sequence[str], *, shown: str | None = None) -> None:
        """Print a command as a user would type it, then its output as it comes.

        Raises:
            DemoError: it fails.
        """
        self._print(f"$ {shown or shlex.join(command)}", "1")
        done = subprocess.run(command, cwd=ROOT, env=self.environment, text=True, check=False)
        if done.returncode:
            raise DemoError(f"`{shown or shlex.join(command)}` failed")

    def capture(self, command: Sequence[str], *, stdin: str | None = None) -> str:
        """Return the output of a command without showing it.

        Raises:
            DemoError: it fails.
        """
        done = subprocess.run(
            command, cwd=ROOT, env=self.environment, input=stdin, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise DemoError(f"`{shlex.join(command)}` failed: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    def try_capture(self, command: Sequence[str]) -> str:
        """Return all output of a command, also if it fails."""
        done = subprocess.run(command, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    def object(self, *names: str) -> dict[str, Any]:
        """Get one object of the cluster."""
        found: dict[str, Any] = json.loads(self.capture(["kubectl", "get", *names, "-o", "json"]))
        return found

    def changes(self, *names: str, every: float = 1.0) -> Iterator[dict[str, Any] | None]:
        """Yield an object's status now and at each change, and None after each `every` seconds without one.

        One kubectl watches, because a new one each second would take a good share of a small machine's CPU.
        """
        command = ["kubectl", "get", *names, "--watch", "-o", 'jsonpath={.status}{"\\n"}']
        while True:
            with subprocess.Popen(command, env=self.environment, stdout=subprocess.PIPE, text=True) as watching:
                lines: queue.Queue[str] = queue.Queue()
                reader = threading.Thread(target=_pump, args=(watching.stdout, lines), daemon=True)
                reader.start()
                try:
                    while reader.is_alive() or not lines.empty():
                        try:
                            line = lines.get(timeout=every)
                        except queue.Empty:
                            yield None
                        else:
                            yield json.loads(line or "{}")
                finally:
                    watching.kill()

    def _print(self, text: str, style: str) -> None:
        sys.stdout.write(f"\x1b[{style}m{text}\x1b[0m\n" if self._colour and style else text + "\n")
        sys.stdout.flush()
