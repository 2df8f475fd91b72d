"""SIGTERM, or a cancel of the run: stop while that is harmless, never between a commit and the word of it."""

from __future__ import annotations

import signal
from time import sleep
from types import FrameType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from ingestrun.worker.cancellation import CancellationCheck

WAIT_SLICE: Final = 2.0
"""How long a wait goes on without a look: a source may ask for a minute, and a cancel comes meanwhile."""
EXIT_STOPPED: Final = 128 + signal.SIGTERM


class Stopped(BaseException):
    """SIGTERM came. No `Exception`, so that no handler of ordinary errors takes it for one of its own."""


class Cancelled(BaseException):
    """The run is cancelled, or gone: what is left of the stage would be for nothing. No `Exception`, as above.

    The text is a sentence for the result; `rows` is how many the stage had read.
    """

    def __init__(self, message: str, rows: int) -> None:
        super().__init__(message)
        self.rows = rows


class Stop:
    """The one place that knows whether the worker was asked to stop, and that asks whether the run is cancelled.

    The signal handler raises, so that neither a slow server nor a wait holds the worker up. An exception raised
    in a destructor or a callback is swallowed by Python: that is why `check` is called between steps as well.
    """

    def __init__(self) -> None:
        self._requested = False
        self._deaf = False
        self._asked: CancellationCheck | None = None
        self._rows = 0
        self._of: int | None = None

    def install(self) -> None:
        """Take SIGTERM from now on; to be called in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        first, self._requested = not self._requested, True
        if first and not self._deaf:
            raise Stopped

    def ask(self, check: CancellationCheck | None) -> None:
        """Ask this at the safe points from now on."""
        self._asked = check

    def progress(self, rows: int, of: int | None) -> None:
        """How many rows the stage has read, and of how many where that is known: for the words about a cancel."""
        self._rows, self._of = rows, of

    def check(self, *, now: bool = False) -> None:
        """A safe point: before the first row is read, and between pages or row groups.

        With `now` the operator is asked whenever it was asked before.

        Raises:
            Stopped: SIGTERM came.
            Cancelled: the run is cancelled, or gone.
        """
        if self._requested:
            raise Stopped
        why = self._asked.ask(now=now) if self._asked is not None else None
        if self._requested:
            raise Stopped
        if why is not None:
            of = "" if self._of is None else f" of {self._of}"
            raise Cancelled(f"{why}, stopped after {self._rows}{of} rows", self._rows)

    def wait(self, seconds: float) -> None:
        """Sleep, with a safe point every two seconds and at the end. Raises as `check` does."""
        while seconds > 0:
            sleep(min(seconds, WAIT_SLICE))
            seconds -= WAIT_SLICE
            self.check()

    def last_call(self) -> None:
        """The point of no return, right before a commit: SIGTERM is heard here for the last time.

        After it the stage ends with the truth (done), as a result that says "nothing published" would be a lie.
        Whether the run is cancelled is asked here in any case.

        Raises:
            Stopped: SIGTERM came.
            Cancelled: the run is cancelled, or gone.
        """
        self.check(now=True)
        self._deaf = True
        if self._requested:
            raise Stopped

    def ignore(self) -> None:
        """Hear no SIGTERM from here on: the result is being written."""
        self._deaf = True
