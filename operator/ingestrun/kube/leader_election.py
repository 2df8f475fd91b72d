"""One replica acts: leader election by a Lease, and the process ends when it is lost.

The Lease and its lock are `kubernetes.aio.leaderelection`'s. The election is overridden where that library
would let two replicas act: it measures by the wall clock, has no time-out on its requests (a leader that can't
reach the server goes on leading), ends the election on a time-out, and keeps the lease on a clean exit.

Why two never act at once. All times are of one replica's own monotonic clock; no two clocks are compared.

    t0                   the leader begins the renewal that turns out its last successful one
    t0 + renew_deadline  at the latest it knows that it leads no more: `is_leading` is a comparison with the
                         clock, so that it also holds after a stall of the whole process, and it is asked right
                         before each write is sent (`Connection.may_write`)
    + request_timeout    its last write has been answered or timed out, here and on the server
    t0 + lease_seconds   the soonest that another may take the lease: it counts from when it *saw* that renewal

so with renew_deadline + request_timeout <= lease_seconds the last write ends before the next leader's first. By
default 10 s + 5 s <= 15 s. What no time-out can bound is a request that was sent, then stuck in the network, and
reached the server after its connection was given up; for that there is the fence (the admission policy), and
every write of status carries a resourceVersion.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
import uuid
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Final

from kubernetes.aio.client import V1Lease, V1ObjectMeta
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.electionconfig import Config
from kubernetes.aio.leaderelection.leaderelection import LeaderElection
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock

from ingestrun.kube.connection import Connection

logger = logging.getLogger(__name__)

Clock = Callable[[], float]
CLOCK: Final[Clock] = (
    # Unlike CLOCK_MONOTONIC it goes on while the machine is suspended: others can take the lease meanwhile.
    partial(time.clock_gettime, time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic
)


class LeaseLost(Exception):  # noqa: N818  (a fact, not an error of the caller's)
    """The lease could not be renewed in time, or another holds it: the process has to end at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseSettings:
    """Seconds, all of them. Raises ValueError, with a sentence, for a set that would let two replicas act."""

    lease_seconds: int = 15
    """How long others wait from the last renewal they saw. Whole seconds: the Lease's field is an integer."""
    renew_deadline: float = 10.0
    """When the leader gives up, counted from the start of its last successful renewal."""
    retry_period: float = 2.0
    """Between two tries; a follower adds jitter."""
    request_timeout: float = 5.0
    """The time-out of every other request of the leader's, see `Connection`."""

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


class Lock(LeaseLock):
    """The library's lock, made to work and to be given back.

    Its own `create` is refused by its own validation (37.0.2 passes `pretty=True` where a string is wanted), and
    it logs a traceback for each lost race. Here what went wrong is raised; the election knows what to do.
    """

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        """Store a new Lease. Raises ApiException, 409 when another was faster."""
        lease = V1Lease(metadata=V1ObjectMeta(name=name), spec=self.update_lease(election_record))
        await self.api_instance.create_namespaced_lease(namespace, lease)
        return True

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        """Store the record over what `get` read. Raises ApiException, 409 when it has changed since."""
        lease = self.lease_reference
        if lease is None:
            return False
        holder = lease.spec.holder_identity if lease.spec else None
        lease.spec = self.update_lease(updated_record, lease.spec)
        if holder != updated_record.holder_identity:
            lease.spec.lease_transitions = (lease.spec.lease_transitions or 0) + 1
        await self.api_instance.replace_namespaced_lease(name, namespace, lease)
        return True

    async def release(self) -> bool:
        """Clear the holder if it is still us, and nobody has changed the Lease in between."""
        found, record = await self.get(self.name, self.namespace)
        lease = self.lease_reference
        if not found or not isinstance(record, LeaderElectionRecord) or lease is None or lease.spec is None:
            return False
        if record.holder_identity != self.identity:
            return False
        lease.spec.holder_identity = ""
        await self.api_instance.replace_namespaced_lease(self.name, self.namespace, lease)
        return True


class Election(LeaderElection):
    """One candidate. `acquire` returns once it leads, `renew_loop` once it leads no more."""

    def __init__(
        self,
        lock: Lock,
        settings: LeaseSettings,
        *,
        clock: Clock = CLOCK,
        jitter: Callable[[], float] = random.random,
        on_unauthorized: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        async def unused() -> None: ...

        super().__init__(
            Config(
                lock=lock,
                lease_duration=settings.lease_seconds,
                renew_deadline=settings.renew_deadline,
                retry_period=settings.retry_period,
                onstarted_leading=unused,
                onstopped_leading=unused,
            )
        )
        self._lock = lock
        self._settings = settings
        self._clock = clock
        self._jitter = jitter
        self._on_unauthorized = on_unauthorized
        self._renewed_at: float | None = None
        self._observed_at = 0.0
        self._taken = False

    def is_leading(self) -> bool:
        """By the clock alone: true until `renew_deadline` after the start of the last successful renewal."""
        return (
            self._renewed_at is not None
            and not self._taken
            and self._clock() < self._renewed_at + self._settings.renew_deadline
        )

    async def acquire(self) -> bool:
        """Try until this candidate leads."""
        while True:
            if await self.try_acquire_or_renew() and self.is_leading():
                return True
            # It may have been won, but so slowly that it is no longer ours to count on.
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
        """One try. Whatever goes wrong, a stall included, is a failed try and nothing worse."""
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
        """Give the lease back, so that the next replica need not wait it out; without success it just expires."""
        self._renewed_at = None
        try:
            async with asyncio.timeout(self._settings.attempt_timeout):
                await self._lock.release()
        except Exception as error:  # as above; the process is about to end
            logger.warning("the lease could not be given back and will expire: %s", error or type(error).__name__)

    async def _attempt(self) -> bool:
        lock = self._lock
        found, record = await lock.get(lock.name, lock.namespace)
        now = self._clock()
        if isinstance(record, ApiException) and record.status == 401 and self._on_unauthorized is not None:
            await self._on_unauthorized()
        if not found:
            # Only a 404 means that there is none, and a Lease deleted under its holder still binds us.
            absent = isinstance(record, ApiException) and record.status == 404
            if not absent or self._another_may_lead(now):
                return False
            return await lock.create(lock.name, lock.namespace, self._record(None))
        if not isinstance(record, LeaderElectionRecord) or not record.holder_identity:
            return await lock.update(lock.name, lock.namespace, self._record(None))
        if self.observed_record is None or vars(record) != vars(self.observed_record):
            self.observed_record = record
            self._observed_at = now
        if record.holder_identity == lock.identity:
            return await lock.update(lock.name, lock.namespace, self._record(record.acquire_time))
        if self._renewed_at is not None:
            self._taken = True
            return False
        if self._another_may_lead(now):
            return False
        return await lock.update(lock.name, lock.namespace, self._record(None))

    def _another_may_lead(self, now: float) -> bool:
        """Whether the holder last seen could still act: by its own lease's duration, if that is longer."""
        seen = self.observed_record
        if seen is None or not seen.holder_identity or seen.holder_identity == self._lock.identity:
            return False
        duration = max(self._settings.lease_seconds, int(seen.lease_duration or 0))
        return now < self._observed_at + duration

    def _record(self, acquired: str | None) -> LeaderElectionRecord:
        """In the library's format: UTC without its offset. The wall clock is for human eyes only.

        Never with zero microseconds: it would drop the fraction, and the API server refuse the MicroTime.
        """
        now = datetime.now(UTC).replace(tzinfo=None)
        stamp = now.replace(microsecond=max(1, now.microsecond)).strftime("%Y-%m-%d %H:%M:%S.%f")
        seconds = str(math.ceil(self._settings.lease_seconds))
        return LeaderElectionRecord(self._lock.identity, seconds, acquired or stamp, stamp)


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

    Returns, or raises, as `main` does. Cancelled (SIGTERM), it cancels `main`, waits for it while it goes on
    renewing, waits until no request cut off can still be under way, and gives the lease back.
    Raises LeaseLost when the lease is lost first: `main` is cancelled but not waited for. The caller ends the
    process at once (`os._exit`): whatever still runs was promised to have ended.
    Raises ValueError when `guarded` may take longer for a request than `settings` reckons with.
    """
    settings = settings or LeaseSettings()
    if guarded.request_timeout > settings.request_timeout:
        raise ValueError(
            f"requests may take {guarded.request_timeout:g} s, but the lease reckons with "
            f"{settings.request_timeout:g} s"
        )
    lock = Lock(name, namespace, f"{identity}_{uuid.uuid4()}", connection.api)
    election = Election(lock, settings, on_unauthorized=connection.renew_credentials)
    guarded.may_write = election.is_leading
    await lead(main, election, settled=guarded.settled)


async def lead(
    main: Callable[[], Awaitable[None]], election: Election, *, settled: Callable[[], Awaitable[None]]
) -> None:
    """`run_as_leader`, with the election given. `settled` returns when no request cut off is still under way."""
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
        await settled()
    finally:
        renewing.cancel()
    with suppress(asyncio.CancelledError):
        await renewing
    await election.release()
    if cancelled is not None and (running.cancelled() or running.exception() is None):
        raise cancelled
    running.result()
