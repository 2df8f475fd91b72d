"""The tokens of the cancellation check, one for each Job and valid for its own run alone, and the key behind them.

A token is an HMAC over the run's namespace, name and UID and an expiry, so no replica has to remember any. All
replicas take the key from one Secret.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from typing import Final

from ingestrun.controller.http.shared_secret import Data, SharedSecret
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, RunKey

SECRET_NAME: Final = "ingestrun-operator-check-key"  # noqa: S105  (the object's name)
SECRET_FIELD: Final = "key"  # noqa: S105  (the field's name)
KEY_BYTES: Final = 32
_TOKEN: Final = re.compile(r"v1\.(?P<expiry>[0-9]{1,12})\.(?P<uid>[A-Za-z0-9-]{1,63})\.(?P<mac>[A-Za-z0-9_-]{43})")

_WORKER_TOKEN: Final = re.compile(
    r"w1\.(?P<expiry>[0-9]{1,12})\.(?P<uid>[A-Za-z0-9-]{1,63})\.(?P<worker>[0-9]{1,10})\.(?P<mac>[A-Za-z0-9_-]{43})"
)


class TokenError(Exception):
    """A token that is not accepted; its text has the reason, and no part of the token."""


class NoTokenError(TokenError):
    """A token that is not valid for any run, because it is missing, malformed or expired (401)."""


class ForeignTokenError(TokenError):
    """A token of another run, or not made with this operator's key (403)."""


def issue(key: bytes, run: RunKey, *, uid: str, expiry: int) -> str:
    """Return the token with which the run's pods may ask about the run until `expiry` (Unix seconds)."""
    return f"v1.{expiry}.{uid}.{_mac(key, run, uid, expiry)}"


def is_token_of_check(token: str) -> bool:
    """Tell whether it has the form of one of these tokens; one of the cluster has another."""
    return token.startswith("v1.")


def verify(key: bytes, run: RunKey, token: str, *, now: float) -> str:
    """Return the UID of the run that the token is for.

    Raises:
        NoTokenError: missing, malformed or expired.
        ForeignTokenError: not for the run of that namespace and name, or of another key.
    """
    if not token:
        raise NoTokenError("a bearer token is needed: the pod's INGEST_CANCELLATION_TOKEN")
    match = _TOKEN.fullmatch(token)
    if match is None:
        raise NoTokenError("the token is not one of the cancellation check")
    return _uid_of(key, run, match, now=now, foreign="the token is for another run, or of a key that was replaced")


def issue_for_worker(key: bytes, run: RunKey, *, uid: str, worker: int, expiry: int) -> str:
    """Return the token with which one worker of the run's pool may ask until `expiry` (Unix seconds)."""
    return f"w1.{expiry}.{uid}.{worker}.{_mac(key, run, uid, expiry, worker=worker)}"


def verify_worker(key: bytes, run: RunKey, token: str, *, now: float) -> tuple[str, int]:
    """Return the UID of the run and the number of the worker that the token is for.

    Raises:
        NoTokenError: missing, malformed or expired.
        ForeignTokenError: not for the run of that namespace and name, or of another key.
    """
    match = _WORKER_TOKEN.fullmatch(token)
    if match is None:
        raise NoTokenError("the token is not one of a pool's worker: it is the pod's INGEST_POOL_TOKEN")
    worker = int(match["worker"])
    foreign = "the token is for another run or worker, or of a key that was replaced"
    return _uid_of(key, run, match, now=now, worker=worker, foreign=foreign), worker


def _uid_of(
    key: bytes, run: RunKey, match: re.Match[str], *, now: float, foreign: str, worker: int | None = None
) -> str:
    """Return the UID in a token of the right form. Raises ForeignTokenError, which says `foreign`; NoTokenError."""
    expiry, uid = int(match["expiry"]), match["uid"]
    if not hmac.compare_digest(_mac(key, run, uid, expiry, worker=worker), match["mac"]):
        raise ForeignTokenError(foreign)
    if now >= expiry:
        raise NoTokenError("the token has expired: its Job was created too long ago")
    return uid


def _mac(key: bytes, run: RunKey, uid: str, expiry: int, *, worker: int | None = None) -> str:
    purpose = ("cancellation-check",) if worker is None else ("pool", str(worker))
    text = "\n".join((f"ingestrun.dev/{purpose[0]}", "v1", run.namespace, run.name, uid, str(expiry), *purpose[1:]))
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class CheckKey(SharedSecret):
    """The key that all replicas share, as last read by this replica."""

    what = "the key of the cancellation check"

    def __init__(self, cluster: Cluster, *, namespace: str, alone: bool) -> None:
        """Start without a key; `alone` as in `SharedSecret`."""
        super().__init__(cluster, namespace=namespace, name=SECRET_NAME, alone=alone)
        self.value: bytes | None = None
        """The key; None until the Secret could be read. Without a key no token is issued, and none is accepted."""

    def renewed(self, data: Data) -> Data | None:
        """Return a new key if there is none. Raises KubeError if there is one that is malformed."""
        key = data.get(SECRET_FIELD)
        if not key:
            return {SECRET_FIELD: secrets.token_bytes(KEY_BYTES)}
        if len(key) < KEY_BYTES:
            raise KubeError(
                f"the Secret's {SECRET_FIELD!r} has fewer than {KEY_BYTES} bytes: delete it, and a new one is made"
            )
        return None

    def take(self, data: Data) -> None:
        """Use the key."""
        self.value = data[SECRET_FIELD]
