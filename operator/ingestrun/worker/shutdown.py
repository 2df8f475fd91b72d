"""Stopping a stage on SIGTERM or on a cancel of its run, but never between a commit and its result."""

from __future__ import annotations

import signal
import threading
from time import sleep
from types import FrameType
from typing import Final, Protocol

from ingestrun.model.text import pluralize

WAIT_SLICE: Final = 2.0
"""Seconds that a wait sleeps between two checks: a source may ask for a minute, and the run be cancelled meanwhile."""
_INTERRUPT: Final = signal.SIGUSR1
EXIT_STOPPED: Final = 128 + signal.SIGTERM


class Stopped(BaseException):
    """The worker got SIGTERM. Not an `Exception`, so that no handler of ordinary errors catches it."""


class Cancelled(BaseException):
    """The run is cancelled or deleted, so the rest of the stage is of no use. Not an `Exception`, as `Stopped`.

    The text becomes the result's message; `rows` is how many rows the stage had read.
    """

    def __init__(self, message: str, rows: int) -> None:
        super().__init__(message)
        self.rows = rows


class CancellationCheck(Protocol):
    """Knows, or asks, whether the run is cancelled."""

    def stop_reason(self, *, ask_now: bool = False) -> str | None:
        """Return why the stage has to stop, or None; with `ask_now` the answer is to be fresh."""


class Stop:
    """Decides whether the stage has to stop: it holds the state of SIGTERM, and asks whether the run is cancelled.

    The signal handler raises, so that neither a slow server nor a wait delays the end of the worker. Python swallows
    an exception that is raised in a destructor or a callback, so `raise_if_stopped` is called between steps as well.

    In a pool a cancel, and what else ends a batch before its time, comes from another thread: it interrupts the main
    thread by a signal in the same way, but only while a batch is at work.
    """

    def __init__(self) -> None:
        self._sigterm_received = False
        self._ignoring_signals = False
        self._interruptible = False
        self._batch = 0
        self._interruptions: dict[int, BaseException] = {}
        self._cancellation: CancellationCheck | None = None
        self._rows_read = 0
        self._rows_total: int | None = None

    def install(self) -> None:
        """Handle SIGTERM from now on; call it in the main thread."""
        signal.signal(signal.SIGTERM, self._on_signal)

    def install_interrupt(self) -> None:
        """Handle the signal of `interrupt` from now on; call it in the main thread."""
        signal.signal(_INTERRUPT, self._on_interrupt)

    @property
    def sigterm_received(self) -> bool:
        """True from the SIGTERM on, also if it was ignored when it came."""
        return self._sigterm_received

    def begin_batch(self) -> int:
        """Let a batch be interrupted from now on; return the number by which `interrupt` knows it."""
        self._batch += 1
        self._interruptions.clear()
        self._ignoring_signals = False
        self.set_progress(0, None)
        self._interruptible = True
        return self._batch

    def end_interruptions(self) -> None:
        """Let nothing but SIGTERM interrupt from now on."""
        self._interruptible = False

    def end_batch(self) -> None:
        """Heed SIGTERM again. One that was ignored is heeded at the next check."""
        self._interruptible, self._ignoring_signals = False, False

    def interrupt(self, batch: int | None = None, error: BaseException | None = None) -> None:
        """End that batch by this error, if it is still at work, or any by a cancel of the run; for other threads."""
        if batch is not None and error is not None:
            self._interruptions.setdefault(batch, error)
        signal.pthread_kill(threading.main_thread().ident or 0, _INTERRUPT)

    def _on_interrupt(self, _signum: int, _frame: FrameType | None) -> None:
        if self._interruptible and not self._ignoring_signals:
            # Once, because the handlers of the first must not be interrupted by a second.
            self._interruptible = False
            self.raise_if_stopped()
            self._interruptible = True

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        first, self._sigterm_received = not self._sigterm_received, True
        if first and not self._ignoring_signals:
            raise Stopped

    def set_cancellation_client(self, client: CancellationCheck | None) -> None:
        """Ask this client whether the run is cancelled, at each check from now on."""
        self._cancellation = client

    def set_progress(self, rows: int, total: int | None) -> None:
        """Record how many rows the stage has read, and of how many if that is known, for the message of a cancel."""
        self._rows_read, self._rows_total = rows, total

    def raise_if_stopped(self, *, ask_now: bool = False) -> None:
        """Raise if the stage has to stop. Called before the first row, and between pages or row groups.

        With `ask_now` the operator is asked even if it was asked a moment ago.

        Raises:
            Stopped: SIGTERM came.
            Cancelled: the run is cancelled or deleted.
            BaseException: the error of `interrupt`.
        """
        if self._sigterm_received:
            raise Stopped
        if self._batch in self._interruptions:
            raise self._interruptions[self._batch]
        reason = self._cancellation.stop_reason(ask_now=ask_now) if self._cancellation is not None else None
        if self._sigterm_received:
            raise Stopped
        if reason is not None:
            read, total = self._rows_read, self._rows_total
            rows = pluralize(read, "row") if total is None else f"{read} of {pluralize(total, 'row')}"
            raise Cancelled(f"{reason}, stopped after {rows}", read)

    def wait(self, seconds: float) -> None:
        """Sleep, with a check every two seconds and at the end. Raises as `raise_if_stopped` does."""
        while seconds > 0:
            sleep(min(seconds, WAIT_SLICE))
            seconds -= WAIT_SLICE
            self.raise_if_stopped()

    def commit_point(self) -> None:
        """Check for the last time, right before a commit, and ignore SIGTERM from then on.

        After the commit a result such as "nothing published" would be false, so the stage has to end with `done`.
        The operator is asked here even if it was asked a moment ago.

        Raises:
            Stopped: SIGTERM came.
            Cancelled: the run is cancelled or deleted.
        """
        self.raise_if_stopped(ask_now=True)
        self._ignoring_signals = True
        # A signal that came between the two lines above has raised already, unless Python swallowed the exception.
        if self._sigterm_received:
            raise Stopped

    def ignore_signals(self) -> None:
        """Ignore SIGTERM from now on, because the result is being written."""
        self._ignoring_signals = True
