"""Asks the operator whether the run is cancelled. This pod's work was claimed before it was made: no answer is a no."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from ingestrun.model import contract

INTERVAL: Final = 1.0
"""Seconds between two questions, at least: the operator itself looks no oftener."""
TIMEOUT: Final = 2.0
TRIES: Final = 2
FIRST_PAUSE: Final = 5.0
LONGEST_PAUSE: Final = 60.0
"""How long the next question waits after one without an answer; it doubles, so that a dead operator costs little."""
_MAX_BYTES: Final = 65_536
_OK: Final = 200
_NOT_FOUND: Final = 404
_SERVER_ERROR: Final = 500

Tell = Callable[..., None]


class UnreachableError(Exception):
    """No answer that means anything; its text says why."""


class CancellationCheck:
    """The check of this pod's run.

    Not by httpx: two of three stages need it for nothing else, and a proxy that is set for the source
    must not be asked for the operator.
    """

    def __init__(
        self, url: str, token: str, uid: str, *, tell: Tell, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`tell` takes what is to be logged: an event and its fields."""
        self._url = url
        self._token = token
        self._uid = uid
        self._tell = tell
        self._clock = clock
        self._connection: http.client.HTTPConnection | None = None
        self._next = float("-inf")
        self._pause = FIRST_PAUSE
        self._complained = False

    @classmethod
    def of(cls, env: Mapping[str, str], tell: Tell) -> CancellationCheck | None:
        """The check that the environment names, if it names one."""
        url, token = env.get(contract.ENV_CANCELLATION_URL), env.get(contract.ENV_CANCELLATION_TOKEN)
        return cls(url, token, env.get(contract.ENV_RUN_UID, ""), tell=tell) if url and token else None

    def ask(self, *, now: bool = False) -> str | None:
        """Why to stop, as a sentence; None to go on. Asks at most once a second, but with `now` in any case."""
        if not now and self._clock() < self._next:
            return None
        try:
            verdict = self._verdict()
        except UnreachableError as error:
            if not self._complained:
                self._tell("the cancellation check gives no answer, going on", why=str(error))
            self._complained = True
            self._next = self._clock() + self._pause
            self._pause = min(LONGEST_PAUSE, 2 * self._pause)
            return None
        self._next, self._pause = self._clock() + INTERVAL, FIRST_PAUSE
        return verdict

    def _verdict(self) -> str | None:
        status, body = self._get()
        if status == _NOT_FOUND and body.get("error") == "gone":
            return "the run is gone"
        # Any other 404 is not the operator's word: a wrong address must not look like a cancel.
        if status != _OK:
            raise UnreachableError(f"HTTP {status}: {str(body.get('message', ''))[:200]}".rstrip(": "))
        if body.get("id") != self._uid or not isinstance(body.get("cancelled"), bool):
            raise UnreachableError("HTTP 200, but no answer about this run")
        return "the run is cancelled" if body["cancelled"] else None

    def _get(self) -> tuple[int, Mapping[str, Any]]:
        """Ask, and once more if there was no answer: a kept connection may have been closed meanwhile."""
        why = ""
        for _ in range(TRIES):
            try:
                status, text = self._try()
            except (OSError, http.client.HTTPException) as error:
                self._hang_up()
                why = f"{type(error).__name__}: {str(error)[:200]}"
                continue
            except ValueError:
                # Python's own words would have the token.
                raise UnreachableError("the address or the token is malformed") from None
            if status < _SERVER_ERROR:
                return status, _object(text)
            why = f"HTTP {status}: {str(_object(text).get('message', ''))[:200]}"
        raise UnreachableError(why)

    def _try(self) -> tuple[int, bytes]:
        url = urlsplit(self._url)
        if self._connection is None:
            kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
            kind = kinds.get(url.scheme)
            if kind is None or not url.hostname:
                raise ValueError(f"{contract.ENV_CANCELLATION_URL} is no http URL")
            self._connection = kind(url.hostname, url.port, timeout=TIMEOUT)
        headers = {"Authorization": f"Bearer {self._token}", "User-Agent": "ingestrun-worker"}
        self._connection.request("GET", url.path, headers=headers)
        response = self._connection.getresponse()
        text = response.read(_MAX_BYTES)
        if response.length:  # more than that: not ours, and not to be read on
            self._hang_up()
        return response.status, text

    def _hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _object(text: bytes) -> Mapping[str, Any]:
    """The JSON object in an answer; an empty one where there is none."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
