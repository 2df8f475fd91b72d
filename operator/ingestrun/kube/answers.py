"""What an answer of the API server means: the one place that turns HTTP into our errors.

The API server explains itself in a `Status` body (reason, message, details.causes). Proxies in front of it
answer with HTML or nothing; then the HTTP status alone decides.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from ingestrun.kube.errors import (
    AlreadyExists,
    Conflict,
    Denied,
    Forbidden,
    Invalid,
    KubeError,
    NamespaceTerminating,
    NotFound,
    QuotaExceeded,
    Unavailable,
    Unknown,
    WebhookUnavailable,
)

READS = frozenset({"GET", "HEAD"})

_DENIED: Final = re.compile(
    r"ValidatingAdmissionPolicy '.*denied request|^admission webhook \".*denied the request", re.S
)
"""How the API server begins what an admission policy or a webhook says; a policy's own status is 422 unless it names a
reason, a webhook's is 403 unless it names a code."""
_WEBHOOK: Final = re.compile(r"failed calling webhook \"|^admission webhook \".*denied the request", re.S)


def error_for(status: int, body: bytes, *, method: str) -> KubeError:
    """The error that a non-2xx answer stands for.

    The question behind every branch is "did the server do anything?". A 4xx is a refusal: it did nothing.
    A 5xx to a write may hide a change that was stored (etcd may commit a proposal whose answer was lost, and
    503 and 504 are also sent by proxies after they passed the request on), so it is Unknown; 429 is sent
    before a request is handled at all.
    """
    answer = _status_body(body)
    reason = str(answer.get("reason") or "")
    said = str(answer.get("message") or "") or f"HTTP {status} to {method}"
    kind = _kind(status, reason, said, _causes(answer), method)
    return kind(said)


def _kind(status: int, reason: str, said: str, causes: frozenset[str], method: str) -> type[KubeError]:
    if _DENIED.search(said) and 400 <= status < 500 and status != 429:
        return Denied
    if status == 404:
        return NotFound
    if status == 409:
        if reason == "AlreadyExists":
            return AlreadyExists
        # A create conflicts only inside admission: the quota's own bookkeeping lost a race. Nothing was done.
        return Unavailable if method == "POST" else Conflict
    if status == 403:
        if "NamespaceTerminating" in causes:
            return NamespaceTerminating
        return QuotaExceeded if "exceeded quota" in said else Forbidden
    if status == 401:
        return Forbidden
    if status in (400, 422):
        return Invalid
    if status == 429:
        return Unavailable
    if status >= 500:
        # Admission comes before storage: an object that a webhook has kept from passing is not stored.
        if method not in READS and _WEBHOOK.search(said):
            return WebhookUnavailable
        return Unavailable if method in READS else Unknown
    if status == 410 and method in READS:
        return Expired
    # What is left is a refusal or a redirect that no API server sends (405, 406, 413, 415, 3xx).
    return Invalid


class Expired(Unavailable):
    """410 to a list: its continue token is too old, so start again. Stays inside this package."""


def _status_body(body: bytes) -> Mapping[str, Any]:
    try:
        answer = json.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _causes(answer: Mapping[str, Any]) -> frozenset[str]:
    details = answer.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    if not isinstance(causes, list):
        return frozenset()
    return frozenset(str(cause.get("reason")) for cause in causes if isinstance(cause, dict))
