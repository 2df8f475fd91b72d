"""The thread that ends the worker when a stage is over its deadline and can't be interrupted."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Final

from ingestrun.worker.pool.course import BatchCourse

_INTERVAL: Final = 0.5


class Watchdog:
    """Looks at the course of the batch at work. `bark` is called before the end, and must return soon."""

    def __init__(self, bark: Callable[[BatchCourse], None]) -> None:
        """Keep what to call; the thread is started with the first batch."""
        self._bark = bark
        self._course: BatchCourse | None = None
        self._started = False

    def watch(self, course: BatchCourse | None) -> None:
        """Look at this batch from now on, or at none."""
        self._course = course
        if course is not None and not self._started:
            self._started = True
            threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def _run(self) -> None:
        while True:
            time.sleep(_INTERVAL)
            course = self._course
            if course is None or course.kill_at is None or time.monotonic() < course.kill_at:
                continue
            if course.give_up():
                try:
                    self._bark(course)
                finally:
                    os._exit(1)
