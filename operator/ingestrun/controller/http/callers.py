"""Callers: their names and their rights, both by the API server, as it would decide for kubectl.

A caller shows a token of the cluster. A TokenReview tells whose it is, and a SubjectAccessReview whether that user may
do the same by kubectl. What was allowed counts for some seconds without being asked again; what was refused is asked
again each time, and takes all with it that the user was allowed.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from aiohttp import web

from ingestrun.controller.http.problems import Problem
from ingestrun.controller.http.rate_limit import Rate, RateLimiter
from ingestrun.kube.protocol import Cluster, Object
from ingestrun.model.names import GROUP, PLURAL

TOKEN_SECONDS: Final = 10.0
"""Time for which a token that was found good is not reviewed again."""
ACCESS_SECONDS: Final = 5.0
"""Time for which a right that was granted is not reviewed again."""
FAILURES: Final = Rate(per_second=0.5, burst=30)
"""Bad tokens from one address, before its requests are refused unseen: each costs the API server a review."""
MAX_TOKEN_CHARS: Final = 16_384
_MOST: Final = 10_000


@dataclass(frozen=True, slots=True)
class Caller:
    """A user, as the API server knows it."""

    name: str
    user: Object = field(repr=False)
    """The user of the TokenReview: its name, groups and what else rights may depend on."""

    @property
    def identity(self) -> str:
        """Return what is the same for the same user with the same groups alone."""
        return json.dumps(self.user, sort_keys=True)


class Callers:
    """Reviews of callers, by the API server."""

    def __init__(
        self, cluster: Cluster, *, failures: Rate = FAILURES, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Ask `cluster`; `failures` bounds the bad tokens of one address."""
        self._cluster = cluster
        self._clock = clock
        self._failures = RateLimiter(failures, clock=clock)
        self._known: dict[bytes, tuple[float, Caller]] = {}
        self._granted: dict[str, dict[tuple[str, str, str], float]] = {}

    async def authenticate(self, request: web.Request) -> Caller:
        """Return who calls. Raises Problem: 401, or 429 after too many bad tokens; KubeError."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        token = token.strip()
        if scheme.lower() != "bearer" or not token:
            raise Problem(401, "a bearer token of the cluster is needed, such as `kubectl create token` prints")
        digest = hashlib.sha256(token.encode(errors="replace")).digest()
        until, caller = self._known.pop(digest, (0.0, None))
        if caller is not None and self._clock() < until:
            self._known[digest] = until, caller
            return caller
        address = request.remote or ""
        wait = self._failures.wait(address)
        if wait > 0:
            raise Problem(429, "too many bad tokens from here", headers={"Retry-After": str(math.ceil(wait))})
        status: Object = {}
        if len(token) <= MAX_TOKEN_CHARS and token.isascii() and token.isprintable():
            status = await self._cluster.review_token(token)
        user = status.get("user") or {}
        if status.get("authenticated") is not True or not user.get("username"):
            self._failures.take(address)
            raise Problem(401, "the token is not valid in this cluster")
        caller = Caller(name=str(user["username"]), user=user)
        self._known[digest] = self._clock() + TOKEN_SECONDS, caller
        while len(self._known) > _MOST:
            del self._known[next(iter(self._known))]
        return caller

    async def may(self, caller: Caller, verb: str, *, namespace: str, name: str = "") -> bool:
        """Tell whether the caller may do that with this run, or without `name` with all of the namespace.

        Raises KubeError.
        """
        identity, right = caller.identity, (verb, namespace, name)
        if self._granted.get(identity, {}).get(right, 0.0) > self._clock():
            return True
        if not await self._cluster.review_access(user=caller.user, verb=verb, namespace=namespace, name=name):
            self._granted.pop(identity, None)
            return False
        now = self._clock()
        known = {known: until for known, until in self._granted.pop(identity, {}).items() if until > now}
        self._granted[identity] = known | {right: now + ACCESS_SECONDS}
        while len(self._granted) > _MOST:
            del self._granted[next(iter(self._granted))]
        return True

    async def may_any(self, caller: Caller, verbs: Sequence[str], *, namespace: str, name: str = "") -> bool:
        """Tell whether the caller may do one of these. Raises KubeError."""
        for verb in verbs:
            if await self.may(caller, verb, namespace=namespace, name=name):
                return True
        return False

    async def require(self, caller: Caller, *verbs: str, namespace: str, name: str = "") -> None:
        """Raise Problem (403) if the caller may do none of these. Raises KubeError."""
        if not await self.may_any(caller, verbs, namespace=namespace, name=name):
            raise Problem(403, refusal(caller, verbs[0], namespace=namespace, name=name))


def refusal(caller: Caller, verb: str, *, namespace: str, name: str = "") -> str:
    """Return the sentence that the API server has for it."""
    what = f'{PLURAL}.{GROUP} "{name}" is forbidden: ' if name else ""
    return (
        f'{what}User "{caller.name}" cannot {verb} resource "{PLURAL}" in API group "{GROUP}" in the namespace '
        f'"{namespace}"'
    )
