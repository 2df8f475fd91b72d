"""One leader at a time: rules in virtual time against a Lease in memory, the wire against a real HTTP server."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st
from kubernetes.aio.client import ApiClient
from kubernetes.aio.leaderelection.leaderelectionrecord import LeaderElectionRecord
from kubernetes.aio.leaderelection.resourcelock.leaselock import LeaseLock
from tests.fakes.loopback import Loopback, loopback, status_body
from tests.fakes.virtual_time import VirtualLoop, run

from ingestrun.kube.connection import Connection
from ingestrun.kube.errors import AlreadyExists, Conflict, KubeError, NotFound
from ingestrun.kube.leader_election import Election, LeaseClient, LeaseLost, LeaseSettings, lead, run_as_leader
from ingestrun.kube.protocol import Object

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


PATH = "/apis/coordination.k8s.io/v1/namespaces/default/leases"


def spec(holder: str, *, seconds: int = 15) -> dict[str, Any]:
    """A Lease's, as another has written it."""
    stamp = "2026-11-23T12:00:00.000000Z"
    return {"holderIdentity": holder, "leaseDurationSeconds": seconds, "acquireTime": stamp, "renewTime": stamp}


@dataclass
class Store:
    """The Lease as etcd has it, and how long requests take. Delays are (to the server, back)."""

    spec: dict[str, Any] | None = None
    version: int = 0
    delay: Callable[[str, str], tuple[float, float]] = lambda _who, _verb: (0.01, 0.01)
    holders: list[tuple[float, str]] = field(default_factory=list)

    @property
    def holder(self) -> str | None:
        return self.spec["holderIdentity"] or None if self.spec else None

    def get(self) -> dict[str, Any]:
        if self.spec is None:
            raise NotFound("no such lease")
        return {"metadata": {"name": "operator", "resourceVersion": str(self.version)}, "spec": dict(self.spec)}

    def create(self, body: Object) -> dict[str, Any]:
        if self.spec is not None:
            raise AlreadyExists("exists")
        return self._put(body)

    def update(self, body: Object) -> dict[str, Any]:
        assert body["metadata"]["resourceVersion"], "a PUT without a precondition"
        if self.spec is None:
            raise NotFound("no such lease")
        if body["metadata"]["resourceVersion"] != str(self.version):
            raise Conflict("modified")
        return self._put(body)

    def _put(self, body: Object) -> dict[str, Any]:
        if body["spec"]["holderIdentity"] != (self.spec or {}).get("holderIdentity"):
            self.holders.append((asyncio.get_running_loop().time(), body["spec"]["holderIdentity"]))
        self.spec, self.version = dict(body["spec"]), self.version + 1
        return self.get()


class Wire:
    """Stands for `Connection` before an API server: requests on a slow wire that may lose answers."""

    def __init__(self, store: Store, who: str) -> None:
        self.store = store
        self.who = who

    async def request(self, method: str, path: str, *, body: Any = None) -> Object:
        store = self.store
        calls: dict[tuple[str, str], tuple[str, Callable[[], Object]]] = {
            ("GET", f"{PATH}/operator"): ("get", store.get),
            ("POST", PATH): ("create", partial(store.create, body)),
            ("PUT", f"{PATH}/operator"): ("update", partial(store.update, body)),
        }
        verb, act = calls[method, path]
        to, back = store.delay(self.who, verb)
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[Object | KubeError] = loop.create_future()

        def arrive() -> None:
            # What has been sent arrives, whether or not the sender still waits.
            answer: Object | KubeError
            try:
                answer = act()
            except KubeError as error:
                answer = error
            if not arrived.done():
                arrived.set_result(answer)

        loop.call_later(to, arrive)
        answer = await arrived
        await asyncio.sleep(back)
        if isinstance(answer, KubeError):
            raise answer
        return answer


def lease_of(store: Store, who: str) -> LeaseClient:
    return LeaseClient(cast(Connection, Wire(store, who)), namespace="default", name="operator")


def election(store: Store, who: str, settings: LeaseSettings | None = None, *, jitter: float = 0.0) -> Election:
    return Election(
        lease_of(store, who),
        who,
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
        waited_at: list[float] = []

        async def wait_for_writes() -> None:
            await asyncio.sleep(5)
            waited_at.append(now())

        async def main() -> None:
            await asyncio.sleep(20)

        first = asyncio.create_task(lead(main, election(store, "a"), wait_for_writes=wait_for_writes))
        await asyncio.sleep(1)
        second = election(store, "b")
        waiting = asyncio.create_task(second.acquire())
        await first
        assert store.holder is None
        released = now()
        assert waited_at, "given back while a request could still be under way"
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
        task = asyncio.create_task(lead(main, it, wait_for_writes=at_once))
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
            await lead(main, election(store, "a"), wait_for_writes=at_once)
        assert store.holder is None

    run(story())


@pytest.mark.parametrize("verb", ["get", "update"])
def test_a_stalled_server_ends_the_leader_by_the_deadline(verb: str) -> None:
    async def story() -> None:
        store = Store()
        it = election(store, "a")
        task = asyncio.create_task(lead(beat, it, wait_for_writes=at_once))
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
        task = asyncio.create_task(lead(beat, it, wait_for_writes=at_once))
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
        task = asyncio.create_task(lead(beat, it, wait_for_writes=at_once))
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
        task = asyncio.create_task(lead(beat, election(store, "a"), wait_for_writes=at_once))
        await asyncio.sleep(5)
        store.spec, store.version = spec("b"), store.version + 1
        taken = now()
        with pytest.raises(LeaseLost):
            await task
        assert now() - taken <= 2.1

    run(story())


def test_a_lease_that_goes_back_in_time_ends_the_leader() -> None:
    """As in a restore from a backup: its watches wait for versions that were given out before."""

    async def scenario() -> None:
        store = Store()
        leading = asyncio.create_task(lead(forever, election(store, "one"), wait_for_writes=at_once))
        await asyncio.sleep(1)
        old = store.spec, store.version
        await asyncio.sleep(30)
        assert not leading.done()
        store.spec, store.version = old
        with pytest.raises(LeaseLost):
            await leading
        assert now() < 31 + 2 * LeaseSettings().retry_period

    run(scenario())


def test_a_deleted_lease_still_binds_those_who_saw_it() -> None:
    async def story() -> None:
        store = Store()
        second = election(store, "b")
        first = election(store, "a")
        await first.acquire()
        assert not await second.try_acquire_or_renew()
        seen = now()
        store.spec, store.version = None, 0
        await second.acquire()
        assert now() - seen >= 15

    run(story())


def test_a_longer_lease_of_an_older_release_is_respected() -> None:
    async def story() -> None:
        store = Store(spec=spec("old", seconds=60), version=1)
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

                async def wait_for_writes() -> None:
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

                task = asyncio.create_task(lead(main, candidate, wait_for_writes=wait_for_writes))
                if chance.random() < 0.3:
                    # A crash: everything stops, the lease stays. What was sent goes on.
                    await asyncio.wait({task}, timeout=chance.uniform(1, 100))
                    if not task.done():
                        candidate._lease = lease_of(Store(), who)
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
    """The part of coordination.k8s.io/v1 that an election uses."""

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


async def test_an_older_operator_reads_our_lease_and_we_wait_for_its() -> None:
    """Older operators wrote and read it by the library's lock. In an update both kinds are candidates."""
    api = Coordination()
    async with loopback(api) as server:
        client = ApiClient(await server.configuration())
        older = LeaseLock("operator", "default", "older", client)
        leading, stop = asyncio.Event(), asyncio.Event()

        async def main() -> None:
            leading.set()
            await stop.wait()

        async def holder() -> LeaderElectionRecord:
            found, record = await older.get("operator", "default")
            assert found
            assert isinstance(record, LeaderElectionRecord)
            return record

        first = await start(server, main, "pod-a")
        await asyncio.wait_for(leading.wait(), 5)
        assert api.lease is not None
        assert "leaseTransitions" not in api.lease["spec"]
        record = await holder()
        assert str(record.holder_identity).startswith("pod-a_")
        assert record.lease_duration == "3"
        for stamp in (record.acquire_time, record.renew_time):
            written = datetime.fromisoformat(str(stamp)).replace(tzinfo=UTC)
            assert abs(datetime.now(UTC) - written) < timedelta(seconds=5)
        stop.set()
        await first
        assert (await holder()).holder_identity is None

        api.lease["metadata"]["annotations"] = {"by": "people"}
        await holder()
        began = asyncio.get_running_loop().time()
        stamp = "2026-11-23 12:00:00.000001"
        assert await older.update("operator", "default", LeaderElectionRecord("older", "2", stamp, stamp))
        assert api.holder == "older"
        taken = asyncio.Event()

        async def other() -> None:
            taken.set()
            await forever()

        second = await start(server, other, "pod-b")
        await asyncio.wait_for(taken.wait(), 8)
        assert asyncio.get_running_loop().time() - began >= QUICK.lease_seconds
        assert api.lease["spec"]["leaseTransitions"] == 1
        assert api.lease["spec"]["acquireTime"] == api.lease["spec"]["renewTime"] > "2026-11-24"
        assert api.lease["metadata"]["annotations"] == {"by": "people"}, "what is not the election's is kept"
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        await client.close()  # type: ignore[no-untyped-call]


async def test_a_lease_is_replaced_only_as_it_was_read() -> None:
    async with loopback(Coordination()) as server:
        connection = await server.connection()
        lease = LeaseClient(connection, namespace="default", name="operator")
        with pytest.raises(ValueError, match="resourceVersion"):
            await lease.replace({"metadata": {"name": "operator"}, "spec": {}}, {"holderIdentity": "us"})
        await connection.close()
    assert server.seen == []


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
