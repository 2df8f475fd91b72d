"""The client of the operator's cancellation check.

A stage that gets no answer goes on, because its batch was claimed before its Job was created.
"""

from __future__ import annotations

import http.client
import time
from collections.abc import Callable, Mapping
from typing import Final

from ingestrun.model import contract
from ingestrun.model.pool import WAIT_PARAMETER
from ingestrun.worker.operator_connection import OperatorConnection, Response

INTERVAL: Final = 1.0
"""Least seconds between two requests: the operator's own state is no fresher."""
TIMEOUT: Final = 2.0
TRIES: Final = 2
FIRST_PAUSE: Final = 5.0
MAX_PAUSE: Final = 60.0
"""The pause after a request without an answer doubles up to this, so that an operator that is down costs little."""
_OK: Final = 200
_NOT_FOUND: Final = 404
_SERVER_ERROR: Final = 500

LogEvent = Callable[..., None]


class UnreachableError(Exception):
    """The check gave no valid answer; the text says why."""


class CancellationClient:
    """Asks the operator whether this pod's run is cancelled."""

    def __init__(
        self,
        url: str,
        token: str,
        uid: str,
        *,
        log_event: LogEvent,
        ca: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the address and the token; nothing is sent yet. `log_event` takes an event and its fields."""
        self._connection = OperatorConnection(url, token, ca=ca)
        self._uid = uid
        self._log_event = log_event
        self._clock = clock
        self._next_request = float("-inf")
        self._pause = FIRST_PAUSE
        self._logged_failure = False

    @classmethod
    def from_env(cls, env: Mapping[str, str], log_event: LogEvent) -> CancellationClient | None:
        """Make a client of the check that the environment names; None if it names none."""
        url, token = env.get(contract.ENV_CANCELLATION_URL), env.get(contract.ENV_CANCELLATION_TOKEN)
        if not url or not token:
            return None
        ca = env.get(contract.ENV_CANCELLATION_CA) or None
        return cls(url, token, env.get(contract.ENV_RUN_UID, ""), log_event=log_event, ca=ca)

    def stop_reason(self, *, ask_now: bool = False) -> str | None:
        """Return why the stage has to stop, or None. Without `ask_now` it asks at most once a second."""
        if not ask_now and self._clock() < self._next_request:
            return None
        try:
            reason = self.ask()
        except UnreachableError as error:
            if not self._logged_failure:
                self._log_event("the cancellation check gives no answer, going on", why=str(error))
            self._logged_failure = True
            self._next_request = self._clock() + self._pause
            self._pause = min(MAX_PAUSE, 2 * self._pause)
            return None
        self._next_request, self._pause = self._clock() + INTERVAL, FIRST_PAUSE
        return reason

    def ask(self, wait: int = 0) -> str | None:
        """Ask, and return why the work has to stop, or None; the operator may hold a None back for `wait` seconds.

        Raises:
            UnreachableError: there is no valid answer.
        """
        response = self._get(wait)
        body = response.json_object()
        if response.status == _NOT_FOUND and body.get("error") == "gone":
            return "the run is gone"
        # Any other 404 is not the operator's answer: a wrong address must not look like a cancel.
        if response.status != _OK:
            raise UnreachableError(_status_text(response))
        if body.get("id") != self._uid or not isinstance(body.get("cancelled"), bool):
            raise UnreachableError("HTTP 200, but no answer about this run")
        return "the run is cancelled" if body["cancelled"] else None

    def _get(self, wait: int) -> Response:
        """Send the request, and once more if there was no answer: the server may have closed the kept connection."""
        why = ""
        for _ in range(TRIES):
            try:
                response = self._connection.request(
                    "GET", f"?{WAIT_PARAMETER}={wait}" if wait else "", timeout=TIMEOUT + wait
                )
            except (OSError, http.client.HTTPException) as error:
                why = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            except ValueError:
                # Python's own message would contain the token.
                raise UnreachableError("the address or the token is malformed") from None
            if response.status < _SERVER_ERROR:
                return response
            self._connection.close()  # another replica may answer
            why = _status_text(response)
        raise UnreachableError(why)


def _status_text(response: Response) -> str:
    return f"HTTP {response.status}: {str(response.json_object().get('message', ''))[:200]}".rstrip(": ")
