"""One leader at a time: rules in virtual time against a lock in memory, the wire against a real HTTP server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes.aio.client.exceptions import ApiException
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.baselock import BaseLock
from tests.fakes.loopback import Loopback, loopback, status_body
from tests.fakes.virtual_time import VirtualLoop, run

from ingestrun.kube.leader_election import Election, LeaseLost, LeaseSettings, Lock, lead, run_as_leader

# ---- settings --------------------------------------------------------------------------------------------


def test_the_defaults_leave_no_time_for_two() -> None:
    it = LeaseSettings()
    assert it.renew_deadline + it.request_timeout <= it.lease_seconds
    assert 2 * it.attempt_timeout + it.retry_period <= it.renew_deadline


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"request_timeout": 5.1}, "could end after another has taken it"),
        ({"renew_deadline": 12}, "could end after another has taken it"),
        ({"lease_seconds": 15.5}, "whole seconds"),
        ({"retry_period": 9}, "no second try"),
        ({"retry_period": 0.5}, "at least 1 second"),
        ({"request_timeout": 0}, "above 0"),
    ],
)
def test_settings_that_would_let_two_act_are_refused(wrong: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        LeaseSettings(**wrong)


# ---- the rules, in virtual time ----------------------------------------------------------------------------


@dataclass
class Store:
    """The Lease as etcd has it, and how long requests take. Delays are (to the server, back)."""

    record: LeaderElectionRecord | None = None
    version: int = 0
    delay: Callable[[str, str], tuple[float, float]] = lambda _who, _verb: (0.01, 0.01)
    holders: list[tuple[float, str]] = field(default_factory=list)

    @property
    def holder(self) -> str | None:
        return self.record.holder_identity if self.record else None


class MemoryLock(BaseLock):
    """What `Lock` is to the API server: compare and set, over a slow wire that may lose answers."""

    def __init__(self, store: Store, identity: str) -> None:
        super().__init__("operator", "default", identity)
        self.store = store
        self.read = 0

    async def _there(self, verb: str, act: Callable[[], Any]) -> Any:
        to, back = self.store.delay(self.identity, verb)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[Any] = loop.create_future()

        def arrive() -> None:
            # What has been sent arrives, whether or not the sender still waits.
            result = act()
            if not arrived.done():
                arrived.set_result(result)

        loop.call_later(to, arrive)
        result = await arrived
        await asyncio.sleep(back)
        return result

    async def get(self, name: str, namespace: str) -> Any:
        def act() -> Any:
            return self.store.version, None if self.store.record is None else _copy(self.store.record)

        version, record = await self._there("get", act)
        if record is None:
            return False, ApiException(status=404, reason="Not Found")
        self.read = version
        return True, record

    async def create(self, name: str, namespace: str, election_record: LeaderElectionRecord) -> bool:
        return bool(await self._there("create", lambda: self._put(election_record, expected=0)))

    async def update(self, name: str, namespace: str, updated_record: LeaderElectionRecord) -> bool:
        read = self.read
        return bool(await self._there("update", lambda: self._put(updated_record, expected=read)))

    async def release(self) -> bool:
        found, record = await self.get(self.name, self.namespace)
        if not found or record.holder_identity != self.identity:
            return False
        return await self.update(self.name, self.namespace, LeaderElectionRecord(None, "15", "x", "x"))

    def _put(self, record: LeaderElectionRecord, *, expected: int) -> bool:
        if self.store.version != expected:
            return False
        if record.holder_identity != self.store.holder:
            self.store.holders.append((asyncio.get_running_loop().time(), record.holder_identity or ""))
        self.store.record, self.store.version = _copy(record), self.store.version + 1
        return True


def _copy(record: LeaderElectionRecord) -> LeaderElectionRecord:
    return LeaderElectionRecord(**vars(record))


def election(store: Store, who: str, settings: LeaseSettings | None = None, *, jitter: float = 0.0) -> Election:
    return Election(
        cast(Lock, MemoryLock(store, who)),
        settings or LeaseSettings(),
        clock=asyncio.get_running_loop().time,
        jitter=lambda: jitter,
    )


async def at_once() -> None: ...


async def forever() -> None:
    await asyncio.Event().wait()


async def beat() -> None:
    """Runs on, with a timer pending, as a process does."""
    for _ in range(100_000):
        await asyncio.sleep(1)


def now() -> float:
    return asyncio.get_running_loop().time()


def test_a_second_candidate_waits_the_lease_out_after_a_crash() -> None:
    async def story() -> None:
        store = Store()
        first, second = election(store, "a"), election(store, "b")
        await first.acquire()
        crashed = asyncio.create_task(first.renew_loop())
        await asyncio.sleep(30)
        crashed.cancel()
        ended = now()
        await second.acquire()
        # It has seen nothing before: it counts from when it first looks.
        assert 15 <= now() - ended <= 18
        assert not first.is_leading()

    run(story())


def test_a_clean_exit_hands_over_at_once() -> None:
    async def story() -> None:
        store = Store()
        settled_at: list[float] = []

        async def settled() -> None:
            await asyncio.sleep(5)
            settled_at.append(now())

        async def main() -> None:
            await asyncio.sleep(20)

        first = asyncio.create_task(lead(main, election(store, "a"), settled=settled))
        await asyncio.sleep(1)
        second = election(store, "b")
        waiting = asyncio.create_task(second.acquire())
        await first
        assert store.holder is None
        released = now()
        assert settled_at, "given back while a request could still be under way"
        await waiting
        assert now() - released <= 2.1
        assert [who for _, who in store.holders] == ["a", "", "b"]

    run(story())


def test_sigterm_lets_main_end_and_renews_meanwhile() -> None:
    async def story() -> None:
        store = Store()
        seen: list[bool] = []

        async def main() -> None:
            try:
                await forever()
            finally:
                for _ in range(40):
                    await asyncio.sleep(1)
                    seen.append(it.is_leading())

        it = election(store, "a")
        task = asyncio.create_task(lead(main, it, settled=at_once))
        await asyncio.sleep(3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert seen == [True] * 40
        assert store.holder is None
        assert not it.is_leading()

    run(story())


def test_what_main_raises_is_raised_after_the_release() -> None:
    async def story() -> None:
        store = Store()

        async def main() -> None:
            await asyncio.sleep(1)
            raise RuntimeError("broken")

        with pytest.raises(RuntimeError, match="broken"):
            await lead(main, election(store, "a"), settled=at_once)
        assert store.holder is None

    run(story())


@pytest.mark.parametrize("verb", ["get", "update"])
def test_a_stalled_server_ends_the_leader_by_the_deadline(verb: str) -> None:
    async def story() -> None:
        store = Store()
        it = election(store, "a")
        task = asyncio.create_task(lead(beat, it, settled=at_once))
        await asyncio.sleep(31)
        assert it.is_leading()
        renewed = now()
        store.delay = lambda _, asked: (3600, 0) if asked == verb else (0.01, 0.01)
        with pytest.raises(LeaseLost):
            await task
        # From the start of the last renewal, which was at most one period before the stall.
        assert 8 - 0.1 <= now() - renewed <= 10
        assert not it.is_leading()
        # Never given back: it may be another's by now.
        assert store.holder == "a"

    run(story())


def test_one_stalled_request_does_not_lose_the_lease() -> None:
    async def story() -> None:
        store = Store()
        it = election(store, "a")
        task = asyncio.create_task(lead(beat, it, settled=at_once))
        for _ in range(10):
            await asyncio.sleep(20)
            stalls = iter([True])
            store.delay = lambda _, verb, stalls=stalls: (  # type: ignore[misc]
                (3600, 0) if verb == "update" and next(stalls, False) else (0.01, 0.01)
            )
        assert it.is_leading()
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    run(story())


def test_a_process_that_stood_still_knows_it_at_once() -> None:
    async def story() -> None:
        store = Store()
        it = election(store, "a")
        task = asyncio.create_task(lead(beat, it, settled=at_once))
        await asyncio.sleep(5)
        assert it.is_leading()
        cast(VirtualLoop, asyncio.get_running_loop()).stall(11)
        assert not it.is_leading(), "before anything of the election has run"
        with pytest.raises(LeaseLost):
            await task

    run(story())


def test_the_deadline_counts_from_the_start_of_the_renewal_not_from_its_answer() -> None:
    async def story() -> None:
        store = Store(delay=lambda _, verb: (0.0, 3.0 if verb == "create" else 0.0))
        it = election(store, "a")
        await it.acquire()
        assert now() == pytest.approx(3, abs=0.1)
        cast(VirtualLoop, asyncio.get_running_loop()).stall(6.8)
        assert it.is_leading()
        cast(VirtualLoop, asyncio.get_running_loop()).stall(0.3)
        assert not it.is_leading(), "others count from when it was stored, seconds before we heard of it"

    run(story())


def test_a_lease_that_another_holds_ends_the_leader_without_waiting() -> None:
    async def story() -> None:
        store = Store()
        task = asyncio.create_task(lead(beat, election(store, "a"), settled=at_once))
        await asyncio.sleep(5)
        store.record, store.version = LeaderElectionRecord("b", "15", "t", "t"), store.version + 1
        taken = now()
        with pytest.raises(LeaseLost):
            await task
        assert now() - taken <= 2.1

    run(story())


def test_a_deleted_lease_still_binds_those_who_saw_it() -> None:
    async def story() -> None:
        store = Store()
        second = election(store, "b")
        first = election(store, "a")
        await first.acquire()
        assert not await second.try_acquire_or_renew()
        seen = now()
        store.record, store.version = None, 0
        await second.acquire()
        assert now() - seen >= 15

    run(story())


def test_a_longer_lease_of_an_older_release_is_respected() -> None:
    async def story() -> None:
        store = Store(record=LeaderElectionRecord("old", "60", "t", "t"), version=1)
        await election(store, "b").acquire()
        assert 60 <= now() <= 64

    run(story())


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), drop=st.sampled_from([0.0, 0.05, 0.3, 0.6]), slow=st.sampled_from([0.1, 3.0, 12.0]))
def test_no_write_of_one_lands_while_another_holds_the_lease(seed: int, drop: float, slow: float) -> None:
    """Three replicas for ten minutes, over a wire that stalls and loses answers; they crash, restart, exit cleanly.

    Each writes all the time, whenever its clock says that it leads; a write takes any time up to its time-out
    to be applied. At that moment nobody else may hold the lease.
    """

    async def story() -> None:
        chance = random.Random(seed)
        store = Store()

        def delay(_who: str, _verb: str) -> tuple[float, float]:
            if chance.random() < drop:
                # Either way may take for ever, as far as the sender waits; a request may still arrive.
                return chance.choice([(chance.uniform(0, 40), 0.0), (chance.uniform(0, 1), 3600.0), (1e6, 0.0)])
            return chance.uniform(0, slow) * chance.random() ** 4, chance.uniform(0, slow) * chance.random() ** 4

        store.delay = delay
        times = LeaseSettings()
        wrong: list[str] = []
        applied = 0

        def apply(who: str, sent: float) -> None:
            nonlocal applied
            applied += 1
            if store.holder != who:
                wrong.append(f"{now():.2f}: a write that {who} sent at {sent:.2f} landed under {store.holder}")

        async def replica(number: int) -> None:
            life = 0
            while True:
                life += 1
                who = f"{number}.{life}"
                candidate = election(store, who, jitter=chance.random())
                quiet_at = 0.0

                async def settled() -> None:
                    await asyncio.sleep(max(0.0, quiet_at - now()))  # noqa: B023

                async def main() -> None:
                    nonlocal quiet_at
                    until = now() + chance.uniform(1, 200)
                    while now() < until:
                        if candidate.is_leading():  # noqa: B023
                            takes = chance.uniform(0, times.request_timeout)
                            quiet_at = max(quiet_at, now() + times.request_timeout)
                            asyncio.get_running_loop().call_later(takes, apply, who, now())  # noqa: B023
                        await asyncio.sleep(chance.uniform(0.05, 1.5))

                task = asyncio.create_task(lead(main, candidate, settled=settled))
                if chance.random() < 0.3:
                    # A crash: everything stops, the lease stays. What was sent goes on.
                    await asyncio.wait({task}, timeout=chance.uniform(1, 100))
                    if not task.done():
                        candidate._lock = cast(Lock, MemoryLock(Store(), who))
                        task.cancel()
                        candidate._renewed_at = None
                await asyncio.gather(task, return_exceptions=True)
                await asyncio.sleep(chance.uniform(0, 10))

        replicas = [asyncio.create_task(replica(number)) for number in range(3)]
        await asyncio.sleep(600)
        for task in replicas:
            task.cancel()
        assert not wrong, "\n".join(wrong[:5])
        if drop < 0.5 and slow < 1:
            assert applied > 50

    run(story())


# ---- the wire ------------------------------------------------------------------------------------------------

QUICK = LeaseSettings(lease_seconds=3, renew_deadline=2, retry_period=1, request_timeout=1)


class Coordination:
    """The part of coordination.k8s.io/v1 that a lock uses."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.gate: asyncio.Event | None = None
        self.token = ""

    @property
    def holder(self) -> str:
        return str(self.lease["spec"].get("holderIdentity", "")) if self.lease else ""

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if self.gate is not None:
            await self.gate.wait()
        if self.token and request.headers["authorization"] != self.token:
            return web.json_response(status_body(401, "Unauthorized", "Unauthorized"), status=401)
        if request.method == "GET":
            if self.lease is None:
                return web.json_response(status_body(404, "NotFound", "no such lease"), status=404)
            return web.json_response(self.lease)
        body = await request.json()
        for stamp in ("acquireTime", "renewTime"):
            _, _, fraction = body["spec"][stamp].partition(".")
            assert len(fraction.removesuffix("Z").removesuffix("+00:00")) == 6, "a MicroTime has six digits"
        if request.method == "PUT":
            if body["metadata"]["resourceVersion"] != str(self.version):
                return web.json_response(status_body(409, "Conflict", "modified"), status=409)
        elif self.lease is not None:
            return web.json_response(status_body(409, "AlreadyExists", "exists"), status=409)
        self.version += 1
        body["metadata"]["resourceVersion"] = str(self.version)
        self.lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", **body}
        return web.json_response(self.lease)


async def start(server: Loopback, main: Any, identity: str, times: LeaseSettings = QUICK) -> asyncio.Task[None]:
    lease_connection, guarded = await server.connection(request_timeout=1), await server.connection(request_timeout=1)

    async def body() -> None:
        try:
            await run_as_leader(
                main,
                connection=lease_connection,
                guarded=guarded,
                namespace="default",
                name="operator",
                identity=identity,
                settings=times,
            )
        finally:
            await lease_connection.close()
            await guarded.close()

    return asyncio.create_task(body())


async def test_the_lease_on_the_wire_is_taken_renewed_given_back_and_taken_over() -> None:
    api = Coordination()
    async with loopback(api) as server:
        stop = asyncio.Event()

        async def main() -> None:
            await stop.wait()

        first = await start(server, main, "pod-a")
        await asyncio.sleep(0.5)
        assert api.holder.startswith("pod-a_")
        assert api.lease is not None
        assert api.lease["spec"]["leaseDurationSeconds"] == 3
        acquired, renewed = api.lease["spec"]["acquireTime"], api.lease["spec"]["renewTime"]
        started = asyncio.Event()

        async def other() -> None:
            started.set()

        second = await start(server, other, "pod-b")
        await asyncio.sleep(3.5)
        assert api.lease["spec"]["acquireTime"] == acquired
        assert api.lease["spec"]["renewTime"] > renewed
        assert not started.is_set()
        stop.set()
        await first
        await asyncio.wait_for(second, 3)
        assert started.is_set()
        assert api.holder == ""
        assert api.lease["spec"]["leaseTransitions"] == 1


async def test_a_server_that_stalls_ends_the_leader_and_its_writes() -> None:
    api = Coordination()
    async with loopback(api) as server:
        guarded = await server.connection(request_timeout=1)
        lease_connection = await server.connection(request_timeout=1)
        task = asyncio.create_task(
            run_as_leader(
                forever,
                connection=lease_connection,
                guarded=guarded,
                namespace="default",
                name="operator",
                identity="pod-a",
                settings=QUICK,
            )
        )
        await asyncio.sleep(0.5)
        assert guarded.may_write()
        api.gate = asyncio.Event()
        began = asyncio.get_running_loop().time()
        with pytest.raises(LeaseLost):
            await asyncio.wait_for(task, 4)
        assert asyncio.get_running_loop().time() - began <= 2.2
        assert not guarded.may_write()
        api.gate.set()
        await guarded.close()
        await lease_connection.close()


async def test_the_election_outlives_refused_credentials() -> None:
    api = Coordination()
    async with loopback(api) as server:
        api.token, server.token = "Bearer second", "first"
        task = await start(server, at_once, "pod-a")
        server.token = "second"
        await asyncio.wait_for(task, 5)
        assert api.holder == ""


async def test_requests_longer_than_the_lease_reckons_with_are_refused() -> None:
    async with loopback(Coordination()) as server:
        slow = await server.connection(request_timeout=5)
        with pytest.raises(ValueError, match="the lease reckons with"):
            await run_as_leader(
                at_once,
                connection=slow,
                guarded=slow,
                namespace="default",
                name="operator",
                identity="pod-a",
                settings=replace(QUICK, lease_seconds=4),
            )
        await slow.close()
