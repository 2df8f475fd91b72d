"""Leader election by a Lease: one replica acts, and its process ends when it loses the lease.

The election of `kubernetes.aio.leaderelection` is not used, because it would let two replicas act: it measures by
the wall clock, has no time-out on its requests (a leader that can't reach the server goes on leading), ends on a
time-out, and keeps the lease on a clean exit. The Lease itself has the fields that client-go and that library write.

Why two never act at once. All times are of one replica's own monotonic clock; no two clocks are compared.

    t0                   the leader begins the renewal that turns out its last successful one
    t0 + renew_deadline  at the latest it knows that it leads no more: `is_leading` is a comparison with the
                         clock, so that it also holds after a stall of the whole process, and it is asked right
                         before each write is sent (`Connection.may_write`)
    + request_timeout    its last write has been answered or timed out, here and on the server
    t0 + lease_seconds   the soonest that another may take the lease: it counts from when it *saw* that renewal

so with renew_deadline + request_timeout <= lease_seconds the last write ends before the next leader's first. By
default 10 s + 5 s <= 15 s. No time-out can bound a request that was sent, then stuck in the network, and reached the
server after its connection was given up. For such a request there is the fence (the admission policy), and every
write of status carries a resourceVersion.
"""

from __future__ import annotations

import asyncio
import logging
import random
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

from ingestrun.kube.connection import Connection
from ingestrun.kube.errors import NotFound
from ingestrun.kube.protocol import Object
from ingestrun.kube.server_clock import CLOCK, Clock

logger = logging.getLogger(__name__)


class LeaseLost(Exception):  # noqa: N818  (a fact, not an error of the caller's)
    """The lease could not be renewed in time, or another holds it: the process has to end at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSettings:
    """The times of the election, in seconds. Raises ValueError, with a sentence, if they would let two replicas act."""

    lease_seconds: int = 15
    """Seconds that others wait from the last renewal they saw. Whole seconds: the Lease's field is an integer."""
    renew_deadline: float = 10.0
    """Seconds after the start of its last successful renewal, at which the leader gives up."""
    retry_period: float = 2.0
    """Seconds between two tries; a follower adds jitter."""
    request_timeout: float = 5.0
    """The time-out of the leader's other requests, see `Connection`."""

    def __post_init__(self) -> None:
        if self.lease_seconds != int(self.lease_seconds):
            raise ValueError(f"lease_seconds has to be whole seconds, not {self.lease_seconds}")
        if min(self.lease_seconds, self.renew_deadline, self.retry_period) < 1 or self.request_timeout <= 0:
            raise ValueError("the lease's times have to be at least 1 second, the request time-out above 0")
        if self.renew_deadline + self.request_timeout > self.lease_seconds:
            raise ValueError(
                f"renew_deadline ({self.renew_deadline:g} s) + request_timeout ({self.request_timeout:g} s) exceed "
                f"lease_seconds ({self.lease_seconds} s): the last request of a replica that has lost the lease "
                "could end after another has taken it"
            )
        if self.retry_period * 1.2 >= self.renew_deadline:
            raise ValueError(
                f"retry_period ({self.retry_period:g} s) leaves no second try within renew_deadline "
                f"({self.renew_deadline:g} s)"
            )

    @property
    def attempt_timeout(self) -> float:
        """For one try, a read and a write: a third of the deadline, so that one stall does not lose the lease."""
        return self.renew_deadline / 3


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseRecord:
    """Holder of a Lease, for how long and since when. A candidate that sees it unchanged has seen no renewal."""

    holder: str
    """Empty: nobody, the lease was given back."""
    duration_seconds: int
    acquired: str
    renewed: str

    @classmethod
    def of(cls, lease: Object) -> LeaseRecord:
        """Read the record of a Lease, given its JSON."""
        spec = lease.get("spec") or {}
        return cls(
            holder=spec.get("holderIdentity") or "",
            duration_seconds=spec.get("leaseDurationSeconds") or 0,
            acquired=spec.get("acquireTime") or "",
            renewed=spec.get("renewTime") or "",
        )


class LeaseClient:
    """The calls on one Lease object. They raise KubeError: AlreadyExists or Conflict when another was faster."""

    def __init__(self, connection: Connection, *, namespace: str, name: str) -> None:
        self._connection = connection
        self._collection = f"/apis/coordination.k8s.io/v1/namespaces/{quote(namespace, safe='')}/leases"
        self._name = name

    async def read(self) -> Object | None:
        """Read the Lease; return None if there is none."""
        try:
            return await self._connection.request("GET", self._path)
        except NotFound:
            return None

    async def create(self, spec: Object) -> None:
        """Store a new Lease."""
        body = {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": self._name},
            "spec": spec,
        }
        await self._connection.request("POST", self._collection, body=body)

    async def replace(self, lease: Object, changes: Object) -> None:
        """Store `changes` to the spec of the Lease that was read, if it has not changed since."""
        if not lease["metadata"].get("resourceVersion"):
            # Without one the server replaces the Lease as it is now, even if another has just taken it.
            raise ValueError("a Lease without a resourceVersion can't be replaced")
        body = {**lease, "spec": {**(lease.get("spec") or {}), **changes}}
        await self._connection.request("PUT", self._path, body=body)

    @property
    def _path(self) -> str:
        return f"{self._collection}/{quote(self._name, safe='')}"


class Election:
    """One candidate. `acquire` returns once it leads, `renew_loop` once it leads no more."""

    def __init__(
        self,
        lease: LeaseClient,
        identity: str,
        settings: LeaseSettings,
        *,
        clock: Clock = CLOCK,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self._lease = lease
        self._identity = identity
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._observed: LeaseRecord | None = None
        self._observed_at = 0.0
        self._renewed_at: float | None = None
        self._taken = False
        self._version = 0

    def is_leading(self) -> bool:
        """Decide by the clock alone: true until `renew_deadline` after the start of the last successful renewal."""
        return (
            self._renewed_at is not None
            and not self._taken
            and self._clock() < self._renewed_at + self._settings.renew_deadline
        )

    async def acquire(self) -> None:
        """Try until this candidate leads."""
        while not (await self.try_acquire_or_renew() and self.is_leading()):
            # The lease may have been won, but so slowly that the deadline has passed already.
            self._renewed_at = None
            await asyncio.sleep(self._settings.retry_period * (1 + self._jitter()))

    async def renew_loop(self) -> None:
        """Renew until the deadline passes without success, or another holds the lease."""
        while self._renewed_at is not None and self.is_leading():
            left = self._renewed_at + self._settings.renew_deadline - self._clock()
            try:
                async with asyncio.timeout(left):
                    renewed = False
                    while not (renewed or self._taken):
                        await asyncio.sleep(self._settings.retry_period)
                        renewed = await self.try_acquire_or_renew()
            except TimeoutError:
                break
        self._taken = True

    async def try_acquire_or_renew(self) -> bool:
        """Try once; return whether this candidate holds the lease. Any error, a stall included, is a failed try."""
        began = self._clock()
        try:
            async with asyncio.timeout(self._settings.attempt_timeout):
                held = await self._attempt()
        except Exception as error:  # any: this loop has to outlive what a server, a proxy or a network can send
            logger.warning("the lease could not be read or renewed: %s", error or type(error).__name__)
            return False
        if held:
            self._renewed_at = began
        return held

    async def release(self) -> None:
        """Give the lease back, so that the next replica need not wait until it expires. Never raises."""
        self._renewed_at = None
        try:
            async with asyncio.timeout(self._settings.attempt_timeout):
                lease = await self._lease.read()
                if lease is not None and LeaseRecord.of(lease).holder == self._identity:
                    await self._lease.replace(lease, {"holderIdentity": ""})
        except Exception as error:  # any, as above; the process is about to end
            logger.warning("the lease could not be given back and will expire: %s", error or type(error).__name__)

    async def _attempt(self) -> bool:
        lease = await self._lease.read()
        now = self._clock()
        if lease is None:
            # A Lease that was deleted under its holder still binds those who saw it.
            if self._another_may_lead(now):
                return False
            await self._lease.create(self._hold())
            return True
        if self._went_back(lease):
            return False
        record = LeaseRecord.of(lease)
        if record.holder and not self._may_take(record, now):
            return False
        await self._lease.replace(lease, self._hold(lease))
        return True

    def _went_back(self, lease: Object) -> bool:
        """Tell a leader that the Lease is older than it has seen it, so that it has to end.

        Then the API server's data were restored from a backup. All that the leader knows may be undone, and its watches
        wait for versions that were given out before. A new process begins with what there is.
        """
        text = str(lease["metadata"].get("resourceVersion", ""))
        before, self._version = self._version, int(text) if text.isdigit() else 0
        if self._renewed_at is None or self._version >= before:
            return False
        logger.warning("the lease has gone back in time (restored from a backup?): this replica ends, to begin anew")
        self._taken = True
        return True

    def _may_take(self, record: LeaseRecord, now: float) -> bool:
        """Tell whether this candidate may renew or take a lease that has a holder; note when it was seen to change."""
        if record != self._observed:
            self._observed, self._observed_at = record, now
        if record.holder == self._identity:
            return True
        if self._renewed_at is not None:
            self._taken = True
            return False
        return not self._another_may_lead(now)

    def _another_may_lead(self, now: float) -> bool:
        """Tell whether the holder last seen could still act: by its own lease's duration, if that is longer."""
        seen = self._observed
        if seen is None or seen.holder == self._identity:
            return False
        duration = max(self._settings.lease_seconds, seen.duration_seconds)
        return now < self._observed_at + duration

    def _hold(self, lease: Object | None = None) -> Object:
        """Build what the Lease's spec says once this candidate holds it, from the Lease as it is.

        The wall clock is for people only: no candidate compares it with its own.
        """
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")  # noqa: TID251  (for people, as said)
        held: dict[str, Any] = {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": int(self._settings.lease_seconds),
            "acquireTime": now,
            "renewTime": now,
        }
        if lease is not None:
            before = LeaseRecord.of(lease)
            if before.holder == self._identity:
                held["acquireTime"] = before.acquired or now
            else:
                held["leaseTransitions"] = ((lease.get("spec") or {}).get("leaseTransitions") or 0) + 1
        return held


async def run_as_leader(
    main: Callable[[], Awaitable[None]],
    *,
    connection: Connection,
    guarded: Connection,
    namespace: str,
    name: str,
    identity: str,
    settings: LeaseSettings | None = None,
) -> None:
    """Wait for the lease, run `main` while it is held, and give the lease back when `main` has ended.

    `connection` is for the lease alone: a renewal must not queue behind other calls. Writes on `guarded` are
    refused (Unavailable, nothing sent) as soon as the lease may be lost. `identity` is for people, as the
    pod's name; it is made unique here, since two holders of one name would both lead.

    Returns, or raises, as `main` does. Cancelled (SIGTERM), it cancels `main`, goes on renewing until `main` has
    ended and no abandoned write of its can still be under way, and gives the lease back.
    Raises LeaseLost when the lease is lost first: `main` is cancelled but not waited for. The caller ends the
    process at once (`os._exit`), because what still runs of `main` was promised to have ended.
    Raises ValueError when `guarded` may take longer for a request than `settings` reckons with.
    """
    settings = settings or LeaseSettings()
    if guarded.request_timeout > settings.request_timeout:
        raise ValueError(
            f"requests may take {guarded.request_timeout:g} s, but the lease reckons with "
            f"{settings.request_timeout:g} s"
        )
    lease = LeaseClient(connection, namespace=namespace, name=name)
    election = Election(lease, f"{identity}_{uuid.uuid4()}", settings)
    guarded.may_write = election.is_leading
    await lead(main, election, wait_for_writes=guarded.wait_for_abandoned_writes)


async def lead(
    main: Callable[[], Awaitable[None]], election: Election, *, wait_for_writes: Callable[[], Awaitable[None]]
) -> None:
    """Do what `run_as_leader` does, with the election given.

    `wait_for_writes` returns when no write that `main` has abandoned can still be under way.
    """
    await election.acquire()
    renewing = asyncio.create_task(election.renew_loop(), name="lease")
    running = asyncio.ensure_future(main())
    cancelled: asyncio.CancelledError | None = None
    try:
        try:
            await asyncio.wait({running, renewing}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError as error:
            cancelled = error
            running.cancel()
            await asyncio.wait({running, renewing}, return_when=asyncio.FIRST_COMPLETED)
        if not running.done():
            running.cancel()
            raise LeaseLost("the lease was lost: another replica may lead from now on")
        await wait_for_writes()
    finally:
        renewing.cancel()
    with suppress(asyncio.CancelledError):
        await renewing
    await election.release()
    if cancelled is not None and (running.cancelled() or running.exception() is None):
        raise cancelled
    running.result()
