"""The tokens of the cancellation check, one for each Job and valid for its own run alone, and the key behind them.

A token is an HMAC over the run's namespace, name and UID and an expiry, so no replica has to remember any. All
replicas take the key from one Secret, which the first of them fills by compare-and-set, so that two
replicas which race end with the same key.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import hashlib
import hmac
import re
import secrets
from typing import Final, NoReturn

import structlog

from ingestrun.kube.errors import Conflict, Forbidden, KubeError, NotFound
from ingestrun.kube.protocol import Cluster, Object, RunKey

logger = structlog.get_logger("ingestrun.check")

SECRET_NAME: Final = "ingestrun-operator-check-key"  # noqa: S105  (the object's name)
SECRET_FIELD: Final = "key"  # noqa: S105  (the field's name)
KEY_BYTES: Final = 32
REFRESH_SECONDS: Final = 60.0
"""Interval at which the Secret is read again, and so the time for which a replica may use a replaced key."""
RETRY_SECONDS: Final = 5.0
_ROUNDS: Final = 5
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
    expiry, uid = int(match["expiry"]), match["uid"]
    if not hmac.compare_digest(_mac(key, run, uid, expiry), match["mac"]):
        raise ForeignTokenError("the token is for another run, or of a key that was replaced")
    if now >= expiry:
        raise NoTokenError("the token has expired: its Job was created too long ago")
    return uid


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
    expiry, uid, worker = int(match["expiry"]), match["uid"], int(match["worker"])
    if not hmac.compare_digest(_mac(key, run, uid, expiry, worker=worker), match["mac"]):
        raise ForeignTokenError("the token is for another run or worker, or of a key that was replaced")
    if now >= expiry:
        raise NoTokenError("the token has expired: its Job was created too long ago")
    return uid, worker


def _mac(key: bytes, run: RunKey, uid: str, expiry: int, *, worker: int | None = None) -> str:
    purpose = ("cancellation-check",) if worker is None else ("pool", str(worker))
    text = "\n".join((f"ingestrun.dev/{purpose[0]}", "v1", run.namespace, run.name, uid, str(expiry), *purpose[1:]))
    digest = hmac.new(key, text.encode(), hashlib.sha256).digest()
    return base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


class CheckKey:
    """The key that all replicas share, as last read by this replica."""

    def __init__(self, cluster: Cluster, *, namespace: str, alone: bool) -> None:
        """Start without a key. With `alone` (no cluster, so no shared Secret) the process makes its own key."""
        self._cluster = cluster
        self._namespace = namespace
        self._alone = alone
        self._complained = False
        self.value: bytes | None = None
        """The key; None until the Secret could be read. Without a key no token is issued, and none is accepted."""

    async def refresh(self) -> None:
        """Read the key, and fill the Secret if it has none. Raises KubeError; then a known key stays."""
        for _ in range(_ROUNDS):
            try:
                secret = await self._cluster.get_secret(namespace=self._namespace, name=SECRET_NAME)
            except (NotFound, Forbidden):
                if not self._alone:
                    raise
                self.value = self.value or secrets.token_bytes(KEY_BYTES)
                return
            found = _read(secret)
            if found is not None:
                self.value = found
                return
            made = base64.b64encode(secrets.token_bytes(KEY_BYTES)).decode()
            try:
                stored = await self._cluster.replace_secret({**secret, "data": {SECRET_FIELD: made}})
            except Conflict:
                continue
            self.value = _read(stored)
            logger.info("made the key of the cancellation check", secret=f"{self._namespace}/{SECRET_NAME}")
            return
        raise Conflict(f"the Secret {SECRET_NAME} changed {_ROUNDS} times while its key was made")

    async def try_refresh(self) -> bool:
        """Call `refresh`; a failure is logged, once until it works again."""
        try:
            await self.refresh()
        except KubeError as error:
            if not self._complained:
                logger.warning(
                    "the key of the cancellation check could not be had: pods go on without it",
                    secret=f"{self._namespace}/{SECRET_NAME}",
                    error=str(error),
                )
            self._complained = True
            return False
        self._complained = False
        return True

    async def keep(self) -> NoReturn:
        """Refresh for ever, because a key may be replaced, or may not have been readable at first."""
        while True:
            done = await self.try_refresh()
            await asyncio.sleep(REFRESH_SECONDS if done else RETRY_SECONDS)


def _read(secret: Object) -> bytes | None:
    """Return the key in the Secret; None if it is still to be made. Raises KubeError if the key is malformed."""
    text = (secret.get("data") or {}).get(SECRET_FIELD)
    if not text:
        return None
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) < KEY_BYTES:
        raise KubeError(
            f"the Secret's {SECRET_FIELD!r} has fewer than {KEY_BYTES} bytes: delete it, and a new one is made"
        )
    return key
