"""What can go wrong between us and the API server, as few named types; mapped once, in `client`."""

from __future__ import annotations


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
    """403 by RBAC, or 401: we lack a right, or a plug-in of the server's refuses."""


class Denied(Forbidden):
    """An admission policy or webhook has said no to the object (403 mostly, else whatever 4xx it chose)."""


class Invalid(KubeError):
    """400 or 422: the server will never take this object; a retry is of no use."""


class Unavailable(KubeError):
    """Nothing was done: the request was not sent, or was refused for now (429), or it was a read that failed."""


class WebhookUnavailable(Unavailable):
    """5xx to a write, for an admission webhook that could not be called or that failed. Nothing was stored."""


class Unknown(KubeError):
    """No answer, or a 5xx after the request was sent: done or not, nobody knows yet."""
