"""The errors of a call to the API server, and the one place that maps an HTTP answer to one of them.

The API server explains itself in a `Status` body (reason, message, details.causes). Proxies in front of it
answer with HTML or nothing; then the HTTP status alone decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

import orjson

from ingestrun.model.refusals import quota_exceeded, webhook_not_called

READS = frozenset({"GET", "HEAD"})


class KubeError(Exception):
    """A call to the API server that did not succeed; its text is the server's own sentence where there is one."""


class NotFound(KubeError):
    """404: the object, or its namespace, does not exist."""


class NamespaceTerminating(NotFound):
    """403 on a create: its namespace is being deleted."""


class Conflict(KubeError):
    """409: the object has changed since the resourceVersion that the write carried. Read again, decide again."""


class AlreadyExists(KubeError):
    """409 on a create: an object of that name is there."""


class QuotaExceeded(KubeError):
    """403 by a ResourceQuota: no room now, perhaps later."""


class Forbidden(KubeError):
    """403 by RBAC, or 401: the operator lacks a right, or a plug-in of the server refuses."""


class Denied(Forbidden):
    """An admission policy or webhook denied the object (403 mostly, or another 4xx that it names)."""


class Invalid(KubeError):
    """400 or 422: the server will never take this object; a retry is of no use."""


class Unavailable(KubeError):
    """Nothing was done: the request was not sent, or was refused for now (429), or it was a read that failed."""


class Expired(Unavailable):
    """410 to a list: its continue token is too old, so the list has to start again."""


class WebhookUnavailable(Unavailable):
    """5xx to a write, because an admission webhook could not be called or failed. Nothing was stored."""


class Unknown(KubeError):
    """No answer, or a 5xx after the request was sent: the write may or may not have happened."""


_DENIED: Final = re.compile(
    r"ValidatingAdmissionPolicy '.*denied request|^admission webhook \".*denied the request", re.S
)
"""Beginning of the message of a policy or a webhook that denied; a policy's own status is 422 unless it
names a reason, a webhook's is 403 unless it names a code."""
_WEBHOOK_DENIED: Final = re.compile(r"^admission webhook \".*denied the request", re.S)
_BY_STATUS: Final[Mapping[int, type[KubeError]]] = {404: NotFound, 401: Forbidden, 429: Unavailable}
"""Errors by the status alone. All others below 500 are Invalid: 400 and 422, and refusals or redirects that no API
server sends (405, 406, 413, 415, 3xx)."""


def error_for(status: int, body: bytes, *, method: str) -> KubeError:
    """Return the error that a non-2xx answer stands for.

    The question behind every branch is "did the server do anything?". A 4xx is a refusal: it did nothing.
    A 5xx to a write may hide a change that was stored (etcd may commit a proposal whose answer was lost, and
    503 and 504 are also sent by proxies after they passed the request on), so it is Unknown; 429 is sent
    before a request is handled at all.
    """
    answer = _status_body(body)
    message = str(answer.get("message") or "") or f"HTTP {status} to {method}"
    return _kind(status, answer, message, method)(message)


def _kind(status: int, answer: Mapping[str, Any], message: str, method: str) -> type[KubeError]:
    if status >= 500:
        return _server_error(message, method)
    if 400 <= status < 500 and status != 429 and _DENIED.search(message):
        return Denied
    if status == 409:
        return _conflict(str(answer.get("reason") or ""), method)
    if status == 403:
        return _forbidden(_causes(answer), message)
    if status == 410 and method in READS:
        return Expired
    return _BY_STATUS.get(status, Invalid)


def _server_error(message: str, method: str) -> type[KubeError]:
    if method in READS:
        return Unavailable
    # Admission comes before storage: an object that a webhook has kept from passing is not stored.
    return WebhookUnavailable if webhook_not_called(message) or _WEBHOOK_DENIED.search(message) else Unknown


def _conflict(reason: str, method: str) -> type[KubeError]:
    if reason == "AlreadyExists":
        return AlreadyExists
    # A create conflicts only inside admission: the quota's own bookkeeping lost a race. Nothing was done.
    return Unavailable if method == "POST" else Conflict


def _forbidden(causes: frozenset[str], message: str) -> type[KubeError]:
    if "NamespaceTerminating" in causes:
        return NamespaceTerminating
    return QuotaExceeded if quota_exceeded(message) else Forbidden


def _status_body(body: bytes) -> Mapping[str, Any]:
    try:
        answer = orjson.loads(body)
    except ValueError:
        return {}
    return answer if isinstance(answer, dict) else {}


def _causes(answer: Mapping[str, Any]) -> frozenset[str]:
    details = answer.get("details")
    causes = details.get("causes") if isinstance(details, dict) else None
    if not isinstance(causes, list):
        return frozenset()
    return frozenset(str(cause.get("reason")) for cause in causes if isinstance(cause, dict))
