"""The API server's refusals of an object, told apart by their sentence.

The sentence is all that is left of a refusal in the Event of a controller that was refused.
"""

from __future__ import annotations

import re
from typing import Final

_NOT_CALLED: Final = re.compile(r"failed calling webhook|failed to call webhook")
"""The API server's words for each way in which a call fails: no Service, no endpoint, refused, time-out, x509, 5xx."""
_DENIED: Final = re.compile(r"admission webhook \".*denied the request", re.S)


def webhook_not_called(message: str) -> bool:
    """Tell whether an admission webhook could not be called. One that denies was called, whatever it says."""
    return _NOT_CALLED.search(message) is not None and _DENIED.search(message) is None


def quota_exceeded(message: str) -> bool:
    """Tell whether a ResourceQuota has no room for the object."""
    return "exceeded quota" in message
