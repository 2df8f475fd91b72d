"""How long a run may take, stand still and stay: deadlines, staleness, suspension, the time to live."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import structlog
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.errors import NotFound


@pytest.fixture
def world() -> World:
    return World()


async def after(world: World, seconds: float) -> None:
    """Let time pass, timer by timer."""
    end = world.now + timedelta(seconds=seconds)
    while True:
        await world.settle()
        due = min(world.due.values(), default=end)
        if due > end:
            break
        world.now = max(world.now, due)
        if not world.due or due == end:
            break
    world.now = end
    world.asked.setdefault(KEY, "test")
    await world.settle()


def stage(world: World) -> tuple[str, str]:
    (job,) = world.active_jobs()
    env = environment(job)
    return env["INGEST_BATCH"], env["INGEST_STAGE"]


async def start(world: World, **spec: Any) -> str:
    """A run of two batches, one after the other; its first pod runs. Returns the Job."""
    world.create(**{"parallelism": 1, "batches": {"partitions": {"count": 2}}, **spec})
    await world.settle()
    return run_pod(world)


def run_pod(world: World) -> str:
    (job,) = world.active_jobs()
    name: str = job["metadata"]["name"]
    world.cluster.start_pod(name)
    return name


# ---- staleness --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restarted", [False, True])
async def test_run_without_progress_cancels_itself(world: World, restarted: bool) -> None:
    first = await start(world, staleAfterSeconds=600, onCancel={"image": "example/clean:1"})
    await after(world, 599)
    assert world.phase == "Running"
    if restarted:
        world.restart()
    await after(world, 2)
    assert world.phase == "Cancelled"
    record = world.status["cancellation"]
    assert record["reason"] == "no progress for 600 s (staleAfterSeconds)"
    assert record["requestedBy"] == "ingestrun-operator"
    assert (record["policy"], record["activeBatches"]) == ("Drain", 1)
    assert world.condition("Cancelled")["reason"] == "Stale"
    assert world.condition("Succeeded")["reason"] == "Stale", "as `kubectl get` shows it"
    assert world.status["duration"] == "10m"
    assert world.condition("Drained")["status"] == "False"
    notes = [event["note"] for event in world.cluster.events() if event["reason"] == "Cancelled"]
    assert notes == ["cancelled by ingestrun-operator: no progress for 600 s (staleAfterSeconds)"]
    world.work(world.cluster.job(first))
    await world.play()
    assert world.condition("Drained")["status"] == "True"
    assert world.status["cancellation"]["onCancel"]["state"] == "Succeeded"
    created = [call.name for call in world.creates_after_cancelled()]
    assert len(created) == 1
    assert "on-cancel" in created[0]


async def test_policy_of_a_cancel_to_come_holds_for_a_stale_run(world: World) -> None:
    await start(world, staleAfterSeconds=600, cancellation={"policy": "Terminate"})
    await after(world, 601)
    assert world.status["cancellation"]["policy"] == "Terminate"
    await world.play()
    assert len(world.cluster.calls("delete", "pods")) == 1


async def test_long_batch_whose_stages_go_on_is_not_stale(world: World) -> None:
    """The seed's reaper measured age. Here a batch may take longer than the limit as long as its stages change."""
    await start(world, staleAfterSeconds=600)
    for expected in ("fetch", "hook", "publish"):
        assert stage(world) == ("0", expected)
        await after(world, 500)
        assert world.phase == "Running"
        world.work(world.active_jobs()[0])
        await world.settle()
        run_pod(world)
    assert stage(world) == ("1", "fetch")
    await after(world, 599)
    assert world.phase == "Running"
    await after(world, 2)
    assert world.phase == "Cancelled"


async def test_retries_are_no_progress(world: World) -> None:
    """A run that fails and tries again for ever stands still, however busy it looks."""
    await start(world, staleAfterSeconds=600, retries=100)
    began = world.now
    for _ in range(60):
        for job in world.active_jobs():
            run_pod(world)
            world.work(job, exit_code=1)
        await world.settle()
        if world.phase == "Cancelled":
            break
        world.now = min(world.due.values())
        await world.settle()
    assert world.phase == "Cancelled"
    assert 595 <= (world.now - began).total_seconds() <= 665
    assert world.condition("Cancelled")["reason"] == "Stale"


async def test_garbage_results_are_no_progress(world: World) -> None:
    await start(world, staleAfterSeconds=60, retries=100, backoff={"initialSeconds": 1, "maxSeconds": 1})
    for _ in range(80):
        for job in world.active_jobs():
            world.work(job, result="<html>")
        await world.settle()
        if world.phase == "Cancelled":
            return
        world.now = min(world.due.values())
        await world.settle()
    raise AssertionError(f"never stale: {world.status}")


async def test_suspended_time_does_not_count(world: World) -> None:
    first = await start(world, staleAfterSeconds=600)
    await after(world, 300)
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    await world.settle()
    assert world.condition("Suspended")["status"] == "True"
    await after(world, 5000)
    assert world.phase == "Suspended"
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.settle()
    assert (world.phase, world.condition("Suspended")["status"]) == ("Running", "False")
    await after(world, 599)
    assert world.phase == "Running"
    assert first
    await after(world, 2)
    assert world.phase == "Cancelled"


async def test_retry_that_waits_for_room_is_not_stale(world: World) -> None:
    await start(world, staleAfterSeconds=600)
    world.cluster.job_quota["default"] = 0
    world.work(world.active_jobs()[0], exit_code=1)
    await after(world, 5000)
    assert world.phase == "Running"
    assert world.condition("Backpressured")["status"] == "True"
    world.cluster.job_quota.clear()
    await after(world, 120)
    assert world.phase == "Running"
    run_pod(world)
    await after(world, 601)
    assert world.phase == "Cancelled"


@pytest.mark.parametrize("kind", ["quota", "unschedulable", "queued"])
async def test_waiting_for_room_does_not_count(world: World, kind: str) -> None:
    if kind == "quota":
        world.cluster.job_quota["default"] = 0
    world.create(staleAfterSeconds=600, parallelism=1, batches={"partitions": {"count": 2}})
    await world.settle()
    if kind == "unschedulable":
        world.cluster.create_pod(world.active_jobs()[0]["metadata"]["name"], unschedulable="0/3 nodes are available")
    await after(world, 5000)
    assert world.phase == "Running"
    if kind == "quota":
        world.cluster.job_quota.clear()
        await after(world, 120)
    run_pod(world)
    await after(world, 599)
    assert world.phase == "Running"
    await after(world, 2)
    assert world.phase == "Cancelled"


async def test_pod_that_has_its_node_and_does_not_start_stands_still(world: World) -> None:
    world.create(staleAfterSeconds=600, parallelism=1, batches={"partitions": {"count": 2}})
    await world.settle()
    world.cluster.create_pod(world.active_jobs()[0]["metadata"]["name"])
    await after(world, 601)
    assert world.phase == "Cancelled"


@pytest.mark.parametrize(("ended", "begun"), [("fetch", "hook"), ("hook", "publish")])
async def test_what_ended_while_the_operator_was_down_is_progress(world: World, ended: str, begun: str) -> None:
    first = await start(world, staleAfterSeconds=600)
    if ended == "hook":
        world.work(world.active_jobs()[0])
        await world.settle()
        first = run_pod(world)
    world.deaf |= {"IngestRun", "Job", "Pod"}
    world.asked.clear()
    world.due.clear()
    world.now += timedelta(seconds=30)
    world.work(world.cluster.job(first))
    world.now += timedelta(hours=5)
    world.deaf.clear()
    world.restart()
    await world.settle()
    assert world.phase == "Running"
    assert stage(world) == ("0", begun)
    world.restart()
    await world.settle()
    assert world.phase == "Running"


async def test_staleness_is_set_and_cleared_while_it_runs(world: World) -> None:
    await start(world)
    await after(world, 1000)
    world.cluster.user_patch_spec(KEY, {"staleAfterSeconds": 1100})
    await after(world, 90)
    assert world.phase == "Running"
    world.cluster.user_patch_spec(KEY, {"staleAfterSeconds": None})
    await after(world, 1000)
    assert world.phase == "Running"
    world.cluster.user_patch_spec(KEY, {"staleAfterSeconds": 60})
    await world.settle()
    assert world.phase == "Cancelled"


async def test_change_of_a_run_that_cancelled_itself_is_not_taken_for_a_cancel_taken_back(world: World) -> None:
    await start(world, staleAfterSeconds=60)
    await after(world, 61)
    await world.play()
    world.cluster.user_patch_spec(KEY, {"ttlSecondsAfterFinished": 86_400})
    await world.settle()
    assert world.phase == "Cancelled"
    assert "CancelCleared" not in {event["reason"] for event in world.cluster.events()}


# ---- the deadline -----------------------------------------------------------------------------------------------


async def test_deadline_is_shortened_and_extended_while_it_runs(world: World) -> None:
    await start(world, activeDeadlineSeconds=100)
    await after(world, 90)
    world.cluster.user_patch_spec(KEY, {"activeDeadlineSeconds": 500})
    await after(world, 300)
    assert world.phase == "Running"
    world.cluster.user_patch_spec(KEY, {"activeDeadlineSeconds": 200})
    await world.settle()
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds of 200" in world.condition("Succeeded")["message"]


async def test_deadline_stops_while_suspended_and_begins_anew(world: World) -> None:
    """As with a Job: its startTime, and so its activeDeadlineSeconds, begins anew when it is resumed."""
    await start(world, activeDeadlineSeconds=100)
    await after(world, 60)
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    await after(world, 1000)
    assert world.phase == "Suspended"
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.settle()
    await after(world, 99)
    assert world.phase == "Running"
    await after(world, 2)
    assert world.phase == "Failed"
    assert world.condition("Suspended")["status"] == "False"


async def test_run_cancelled_while_suspended_is_not_suspended_any_more(world: World) -> None:
    await start(world, suspend=None)
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    await world.settle()
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert (world.condition("Suspended")["status"], world.condition("Suspended")["reason"]) == ("False", "Finished")


# ---- the time to live -------------------------------------------------------------------------------------------


def exists(world: World) -> bool:
    try:
        world.cluster.run(KEY)
    except NotFound:
        return False
    return True


@pytest.mark.parametrize("how", ["Succeeded", "Failed", "Cancelled"])
async def test_run_is_deleted_when_its_time_is_over_with_its_jobs(world: World, how: str) -> None:
    world.create(ttlSecondsAfterFinished=3600, retries=0, batches={"partitions": {"count": 1}})
    await world.settle()
    if how == "Cancelled":
        world.cancel()
        await world.settle()
    else:
        while world.active_jobs() and world.phase == "Running":
            world.work(world.active_jobs()[0], **({"exit_code": 1} if how == "Failed" else {}))
            await world.settle()
    assert world.phase == how
    ended = world.now
    await after(world, 3599)
    assert exists(world)
    with structlog.testing.capture_logs() as logs:
        await after(world, 2)
    assert not exists(world)
    assert world.cluster.jobs() == []
    (call,) = world.cluster.calls("delete", "ingestruns")
    assert (call.body or {})["preconditions"].keys() == {"uid", "resourceVersion"}
    assert [event["reason"] for event in world.cluster.events()].count("Expired") == 1
    assert [line["phase"] for line in logs if line["event"] == "ingest run deleted, its time is over"] == [how]
    assert ended
    assert world.due == {}


async def test_ttl_of_zero_waits_for_the_drain_the_clean_up_and_the_sweep(world: World) -> None:
    first = await start(world, ttlSecondsAfterFinished=0, onCancel={"image": "example/clean:1"})
    world.cancel()
    await after(world, 500)
    assert exists(world), "its pod still runs"
    world.work(world.cluster.job(first))
    await after(world, 30)
    (clean_up,) = world.active_jobs()
    assert exists(world), "its clean-up still runs"
    world.work(clean_up)
    await after(world, 30)
    assert not exists(world)


async def test_ttl_of_zero_waits_a_minute_for_what_was_under_way(world: World) -> None:
    world.create(ttlSecondsAfterFinished=0, cancel=True)
    await after(world, 59)
    assert exists(world)
    await after(world, 2)
    assert not exists(world)


async def test_ttl_is_set_changed_and_unset_after_the_end(world: World) -> None:
    world.create(cancel=True)
    await after(world, 5000)
    assert world.due == {}
    for ttl in (9000, 6000, None):
        world.cluster.user_patch_spec(KEY, {"ttlSecondsAfterFinished": ttl})
        await world.settle()
    await after(world, 5000)
    assert exists(world)
    world.cluster.user_patch_spec(KEY, {"ttlSecondsAfterFinished": 20_000})
    await after(world, 9900)
    assert exists(world)
    await after(world, 200)
    assert not exists(world)


async def test_waiting_for_the_time_to_live_costs_no_calls(world: World) -> None:
    world.create(ttlSecondsAfterFinished=100_000, cancel=True)
    await after(world, 100)
    before = len(world.cluster.history)
    for _ in range(5):
        await after(world, 300)
    assert len(world.cluster.history) == before


async def test_ttl_taken_back_while_the_watch_is_silent_is_respected(world: World) -> None:
    world.create(ttlSecondsAfterFinished=600, cancel=True)
    await after(world, 100)
    world.deaf.add("IngestRun")
    world.cluster.user_patch_spec(KEY, {"ttlSecondsAfterFinished": None})
    await after(world, 1000)
    assert exists(world)
    assert len(world.cluster.calls("delete", "ingestruns")) == 1


async def test_ttl_survives_a_restart(world: World) -> None:
    world.create(ttlSecondsAfterFinished=600, cancel=True)
    await after(world, 100)
    world.restart()
    await after(world, 499)
    assert exists(world)
    await after(world, 2)
    assert not exists(world)


async def test_ended_run_without_ttl_stays(world: World) -> None:
    world.create(cancel=True)
    await after(world, 10**7)
    assert exists(world)


# ---- a namespace that goes ----------------------------------------------------------------------------------------


async def test_namespace_being_deleted_is_no_hot_loop(world: World) -> None:
    """Creates are refused there: it asks again every `retrySeconds`, and says so; nothing is lost should it not go."""
    await start(world)
    world.cluster.terminating.add("default")
    world.work(world.active_jobs()[0])
    refused = len(world.cluster.calls("create", "jobs"))
    await world.settle()
    for _ in range(3):
        await world.reconciler.reconcile(KEY, "test")
    assert len(world.cluster.calls("create", "jobs")) == refused + 1
    assert world.condition("Backpressured")["reason"] == "NamespaceTerminating"
    assert "is being deleted" in world.condition("Backpressured")["message"]
    assert [call.outcome for call in world.cluster.calls("create", "jobs")[refused:]].count("ok") == 0
    world.cluster.user_delete_run(KEY)
    await world.settle()
    assert world.store.keys() == []
