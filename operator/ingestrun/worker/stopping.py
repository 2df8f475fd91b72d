"""SIGTERM: stop at once while that is harmless, never between a commit and the word of it."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Final

EXIT_STOPPED: Final = 128 + signal.SIGTERM


class Stopped(BaseException):
    """SIGTERM came. No `Exception`, so that no handler of ordinary errors takes it for one of its own."""


class Stop:
    """The one place that knows whether the worker was asked to stop.

    The signal handler raises, so that neither a slow server nor a wait holds the worker up. An exception raised
    in a destructor or a callback is swallowed by Python: that is why `check` is called between steps as well.
    """

    def __init__(self) -> None:
        self._requested = False
        self._deaf = False

    def install(self) -> None:
        """Take SIGTERM from now on; to be called in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True
        if first and not self._deaf:
            raise Stopped

    def check(self) -> None:
        """A safe point.

        Raises:
            Stopped: SIGTERM came.
        """
        if self._requested:
            raise Stopped

    def last_call(self) -> None:
        """The point of no return, right before a commit: SIGTERM is heard here for the last time.

        After it the stage ends with the truth (done), as a result that says "nothing published" would be a lie.

        Raises:
            Stopped: SIGTERM came.
        """
        self._deaf = True
        self.check()

    def ignore(self) -> None:
        """Hear no SIGTERM from here on: the result is being written."""
        self._deaf = True
