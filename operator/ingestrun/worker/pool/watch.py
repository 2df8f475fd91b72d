"""The thread that keeps the cancellation check open as a long poll, so that a cancel is heard within milliseconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Final

from ingestrun.worker import cancellation
from ingestrun.worker.cancellation import CancellationClient, LogEvent, UnreachableError
from ingestrun.worker.pool.client import Backoff, NoAnswerError

WAIT_SECONDS: Final = 25
_ANSWERED_AT_ONCE: Final = 1.0
"""An answer sooner than this was not held back, so the operator knows no long poll, and is asked once a second."""


class CancellationWatch:
    """Knows whether the run is cancelled, without asking: its thread asks all the time, or another request was told."""

    def __init__(self, client: CancellationClient | None, interrupt: Callable[[], None], log_event: LogEvent) -> None:
        """Keep the client; `interrupt` is called when the run is cancelled. Nothing is asked yet."""
        self._client = client
        self._interrupt = interrupt
        self._log_event = log_event
        self._reason: str | None = None
        self._started = False

    def stop_reason(self, *, ask_now: bool = False) -> str | None:
        """Return why there is nothing to be done any more, or None; as `shutdown.CancellationCheck`."""
        return self._reason

    def tell(self, reason: str) -> None:
        """Take note that the run is cancelled, as the answer to another request said."""
        self._reason = self._reason or reason

    def start(self) -> None:
        """Start the thread, unless it runs or there is nobody to ask."""
        if not self._started and self._client is not None:
            self._started = True
            threading.Thread(target=self._poll, args=(self._client,), name="cancellation", daemon=True).start()

    def _poll(self, client: CancellationClient) -> None:
        backoff = Backoff()
        unanswered = False
        while self._reason is None:
            began = time.monotonic()
            try:
                reason = client.ask(WAIT_SECONDS)
            except UnreachableError as error:
                if not unanswered:
                    self._log_event("the cancellation check gives no answer, going on", why=str(error))
                unanswered = True
                time.sleep(backoff.pause(NoAnswerError(str(error))))
                continue
            if unanswered:
                self._log_event("the cancellation check answers again")
            backoff, unanswered = Backoff(), False
            if reason is not None:
                self.tell(reason)
                self._interrupt()
            elif time.monotonic() - began < _ANSWERED_AT_ONCE:
                time.sleep(cancellation.INTERVAL)
