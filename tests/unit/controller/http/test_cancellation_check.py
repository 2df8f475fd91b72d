"""The cancellation check over HTTP, on the loopback, in front of the fake API server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any

import aiohttp
import pytest
from tests.fakes.cluster import Call, FakeCluster
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.controller.http.cancellation_check import TOKEN_WAIT_SECONDS, CancellationCheckServer
from ingestrun.controller.http.tokens import SECRET_NAME, CheckKey, issue
from ingestrun.controller.reconcile.reconciler import Reconciler
from ingestrun.controller.settings import Settings
from ingestrun.kube.errors import Unavailable
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.planner.jobs.manifest import CheckEndpoint, WorkerImage

Answer = tuple[int, dict[str, Any]]


class Asker:
    """The API over a fake cluster, and a client of it. `now` is the clock of the tokens."""

    def __init__(self, cluster: FakeCluster, cache_seconds: float = 0.0) -> None:
        self.cluster = cluster
        self.now = time.time()
        self.key = CheckKey(cluster, namespace="default", alone=True)
        self.api = CancellationCheckServer(
            cluster,
            self.key,
            url="http://check.example/base/",
            clock=lambda: datetime.fromtimestamp(self.now, UTC),
            cache_seconds=cache_seconds,
        )
        self.port = 0
        self.session: aiohttp.ClientSession

    def told(self, key: RunKey = KEY) -> CheckEndpoint:
        told = self.api.check_for(IngestRun.read(self.cluster.run(key)), 60)
        assert told is not None
        return told

    async def ask(self, token: str | None, key: RunKey = KEY) -> Answer:
        path = f"/api/v1/namespaces/{key.namespace}/ingestruns/{key.name}/cancellation-check"
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
        base = {"id": uid, "namespace": "default", "name": "flights"}
        no = {"cancelled": False, "completed": False, "failed": False}
        assert await asker.ask(token) == (200, {**base, "phase": "Pending", **no})
        for phase, said in (("Running", {}), ("Suspended", {}), ("Failed", {"failed": True})):
            asker.status(phase=phase)
            assert await asker.ask(token) == (200, {**base, "phase": phase, **no, **said})
        for phase, said in (("Succeeded", {"completed": True}), ("Cancelled", {"cancelled": True})):
            asker.status(phase=phase)
            assert await asker.ask(token) == (200, {**base, "phase": phase, **no, **said})


async def test_a_cancel_that_is_not_applied_yet_counts_and_one_that_came_too_late_does_not() -> None:
    cluster = a_run()
    async with serving(cluster) as asker:
        token = asker.told().token
        asker.status(phase="Running")
        cluster.user_patch_spec(KEY, {"cancel": True})
        _, body = await asker.ask(token)
        assert (body["phase"], body["cancelled"]) == ("Running", True)
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
        assert asker.api._looks.keys() <= {(KEY, cluster.run(KEY)["metadata"]["uid"])}
        while asker.api._looks:
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
    api = CancellationCheckServer(cluster, key, url="http://x", clock=lambda: datetime.now(UTC))
    run = IngestRun.read(cluster.run(KEY))
    assert api.check_for(run, 60) is None
    port = await api.serve(0, "127.0.0.1")
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/api/v1/namespaces/default/ingestruns/flights/cancellation-check") as got,
    ):
        assert got.status == 503
    cluster.user_apply_secret(SECRET_NAME)
    await key.refresh()
    assert api.check_for(run, 60) is not None
    await api.close()


# --- what Jobs are told


async def test_each_job_gets_the_address_and_a_token_of_its_own_run() -> None:
    world = World()
    async with serving(world.cluster) as asker:
        asker.now = world.now.timestamp()
        world.check = asker.api.check_for
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
        world.check = asker.api.check_for
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
