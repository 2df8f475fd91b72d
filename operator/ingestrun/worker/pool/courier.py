"""The thread that tells the operator what a fetch has come to, while the batch goes on through its hooks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from ingestrun.model.pool import FetchedAnswer, FetchedRequest
from ingestrun.worker.pool.client import Backoff, EndedError, NoAnswerError, PoolClient

OnAnswer = Callable[[FetchedAnswer | EndedError], None]


@dataclass(frozen=True)
class _Letter:
    request: FetchedRequest
    on_answer: OnAnswer


class FetchedCourier:
    """Repeats each message until it is answered, or replaced by the next one, or not needed any more.

    The queue is one that a signal handler can't leave locked, because the main thread may be interrupted while it
    puts something into it.
    """

    def __init__(self, client: PoolClient) -> None:
        """Keep the client, which nobody else may use. The thread is started with the first message."""
        self._client = client
        self._queue: SimpleQueue[_Letter | None] = SimpleQueue()
        self._started = False

    def send(self, request: FetchedRequest, on_answer: OnAnswer) -> None:
        """Send this message, in place of the one before; `on_answer` is called in the courier's thread."""
        if not self._started:
            self._started = True
            threading.Thread(target=self._run, name="fetched", daemon=True).start()
        self._queue.put(_Letter(request, on_answer))

    def drop(self) -> None:
        """Repeat the message no more: another request has told the same."""
        self._queue.put(None)

    def _run(self) -> None:
        while True:
            letter = self._newest(self._queue.get())
            backoff = Backoff()
            while letter is not None:
                try:
                    answer = self._client.fetched(letter.request)
                except NoAnswerError as error:
                    try:
                        letter = self._newest(self._queue.get(timeout=backoff.pause(error)))
                        backoff = Backoff()
                    except Empty:
                        continue
                except EndedError as error:
                    letter.on_answer(error)
                    letter = None
                else:
                    letter.on_answer(answer)
                    letter = None

    def _newest(self, letter: _Letter | None) -> _Letter | None:
        while True:
            try:
                letter = self._queue.get_nowait()
            except Empty:
                return letter
