"""A connection to the operator's HTTP API, kept open between requests.

It does not use httpx, because that takes as long to load as all else that a worker needs for its first claim, and
because a proxy that is set for the source must not be used for the operator.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

_MAX_BYTES: Final = 65_536


@dataclass(frozen=True)
class Response:
    """An answer: its status, its Retry-After, and its body."""

    status: int
    retry_after: str | None
    body: bytes

    def json_object(self) -> Mapping[str, Any]:
        """Return the JSON object in the body, or an empty one if it holds none."""
        try:
            body = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return body if isinstance(body, dict) else {}


class OperatorConnection:
    """Sends requests with a bearer token to one server, one after another."""

    def __init__(self, url: str, token: str, *, ca: str | None = None) -> None:
        """Keep the address and the token; nothing is sent yet.

        `ca` is the certificate, in PEM, of the authority that signed the server's, in place of the system's.
        """
        self._url = url
        self._token = token
        self._ca = ca
        self._connection: http.client.HTTPConnection | None = None

    @property
    def is_open(self) -> bool:
        """True if an earlier request's connection is kept. The server may have closed it meanwhile."""
        return self._connection is not None

    def request(self, method: str, path: str = "", body: bytes | None = None, *, timeout: float) -> Response:
        """Send a request to the URL with `path` appended, and read the answer.

        The connection is kept if the whole answer was read, and closed if anything is raised.

        Raises:
            OSError: there was no answer (in time).
            http.client.HTTPException: the answer was no HTTP.
            ValueError: the address, the certificate or the token is malformed. Python's own text may hold the token.
        """
        headers = {"Authorization": f"Bearer {self._token}", "User-Agent": "ingestrun-worker"}
        if body is not None:
            headers["Content-Type"] = "application/json"
        try:
            if self._connection is None:
                self._connection = self._open(timeout)
            self._connection.timeout = timeout
            if self._connection.sock is not None:
                self._connection.sock.settimeout(timeout)
            self._connection.request(method, urlsplit(self._url).path + path, body=body, headers=headers)
            response = self._connection.getresponse()
            text = response.read(_MAX_BYTES)
            if response.length:  # the rest is not read, so the connection can't be used again
                self.close()
        except BaseException:
            self.close()
            raise
        return Response(response.status, response.headers.get("retry-after"), text)

    def close(self) -> None:
        """Close the connection; the next request opens another."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _open(self, timeout: float) -> http.client.HTTPConnection:
        url = urlsplit(self._url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError("the operator's address is no http URL")
        if url.scheme == "http":
            return http.client.HTTPConnection(url.hostname, url.port, timeout=timeout)
        context = ssl.create_default_context(cadata=self._ca) if self._ca else ssl.create_default_context()
        return http.client.HTTPSConnection(url.hostname, url.port, timeout=timeout, context=context)
