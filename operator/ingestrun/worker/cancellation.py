"""The client of the operator's cancellation check.

A stage that gets no answer goes on, because its batch was claimed before its Job was created.
"""

from __future__ import annotations

import http.client
import json
import ssl
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import SplitResult, urlsplit

from ingestrun.model import contract

INTERVAL: Final = 1.0
"""Least seconds between two requests: the operator's own state is no fresher."""
TIMEOUT: Final = 2.0
TRIES: Final = 2
FIRST_PAUSE: Final = 5.0
MAX_PAUSE: Final = 60.0
"""The pause after a request without an answer doubles up to this, so that an operator that is down costs little."""
_MAX_BYTES: Final = 65_536
_OK: Final = 200
_NOT_FOUND: Final = 404
_SERVER_ERROR: Final = 500

LogEvent = Callable[..., None]


class UnreachableError(Exception):
    """The check gave no valid answer; the text says why."""


class CancellationClient:
    """Asks the operator whether this pod's run is cancelled.

    It does not use httpx, because two of three stages would load it for nothing else, and because a proxy that is set
    for the source must not be used for the operator.
    """

    def __init__(
        self,
        url: str,
        token: str,
        uid: str,
        *,
        log_event: LogEvent,
        ca: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Keep the address and the token; nothing is sent yet. `log_event` takes an event and its fields.

        `ca` is the PEM of the CA that verifies the operator; empty: those that the system knows.
        """
        self._url = url
        self._token = token
        self._uid = uid
        self._ca = ca
        self._log_event = log_event
        self._clock = clock
        self._connection: http.client.HTTPConnection | None = None
        self._next_request = float("-inf")
        self._pause = FIRST_PAUSE
        self._logged_failure = False

    @classmethod
    def from_env(cls, env: Mapping[str, str], log_event: LogEvent) -> CancellationClient | None:
        """Make a client of the check that the environment names; None if it names none."""
        url, token = env.get(contract.ENV_CANCELLATION_URL), env.get(contract.ENV_CANCELLATION_TOKEN)
        if not (url and token):
            return None
        ca = env.get(contract.ENV_CANCELLATION_CA, "")
        return cls(url, token, env.get(contract.ENV_RUN_UID, ""), log_event=log_event, ca=ca)

    def stop_reason(self, *, ask_now: bool = False) -> str | None:
        """Return why the stage has to stop, or None. Without `ask_now` it asks at most once a second."""
        if not ask_now and self._clock() < self._next_request:
            return None
        try:
            reason = self._ask()
        except UnreachableError as error:
            if not self._logged_failure:
                self._log_event("the cancellation check gives no answer, going on", why=str(error))
            self._logged_failure = True
            self._next_request = self._clock() + self._pause
            self._pause = min(MAX_PAUSE, 2 * self._pause)
            return None
        self._next_request, self._pause = self._clock() + INTERVAL, FIRST_PAUSE
        return reason

    def _ask(self) -> str | None:
        status, body = self._get()
        if status == _NOT_FOUND and body.get("error") == "gone":
            return "the run is gone"
        # Any other 404 is not the operator's answer: a wrong address must not look like a cancel.
        if status != _OK:
            raise UnreachableError(f"HTTP {status}: {str(body.get('message', ''))[:200]}".rstrip(": "))
        if body.get("id") != self._uid or not isinstance(body.get("cancelled"), bool):
            raise UnreachableError("HTTP 200, but no answer about this run")
        return "the run is cancelled" if body["cancelled"] else None

    def _get(self) -> tuple[int, Mapping[str, Any]]:
        """Send the request, and once more if there was no answer: the server may have closed the kept connection."""
        why = ""
        for _ in range(TRIES):
            try:
                status, text = self._send()
            except (OSError, http.client.HTTPException) as error:
                self._close()
                why = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            except ValueError:
                # Python's own message would contain the token.
                raise UnreachableError("the address or the token is malformed") from None
            if status < _SERVER_ERROR:
                return status, _json_object(text)
            why = f"HTTP {status}: {str(_json_object(text).get('message', ''))[:200]}"
        raise UnreachableError(why)

    def _send(self) -> tuple[int, bytes]:
        url = urlsplit(self._url)
        if self._connection is None:
            self._connection = self._connect(url)
        headers = {"Authorization": f"Bearer {self._token}", "User-Agent": "ingestrun-worker"}
        self._connection.request("GET", url.path, headers=headers)
        response = self._connection.getresponse()
        text = response.read(_MAX_BYTES)
        if response.length:  # the rest is not read, so the connection can't be used again
            self._close()
        return response.status, text

    def _connect(self, url: SplitResult) -> http.client.HTTPConnection:
        if url.hostname and url.scheme == "http":
            return http.client.HTTPConnection(url.hostname, url.port, timeout=TIMEOUT)
        if not url.hostname or url.scheme != "https":
            raise ValueError(f"{contract.ENV_CANCELLATION_URL} is no http URL")
        context = ssl.create_default_context(cadata=self._ca or None)
        return http.client.HTTPSConnection(url.hostname, url.port, timeout=TIMEOUT, context=context)

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _json_object(text: bytes) -> Mapping[str, Any]:
    """Return the JSON object in a response, or an empty one if it holds none."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
