"""Progress lines for long steps, and the table of timings at the end.

The first build of the node image takes a quarter of an hour, so the user must see that it goes on, what it does and how
long that usually takes. A terminal gets one line that is kept up to date; elsewhere (CI logs) a line is printed now and
then.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO


def clock(seconds: float) -> str:
    """Format seconds for people: `45 s`, `3 min 05 s`."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    return f"{whole // 60} min {whole % 60:02d} s"


class Progress:
    """A printer of progress with the time since the start, which records how long each step took."""

    def __init__(self, stream: TextIO | None = None, every: float = 15.0) -> None:
        self._stream = stream or sys.stderr
        self._tty = self._stream.isatty()
        self._every = 1.0 if self._tty else every
        self._start = time.monotonic()
        self._lock = threading.Lock()
        self._running: dict[str, tuple[float, float | None]] = {}
        self._ticker: threading.Thread | None = None
        self._status_shown = False
        self.timings: list[tuple[str, float]] = []

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def say(self, text: str) -> None:
        """Print a line that stays."""
        with self._lock:
            self._write(f"[{self.elapsed:5.0f} s] {text}")

    @contextmanager
    def step(self, title: str, expected: float | None = None, quiet: bool = False) -> Iterator[None]:
        """Time a step. `expected` is the usual duration in seconds, shown beside the elapsed time while it runs."""
        began = time.monotonic()
        with self._lock:
            self._running[title] = (began, expected)
            if self._ticker is None:
                self._ticker = threading.Thread(target=self._tick, daemon=True)
                self._ticker.start()
        if not quiet:
            usual = f" (usually {clock(expected)})" if expected and expected >= 20 else ""
            self.say(f"{title}{usual}")
        try:
            yield
        finally:
            took = time.monotonic() - began
            with self._lock:
                self._running.pop(title, None)
                self.timings.append((title, took))

    def summary(self) -> str:
        """Format the steps' timings, in the order in which they ended."""
        rows = [f"  {clock(took):>12}  {title}" for title, took in self.timings if took >= 0.05]
        return "\n".join([*rows, f"  {clock(self.elapsed):>12}  in all"])

    def _tick(self) -> None:
        while True:
            time.sleep(self._every)
            with self._lock:
                now = time.monotonic()
                parts = [
                    f"{title}: {clock(now - began)}" + (f" of about {clock(expected)}" if expected else "")
                    for title, (began, expected) in self._running.items()
                    if now - began >= self._every
                ]
                if parts:
                    self._write(f"[{self.elapsed:5.0f} s]   ... " + "; ".join(parts), passing=True)

    def _write(self, line: str, passing: bool = False) -> None:
        if self._status_shown:
            self._stream.write("\r\x1b[K")
            self._status_shown = False
        if passing and self._tty:
            self._stream.write(line)
            self._status_shown = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()
