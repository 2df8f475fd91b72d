"""The cancellation check over HTTP, on the loopback, in front of the fake API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from tests.fakes.cluster import Call, FakeCluster
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.controller.http import cancellation_check
from ingestrun.controller.http.cancellation_check import TOKEN_WAIT_SECONDS, CancellationCheck
from ingestrun.controller.http.server import ApiServer
from ingestrun.controller.http.tokens import SECRET_NAME, CheckKey, issue
from ingestrun.controller.reconcile.reconciler import Reconciler
from ingestrun.controller.settings import Settings
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.state.usage import Usage
from ingestrun.controller.watch.handlers import EventHandlers
from ingestrun.kube.errors import Unavailable
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.batch.pipeline import Step
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.manifest import CheckEndpoint, WorkerImage
from ingestrun.planner.run.fair_sharing import JobLimits

Answer = tuple[int, dict[str, Any]]


def a_job() -> CreateJob:
    """A fetch that may take a minute."""
    step = Step(index=0, stage=Stage.FETCH, name="fetch", deadline_seconds=60, retries=0, resources=None)
    return CreateJob(attempt=NextAttempt(batch=0, step=step, number=0, input_attempt=None))


class Asker:
    """The API over a fake cluster, and a client of it. `now` is the clock of the tokens."""

    def __init__(self, cluster: FakeCluster, cache_seconds: float = 0.0) -> None:
        self.cluster = cluster
        self.now = time.time()
        self.key = CheckKey(cluster, namespace="default", alone=True)
        self.check = CancellationCheck(
            cluster,
            self.key,
            url="http://check.example/base/",
            clock=lambda: datetime.fromtimestamp(self.now, UTC),
            cache_seconds=cache_seconds,
        )
        self.api = ApiServer(routes=[self.check])
        self.port = 0
        self.session: aiohttp.ClientSession

    def told(self, key: RunKey = KEY) -> CheckEndpoint:
        told = self.check.check_for(IngestRun.read(self.cluster.run(key)), a_job())
        assert told is not None
        return told

    async def ask(self, token: str | None, key: RunKey = KEY, wait: object = None) -> Answer:
        path = f"/api/v1/namespaces/{key.namespace}/ingestruns/{key.name}/cancellation-check"
        path += "" if wait is None else f"?wait={wait}"
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        async with self.session.get(f"http://127.0.0.1:{self.port}{path}", headers=headers) as response:
            return response.status, await response.json()

    def status(self, key: RunKey = KEY, **status: Any) -> None:
        run = self.cluster.run(key)
        run["status"] |= status
        self.cluster._store("IngestRun", run, "MODIFIED")


@asynccontextmanager
async def serving(cluster: FakeCluster, **how: Any) -> AsyncIterator[Asker]:
    asker = Asker(cluster, **how)
    asker.port = await asker.api.serve(0, "127.0.0.1")
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as asker.session:
        try:
            yield asker
        finally:
            await asker.api.close()


def a_run(name: str = KEY.name, **spec: Any) -> FakeCluster:
    cluster = FakeCluster()
    body = manifest(**spec)
    body["metadata"]["name"] = name
    cluster.user_create_run(body)
    return cluster


def held(cluster: FakeCluster) -> tuple[asyncio.Event, asyncio.Event]:
    """The next read of a run waits for the first event; the second is set once it is there."""
    gate, reached = asyncio.Event(), asyncio.Event()

    async def seen(_call: Call) -> None:
        reached.set()

    cluster.on_call = seen
    cluster.fail_next("get", "ingestruns", gate=gate)
    return gate, reached


async def test_the_answer_is_the_runs_own_state() -> None:
    cluster = a_run()
    async with serving(cluster) as asker:
        token = asker.told().token
        uid = cluster.run(KEY)["metadata"]["uid"]
        base = {"id": uid, "execution_id": uid, "namespace": "default", "name": "flights"}

        def seeds(word: str) -> dict[str, str]:
            return {"status": word.upper(), "event_type": f"execution.{word}"}

        no = {"cancelled": False, "completed": False, "failed": False}
        assert await asker.ask(token) == (200, {**base, "phase": "Pending", **no, **seeds("pending")})
        for phase, said in (("Running", {}), ("Suspended", {}), ("Failed", {"failed": True})):
            asker.status(phase=phase)
            assert await asker.ask(token) == (200, {**base, "phase": phase, **no, **said, **seeds(phase.lower())})
        for phase, word, said in (
            ("Succeeded", "completed", {"completed": True}),
            ("Cancelled", "cancelled", {"cancelled": True}),
        ):
            asker.status(phase=phase)
            assert await asker.ask(token) == (200, {**base, "phase": phase, **no, **said, **seeds(word)})


async def test_a_cancel_that_is_not_applied_yet_counts_and_one_that_came_too_late_does_not() -> None:
    cluster = a_run()
    async with serving(cluster) as asker:
        token = asker.told().token
        asker.status(phase="Running")
        cluster.user_patch_spec(KEY, {"cancel": True})
        _, body = await asker.ask(token)
        assert (body["phase"], body["cancelled"], body["status"]) == ("Running", True, "CANCELLED")
        asker.status(phase="Succeeded")
        _, body = await asker.ask(token)
        assert (body["completed"], body["cancelled"]) == (True, False)


def above(cluster: FakeCluster, name: str, parent: str | None = None) -> RunKey:
    body = manifest(**({"parentRef": {"name": parent}} if parent else {}))
    body["metadata"]["name"] = name
    cluster.user_create_run(body)
    return RunKey(namespace="default", name=name)


@pytest.mark.parametrize(
    ("phase", "cascade", "cancelled"),
    [("Cancelled", True, True), ("Cancelled", False, False), ("Failed", True, False), ("Running", True, False)],
)
async def test_a_cascading_cancel_above_counts_before_it_has_come_down(
    phase: str, cascade: bool, cancelled: bool
) -> None:
    """Once it is applied there: what is only asked for might look different to the leader when the pod has stopped."""
    cluster = a_run(parentRef={"name": "root"})
    root = above(cluster, "root", KEY.name)  # a circle, to be survived
    async with serving(cluster) as asker:
        body = cluster.run(root)
        record = {"acceptedAt": "2026-11-23T00:00:00Z", "cascade": cascade}
        spec = {**body["spec"], "cancel": True, "cancellation": {"cascade": cascade}}
        cluster._store(
            "IngestRun", {**body, "spec": spec, "status": {"phase": phase, "cancellation": record}}, "MODIFIED"
        )
        assert (await asker.ask(asker.told().token))[1]["cancelled"] is cancelled


async def test_a_pod_that_heard_of_the_cancel_above_is_no_failure_of_its_run() -> None:
    """Its end comes before the news of its parent's cancel: the parent is asked, not the watch."""
    world = World()
    parent = manifest()
    parent["metadata"]["name"] = "root"
    world.cluster.user_create_run(parent)
    world.create(parentRef={"name": "root"}, retries=0)
    await world.settle()
    world.deaf.add("IngestRun")
    root = RunKey(namespace="default", name="root")
    body = world.cluster.run(root)
    record = {"acceptedAt": "2026-11-23T12:00:00Z", "cascade": True, "policy": "Drain"}
    status = {**body["status"], "phase": "Cancelled", "cancellation": record}
    world.cluster._store("IngestRun", {**body, "status": status}, "MODIFIED")
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    own = next(job for job in world.active_jobs() if job["metadata"]["labels"]["ingestrun.dev/run-uid"] == uid)
    world.work(own, result='{"v":"v1","outcome":"cancelled","message":"the run is cancelled"}')
    await world.settle()
    assert world.phase == "Cancelled"
    assert world.status["cancellation"]["parent"] == "root"
    assert world.status["failures"] == []


async def test_a_run_above_that_can_not_be_read_says_nothing() -> None:
    cluster = a_run(parentRef={"name": "gone"})
    async with serving(cluster) as asker:
        assert (await asker.ask(asker.told().token))[0] == 200
        above(cluster, "gone")
        cluster.fail_next("get", "ingestruns", Unavailable("down"), match=lambda call: call.name == "gone", times=9)
        status, body = await asker.ask(asker.told().token)
        assert (status, body["cancelled"]) == (200, False)


async def test_a_run_that_is_being_deleted_counts_as_cancelled_and_one_that_is_gone_is_404() -> None:
    cluster = a_run()
    async with serving(cluster) as asker:
        token = asker.told().token
        run = cluster.run(KEY)
        run["metadata"]["deletionTimestamp"] = "2026-11-23T00:00:00Z"
        cluster._store("IngestRun", run, "MODIFIED")
        assert (await asker.ask(token))[1]["cancelled"] is True
        cluster.user_delete_run(KEY)
        status, body = await asker.ask(token)
        assert (status, body["error"]) == (404, "gone")


@pytest.mark.parametrize("cache_seconds", [0.0, 30.0])
async def test_a_run_made_anew_under_the_name_is_not_mixed_up_with_the_old_one(cache_seconds: float) -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=cache_seconds) as asker:
        old = asker.told().token
        cluster.user_delete_run(KEY)
        assert (await asker.ask(old))[0] == 404
        cluster.user_create_run(manifest())
        new = asker.told().token
        status, body = await asker.ask(new)
        assert (status, body["cancelled"]) == (200, False)
        status, body = await asker.ask(old)
        assert (status, body["error"]) == (404, "gone")


async def test_a_token_answers_for_its_own_run_alone() -> None:
    cluster = a_run()
    body = manifest()
    body["metadata"]["name"] = "other"
    cluster.user_create_run(body)
    other = RunKey(namespace="default", name="other")
    async with serving(cluster) as asker:
        token = asker.told().token
        status, body = await asker.ask(token, other)
        assert (status, body["error"]) == (403, "forbidden")
        assert "another run" in body["message"]
        assert cluster.calls("get", "ingestruns") == []
        assert (await asker.ask(asker.told(other).token, other))[0] == 200


async def test_without_a_good_token_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    cluster = a_run()
    caplog.set_level(0)
    async with serving(cluster) as asker:
        token = asker.told().token
        uid = cluster.run(KEY)["metadata"]["uid"]
        forged = issue(b"z" * 32, KEY, uid=uid, expiry=int(asker.now) + 60)
        for bad, code in ((None, 401), ("", 401), ("x" * 5000, 401), (token[:-2], 401), (forged, 403)):
            status, body = await asker.ask(bad)
            assert (status, set(body)) == (code, {"error", "message"})
            assert " " in body["message"]
        asker.now += 60 + TOKEN_WAIT_SECONDS - 1
        assert (await asker.ask(token))[0] == 200
        asker.now += 2
        status, body = await asker.ask(token)
        assert (status, "expired" in body["message"]) == (401, True)
        for secret in (token, forged, token.rpartition(".")[2]):
            assert secret not in caplog.text


async def test_an_api_server_that_gives_no_answer_is_503_and_not_a_verdict() -> None:
    cluster = a_run()
    async with serving(cluster) as asker:
        token = asker.told().token
        cluster.fail_next("get", "ingestruns", Unavailable("down: secret detail"))
        status, body = await asker.ask(token)
        assert (status, body["error"]) == (503, "unavailable")
        assert "detail" not in body["message"]


async def test_a_thousand_pods_make_one_read() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=30) as asker:
        token = asker.told().token
        gate, reached = held(cluster)
        asking = [asyncio.ensure_future(asker.ask(token)) for _ in range(1000)]
        await asyncio.wait_for(reached.wait(), 10)
        gate.set()
        answers = await asyncio.gather(*asking)
        assert {status for status, _ in answers} == {200}
        await asker.ask(token)
        assert len(cluster.calls("get", "ingestruns")) == 1


async def test_the_read_is_shared_for_a_moment_only() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=0.2) as asker:
        token = asker.told().token
        assert (await asker.ask(token))[1]["cancelled"] is False
        cluster.user_patch_spec(KEY, {"cancel": True})
        began = time.monotonic()
        while not (await asker.ask(token))[1]["cancelled"]:
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.02)
        assert asker.check._looks.keys() <= {(KEY, cluster.run(KEY)["metadata"]["uid"])}
        while asker.check._looks:
            assert time.monotonic() - began < 5
            await asyncio.sleep(0.02)


async def test_a_pod_that_hangs_up_does_not_spoil_the_answer_of_the_others() -> None:
    cluster = a_run()
    async with serving(cluster) as asker:
        token = asker.told().token
        gate, reached = held(cluster)
        first = asyncio.ensure_future(asker.ask(token))
        await asyncio.wait_for(reached.wait(), 10)
        second = asyncio.ensure_future(asker.ask(token))
        await asyncio.sleep(0.05)
        first.cancel()
        await asyncio.sleep(0.05)
        gate.set()
        assert (await second)[0] == 200
        assert len(cluster.calls("get", "ingestruns")) == 1, "the client asked again behind our back"


async def test_without_a_key_nobody_is_told_of_a_check() -> None:
    cluster = a_run()
    key = CheckKey(cluster, namespace="default", alone=False)
    check = CancellationCheck(cluster, key, url="http://x", clock=lambda: datetime.now(UTC))
    api = ApiServer(routes=[check])
    run = IngestRun.read(cluster.run(KEY))
    assert check.check_for(run, a_job()) is None
    port = await api.serve(0, "127.0.0.1")
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/api/v1/namespaces/default/ingestruns/flights/cancellation-check") as got,
    ):
        assert got.status == 503
    cluster.user_apply_secret(SECRET_NAME)
    await key.refresh()
    assert check.check_for(run, a_job()) is not None
    await api.close()


async def test_without_a_certificate_nobody_is_told_of_a_check_and_with_one_of_its_ca() -> None:
    cluster = a_run()
    key = CheckKey(cluster, namespace="default", alone=True)
    await key.refresh()
    ca: list[str | None] = [None]
    check = CancellationCheck(cluster, key, url="https://x", clock=lambda: datetime.now(UTC), ca=lambda: ca[0])
    run = IngestRun.read(cluster.run(KEY))
    assert check.check_for(run, a_job()) is None
    ca[0] = "the PEM"
    told = check.check_for(run, a_job())
    assert told is not None
    assert told.ca == "the PEM"


async def test_jobs_are_told_of_the_ca_where_there_is_one() -> None:
    world = World()
    endpoint = CheckEndpoint(url="https://x", token="t", ca="the PEM")
    world.check = lambda _run, _seconds: endpoint
    world.start()
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    assert environment(job)["INGEST_CANCELLATION_CA"] == "the PEM"


# --- the long poll


async def elapsed(asking: Awaitable[Answer]) -> tuple[float, Answer]:
    began = time.monotonic()
    answer = await asking
    return time.monotonic() - began, answer


async def eventually(predicate: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not predicate():
        assert time.monotonic() - began < 10
        await asyncio.sleep(0.01)


async def until_waiting(asker: Asker, number: int = 1) -> None:
    await eventually(lambda: len(asker.check._waiting.get(KEY, ())) == number)
    await eventually(lambda: any(look.done() for look in asker.check._looks.values()))


async def test_a_long_poll_answers_at_once_when_the_watch_tells_of_the_cancel() -> None:
    """The reads of before are an hour old by then: it is the watch that wakes it, and a read of its own that tells."""
    cluster = a_run()
    async with serving(cluster, cache_seconds=3600) as asker:
        token = asker.told().token
        assert (await asker.ask(token))[1]["cancelled"] is False
        asking = [asyncio.ensure_future(elapsed(asker.ask(token, wait=30))) for _ in range(50)]
        await until_waiting(asker, 50)
        cluster.user_patch_spec(KEY, {"cancel": True})
        told = time.monotonic()
        asker.check.wake(KEY)
        for _, (status, body) in await asyncio.gather(*asking):
            assert (status, body["cancelled"], body["event_type"]) == (200, True, "execution.cancelled")
        assert time.monotonic() - told < 5
        assert len(cluster.calls("get", "ingestruns")) == 2, "one before, one for all who were woken"
        assert asker.check._waiting == {}


async def test_a_long_poll_hears_of_the_cancel_without_a_watch() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=0.1) as asker:
        asking = asyncio.ensure_future(elapsed(asker.ask(asker.told().token, wait=30)))
        await until_waiting(asker)
        cluster.user_patch_spec(KEY, {"cancel": True})
        seconds, (status, body) = await asking
        assert (status, body["cancelled"]) == (200, True)
        assert seconds < 10


async def test_a_cancel_during_the_read_is_not_missed_by_a_long_poll() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=3600) as asker:
        gate, reached = held(cluster)
        asking = asyncio.ensure_future(asker.ask(asker.told().token, wait=30))
        await asyncio.wait_for(reached.wait(), 10)
        asker.check.wake(KEY)
        cluster.user_patch_spec(KEY, {"suspend": True})
        asker.check.wake(KEY)
        gate.set()
        await eventually(lambda: len(cluster.calls("get", "ingestruns")) >= 2)
        assert not asking.done()
        cluster.user_patch_spec(KEY, {"cancel": True})
        asker.check.wake(KEY)
        assert (await asyncio.wait_for(asking, 10))[1]["cancelled"] is True


async def test_a_long_poll_ends_with_the_wait_and_not_before() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=0.05) as asker:
        seconds, (status, body) = await elapsed(asker.ask(asker.told().token, wait="0.4"))
        assert (status, body["cancelled"]) == (200, False)
        assert 0.4 <= seconds < 10


@pytest.mark.parametrize("phase", ["Cancelled", "Succeeded", "Failed"])
async def test_a_long_poll_about_a_run_that_has_ended_does_not_wait(phase: str) -> None:
    async with serving(a_run(), cache_seconds=30) as asker:
        asker.status(phase=phase)
        seconds, (status, body) = await elapsed(asker.ask(asker.told().token, wait=30))
        assert (status, body["phase"]) == (200, phase)
        assert seconds < 10


async def test_a_long_poll_about_a_run_that_goes_ends_with_404() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=3600) as asker:
        asking = asyncio.ensure_future(asker.ask(asker.told().token, wait=30))
        await until_waiting(asker)
        cluster.user_delete_run(KEY)
        asker.check.wake(KEY)
        status, body = await asyncio.wait_for(asking, 10)
        assert (status, body["error"]) == (404, "gone")


async def test_a_server_that_stops_answers_those_who_wait() -> None:
    cluster = a_run()
    async with serving(cluster, cache_seconds=3600) as asker:
        asking = asyncio.ensure_future(asker.ask(asker.told().token, wait=30))
        await until_waiting(asker)
        await asker.api.close()
        status, body = await asyncio.wait_for(asking, 10)
        assert (status, body["cancelled"]) == (200, False)


@pytest.mark.parametrize("wait", ["soon", "-1", "nan", "inf"])
async def test_a_wait_that_is_no_number_of_seconds_is_refused(wait: str) -> None:
    async with serving(a_run()) as asker:
        status, body = await asker.ask(asker.told().token, wait=wait)
        assert (status, body["error"]) == (400, "bad-request")


async def test_a_wait_is_at_most_so_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancellation_check, "MOST_WAIT_SECONDS", 0.3)
    async with serving(a_run(), cache_seconds=0.05) as asker:
        seconds, (status, _) = await elapsed(asker.ask(asker.told().token, wait=3600))
        assert status == 200
        assert 0.3 <= seconds < 10


async def test_the_watch_wakes_for_what_matters_alone() -> None:
    """Not for each of the writes of a status that goes on."""
    woken: list[RunKey] = []
    queue: Any = SimpleNamespace(add=lambda *_: None, forget=lambda _: None)
    cluster = a_run()
    handlers = EventHandlers(RunCache(Usage(JobLimits(), wake=lambda _: None)), queue, stopped=woken.append)
    handlers.run(None, cluster.run(KEY))
    handlers.run("MODIFIED", {**cluster.run(KEY), "status": {"phase": "Running"}})
    assert woken == []
    cluster.user_patch_spec(KEY, {"cancel": True})
    handlers.run("MODIFIED", cluster.run(KEY))
    assert woken == [KEY]
    cluster.user_delete_run(KEY)
    handlers.run("DELETED", {**manifest(), "metadata": {**manifest()["metadata"], "uid": "u", "resourceVersion": "99"}})
    assert woken == [KEY, KEY]


# --- what Jobs are told


async def test_each_job_gets_the_address_and_a_token_of_its_own_run() -> None:
    world = World()
    async with serving(world.cluster) as asker:
        asker.now = world.now.timestamp()
        world.check = asker.check.check_for
        world.start()
        world.create()
        await world.settle()
        (job,) = world.active_jobs()
        env = environment(job)
        assert env["INGEST_CANCELLATION_URL"] == (
            "http://check.example/base/api/v1/namespaces/default/ingestruns/flights/cancellation-check"
        )
        token = env["INGEST_CANCELLATION_TOKEN"]
        assert (await asker.ask(token))[1]["cancelled"] is False
        deadline = job["spec"]["template"]["spec"]["activeDeadlineSeconds"]
        asker.now += (began := 14 * 24 * 3600) + deadline
        assert (await asker.ask(token))[0] == 200, "the pod has waited two weeks for a node"
        asker.now += TOKEN_WAIT_SECONDS - began - 1
        assert (await asker.ask(token))[0] == 200
        asker.now += 1
        assert (await asker.ask(token))[0] == 401
        told = asker.told()
        assert told.token not in repr(told)


async def test_without_a_check_jobs_are_told_nothing_of_it() -> None:
    world = World()
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    assert not {name for name in environment(job) if name.startswith("INGEST_CANCELLATION_")}


async def test_the_clean_up_is_told_of_no_check_that_would_stop_it() -> None:
    world = World()
    async with serving(world.cluster) as asker:
        world.check = asker.check.check_for
        world.start()
        world.create(onCancel={"image": "example/clean-up:1"})
        await world.settle()
        world.cancel()
        ran: list[dict[str, str]] = []

        def clean_up(job: Object) -> dict[str, Any]:
            ran.append(environment(job))
            return {"exit_code": 0}

        await world.play(each=clean_up)
    assert [env["INGEST_STAGE"] for env in ran] == ["on-cancel"]
    assert "INGEST_CANCELLATION_URL" not in ran[0]
    assert "INGEST_CANCELLATION_TOKEN" not in ran[0]


async def test_a_worker_that_stopped_for_a_cancel_is_never_published() -> None:
    """Its Job is complete, exit code 0; the batch is told among those that did not land."""
    world = World()
    world.create()
    stopped = '{"v":"v1","outcome":"cancelled","read":3,"message":"the run is cancelled, stopped after 3 of 100 rows"}'
    while not any("publish" in job["metadata"]["name"] for job in world.active_jobs()):
        await world.settle()
        for job in world.active_jobs():
            if "publish" not in job["metadata"]["name"]:
                world.work(job)
        await world.settle()
    for job in world.active_jobs():
        world.cluster.start_pod(job["metadata"]["name"])
    await world.settle()
    world.cancel()
    await world.settle()
    await world.play(each=lambda _job: {"result": stopped})
    assert world.phase == "Cancelled"
    assert world.status["records"]["published"] == 0
    assert world.status["cancellation"].get("published", "") == ""
    assert world.status["cancellation"]["notPublished"] != ""
    assert world.status.get("failures", []) == []


async def test_a_worker_that_stopped_for_no_cancel_has_failed_and_is_retried() -> None:
    world = World()
    world.create(retries=1)
    await world.settle()
    (fetch,) = world.active_jobs()
    world.work(fetch, result='{"v":"v1","outcome":"cancelled","message":"the run is cancelled, stopped after 0 rows"}')
    await world.play()
    assert world.phase == "Succeeded"
    assert [failure["reason"] for failure in world.status["failures"]] == ["WorkerCancelled"]


def test_a_reconciler_needs_no_check() -> None:
    cluster = FakeCluster()
    Reconciler(cluster, World().store, worker=WorkerImage(name="i"), instance="t", clock=lambda: datetime.now(UTC))


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://user:pw@host", "http://host?x", "host:80"])
def test_an_address_that_can_not_be_asked_is_refused_at_the_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INGESTRUN_API_URL", url)
    with pytest.raises(ValueError, match="api_url"):
        Settings()
