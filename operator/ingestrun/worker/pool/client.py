"""The client of the pool's protocol: one request at a time, one try; what to do without an answer is the caller's."""

from __future__ import annotations

import http.client
import random
from typing import Final, TypeVar

from pydantic import ValidationError

from ingestrun.model import pool
from ingestrun.model.pool import (
    ClaimAnswer,
    ClaimRequest,
    FetchedAnswer,
    FetchedRequest,
    Message,
    PublishAnswer,
    PublishRequest,
    first_fault,
)
from ingestrun.worker.operator_connection import OperatorConnection, Response

TIMEOUT: Final = 10.0
"""Seconds for an answer, beside those for which the operator may hold it back."""
FIRST_PAUSE: Final = 0.1
MAX_PAUSE: Final = 5.0
_MAX_RETRY_AFTER: Final = 60.0
_OK: Final = 200
_GONE: Final = 404
_REPLACED: Final = 409
_TOO_MANY: Final = 429
_SERVER_ERROR: Final = 500
_CLIENT_ERROR: Final = 400
_RANDOM: Final = random.SystemRandom()

Answer = TypeVar("Answer", bound=Message)


class NoAnswerError(Exception):
    """The operator gave no answer now; the text says why. `retry_after` is the wait in seconds that it asks for."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EndedError(Exception):
    """The operator has nothing to do with this worker any more; `code` is what the worker exits with."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Backoff:
    """The pauses between tries: 0.1 s, doubled up to 5 s, at random between half and whole of it."""

    def __init__(self) -> None:
        self._pause = FIRST_PAUSE

    def pause(self, error: NoAnswerError) -> float:
        """Return the seconds to wait after this error."""
        if error.retry_after is not None:
            # Never less than was asked for; a little more, because others were told the same at the same moment.
            return error.retry_after * _RANDOM.uniform(1.0, 1.2)
        pause, self._pause = self._pause, min(MAX_PAUSE, 2 * self._pause)
        return pause * _RANDOM.uniform(0.5, 1.0)


class PoolClient:
    """Sends the messages of one worker, over a connection of its own."""

    def __init__(self, url: str, token: str, ca: str | None = None) -> None:
        """Keep the address and the token; nothing is sent yet."""
        self._connection = OperatorConnection(url, token, ca=ca)

    def claim(self, request: ClaimRequest, *, timeout: float = TIMEOUT) -> ClaimAnswer:
        """Hand in reports and ask for a batch; raises as `_ask`."""
        return self._ask(pool.CLAIM, request, ClaimAnswer, timeout + request.wait_seconds)

    def fetched(self, request: FetchedRequest) -> FetchedAnswer:
        """Tell what a fetch has come to; raises as `_ask`."""
        return self._ask(pool.FETCHED, request, FetchedAnswer, TIMEOUT)

    def publish(self, request: PublishRequest) -> PublishAnswer:
        """Ask for the permission to publish; raises as `_ask`."""
        return self._ask(pool.PUBLISH, request, PublishAnswer, TIMEOUT)

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _ask(self, path: str, request: Message, kind: type[Answer], timeout: float) -> Answer:
        """Send a request.

        Raises:
            NoAnswerError: another try may get an answer.
            EndedError: no other will.
        """
        response = self._send(path, request.render(), timeout)
        if response.status == _OK:
            return _parse(response, kind)
        said = response.json_object()
        text = f"HTTP {response.status}: {str(said.get('message') or said.get('error') or '')[:200]}".rstrip(": ")
        if response.status == _TOO_MANY or response.status >= _SERVER_ERROR:
            self._connection.close()  # another replica may answer
            raise NoAnswerError(text, _seconds(response.retry_after))
        if response.status == _GONE and said.get("error") == "gone":
            raise EndedError(f"the run is gone ({text})", 0)
        if response.status == _REPLACED and "error" in said:
            raise EndedError(f"another worker has taken this one's place ({text})", 0)
        if response.status in (_GONE, _REPLACED) or response.status < _CLIENT_ERROR:
            # Of a proxy, say: a wrong address must not look like a run that is gone.
            self._connection.close()
            raise NoAnswerError(f"{text}, which is no answer of the operator's")
        raise EndedError(f"the operator refuses this worker's {path}: {text}", 1)

    def _send(self, path: str, body: bytes, timeout: float) -> Response:
        while True:
            kept = self._connection.is_open
            try:
                return self._connection.request("POST", f"/{path}", body, timeout=timeout)
            except (OSError, http.client.HTTPException) as error:
                # A kept connection may have been closed by the operator; every request may be repeated.
                if kept and not isinstance(error, TimeoutError):
                    continue
                raise NoAnswerError(f"{type(error).__name__}: {str(error)[:200]}") from None
            except ValueError:
                # Python's own message would contain the token.
                raise EndedError("the pool's address or token is malformed", 1) from None


def _parse(response: Response, kind: type[Answer]) -> Answer:
    if not response.json_object():
        raise NoAnswerError("HTTP 200, but no JSON object")
    try:
        return kind.model_validate_json(response.body)
    except ValidationError as error:
        raise EndedError(f"the operator's answer is not of this protocol: {first_fault(error)}", 1) from None


def _seconds(text: str | None) -> float | None:
    try:
        seconds = float(text or "")
    except ValueError:
        return None
    return min(_MAX_RETRY_AFTER, seconds) if seconds >= 0 else None
