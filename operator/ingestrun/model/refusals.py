"""The API server's refusals of an object, told apart by their sentence.

The sentence is all that is left of a refusal in the Event of a controller that was refused.
"""

from __future__ import annotations

import re
from typing import Final

_NOT_CALLED: Final = re.compile(r"failed calling webhook|failed to call webhook")
"""The API server's words for each way in which a call fails: no Service, no endpoint, refused, time-out, x509, 5xx."""
_SERVER_FAILED: Final = re.compile(
    r"^Internal error occurred"
    r"|^etcdserver: "
    r'|^(?:Post|Get|Put|Patch) "https?://'
    r"|^Timeout: |^the server (?:is currently unable|was unable|has received too many)"
    r"|has prevented the request from succeeding"
    r"|^stream error|^http2: |unexpected EOF$|context deadline exceeded$|^client rate limiter"
)
"""Beginnings and ends of what is no refusal: the server has failed, or could not be reached, or was too slow."""
_STREAM: Final = re.compile(r"stream ID \d+; ")
_DENIED: Final = re.compile(r"admission webhook \".*denied the request", re.S)


def webhook_not_called(message: str) -> bool:
    """Tell whether an admission webhook could not be called. One that denies was called, whatever it says."""
    return _NOT_CALLED.search(message) is not None and _DENIED.search(message) is None


def quota_exceeded(message: str) -> bool:
    """Tell whether a ResourceQuota has no room for the object."""
    return "exceeded quota" in message


def server_failed(message: str) -> bool:
    """Tell whether the API server, or the way to it, has failed, so that it says nothing about the object."""
    return _SERVER_FAILED.search(message) is not None


def without_stream(message: str) -> str:
    """Return the sentence without the number of an HTTP/2 stream, which is another each time."""
    return _STREAM.sub("", message)
