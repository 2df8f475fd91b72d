"""Runs under caps and quotas, before the strict API server: what is held, what is told, who is served."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World, environment, manifest

from ingestrun.controller.settings import Settings
from ingestrun.controller.watch.resync import resync_once
from ingestrun.kube.errors import Unknown
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.planner.run.fair_sharing import IN_ALL, PER_NAMESPACE, PER_RUN, JobLimits

QUOTA = 'pods "x" is forbidden: exceeded quota: compute, requested: pods=1, used: pods=2, limited: pods=2'


def add(world: World, name: str, **spec: Any) -> RunKey:
    body = manifest(**spec)
    body["metadata"]["name"] = name
    world.cluster.user_create_run(body)
    return RunKey(namespace="default", name=name)


def partitions(count: int, parallelism: int) -> dict[str, Any]:
    return {"batches": {"partitions": {"count": count}}, "parallelism": parallelism}


def condition(world: World, key: RunKey, kind: str) -> dict[str, Any]:
    status = world.cluster.run(key)["status"]
    return next((c for c in status.get("conditions", ()) if c["type"] == kind), {})


def of_run(world: World, key: RunKey) -> list[Object]:
    uid = world.cluster.run(key)["metadata"]["uid"]
    return [job for job in world.active_jobs() if job["metadata"]["labels"]["ingestrun.dev/run-uid"] == uid]


def oldest(world: World) -> Object:
    return min(world.active_jobs(), key=lambda job: int(job["metadata"]["resourceVersion"]))


async def side_by_side(world: World) -> None:
    """Take the passes of all runs at once, as the queue does, interleaved at every call."""
    while world.asked:
        keys, world.asked = dict(world.asked), {}
        delays = await asyncio.gather(*(world.reconciler.reconcile(key, why) for key, why in keys.items()))
        for key, delay in zip(keys, delays, strict=True):
            if delay is not None:
                world.due[key] = world.now + timedelta(seconds=delay)


@pytest.mark.parametrize(
    ("caps", "most", "setting"),
    [
        (JobLimits(per_run=2), 4, "INGESTRUN_MAX_JOBS_PER_RUN"),
        (JobLimits(per_namespace=3), 3, "INGESTRUN_MAX_JOBS_PER_NAMESPACE"),
        (JobLimits(in_all=3), 3, "INGESTRUN_MAX_JOBS)"),
    ],
)
async def test_caps_hold_at_every_moment_however_passes_interleave(caps: JobLimits, most: int, setting: str) -> None:
    world = World(caps)
    keys = [add(world, name, **partitions(12, 8)) for name in ("a", "b")]
    seen: list[int] = []

    async def count(_: Call) -> None:
        seen.append(len(world.active_jobs()))

    world.cluster.on_call = count
    await side_by_side(world)
    held = [condition(world, key, "Backpressured") for key in keys]
    assert [(c["status"], c["reason"]) for c in held] == [("True", "JobLimitReached")] * 2
    assert all(setting in c["message"] for c in held)
    for _ in range(500):
        jobs = world.active_jobs()
        if not jobs:
            break
        assert len(jobs) == most or sum(len(of_run(world, key)) for key in keys) < most
        world.work(random.Random(len(seen)).choice(jobs))
        await side_by_side(world)
    assert max(seen) == most
    for key in keys:
        assert world.cluster.run(key)["status"]["phase"] == "Succeeded"
        assert condition(world, key, "Backpressured")["status"] == "False"


async def test_a_small_run_is_served_beside_a_big_one_and_no_slot_stays_idle() -> None:
    world = World(JobLimits(in_all=4))
    big = add(world, "big", **partitions(200, 100))
    await side_by_side(world)
    assert len(of_run(world, big)) == 4
    small = add(world, "small", **partitions(3, 3))
    await side_by_side(world)
    assert of_run(world, small) == []
    rounds = 0
    while world.cluster.run(small)["status"]["phase"] != "Succeeded":
        rounds += 1
        assert rounds <= 30, "the small run starves"
        world.work(oldest(world))
        await side_by_side(world)
        assert len(world.active_jobs()) == 4
        if of_run(world, small) and condition(world, small, "Backpressured").get("status") == "True":
            assert abs(len(of_run(world, small)) - len(of_run(world, big))) <= 2
    assert len(of_run(world, big)) == 4


async def test_room_wakes_who_waits_at_once() -> None:
    world = World(JobLimits(in_all=1))
    first, second = add(world, "a"), add(world, "b")
    await world.settle()
    (job,) = world.active_jobs()
    waiting = second if of_run(world, first) else first
    holder = first if waiting is second else second
    world.cluster.user_patch_spec(holder, {"cancel": True})
    await world.settle()
    assert [j["metadata"]["name"] for j in of_run(world, waiting)], "no timer was needed"
    assert world.active_jobs()[0]["metadata"]["name"] != job["metadata"]["name"]


async def test_a_create_that_nobody_answered_keeps_its_slot_until_it_is_known() -> None:
    world = World(JobLimits(in_all=1))
    first, second = add(world, "a"), add(world, "b")
    world.cluster.fail_next("create", "jobs", Unknown("no answer"), when="after")
    world.deaf.add("Job")
    with pytest.raises(Unknown):
        await world.reconciler.reconcile(first, "test")
    await world.reconciler.reconcile(second, "test")
    assert (len(of_run(world, first)), len(of_run(world, second))) == (1, 0)
    await world.reconciler.reconcile(first, "test")
    await world.reconciler.reconcile(second, "test")
    assert (len(of_run(world, first)), len(of_run(world, second))) == (1, 0), "found by a list, and counted as itself"


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_lost_answer_blocks_nothing(when: Any) -> None:
    world = World(JobLimits(in_all=1))
    world.create()
    world.cluster.fail_next("create", "jobs", Unknown("no answer"), when=when)
    await world.play()
    assert world.phase == "Succeeded"


async def test_a_restart_counts_what_is_there_before_it_starts_anything() -> None:
    world = World(JobLimits(in_all=3))
    big = add(world, "big", **partitions(9, 9))
    await world.settle()
    assert len(of_run(world, big)) == 3
    small = add(world, "small")
    world.start()
    world.store.usage.start_sync()
    for key in (small, big):
        world.watch.run(None, world.cluster.run(key))
        await world.settle()
        assert len(world.active_jobs()) == 3
    assert not condition(world, small, "Backpressured")
    before = len(world.cluster.calls("list", "jobs"))
    await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
    await world.settle()
    assert len(world.active_jobs()) == 3
    assert condition(world, small, "Backpressured")["status"] == "True"
    assert len(world.cluster.calls("list", "jobs")) == before + 1, "one of all runs"
    world.work(world.active_jobs()[0])
    await world.settle()
    assert len(of_run(world, small)) == 1


async def test_the_jobs_of_runs_that_are_gone_do_not_count_for_ever() -> None:
    """A new process is shown the Job of a run that goes meanwhile, and is never shown that the Job goes too."""
    world = World(JobLimits(in_all=1))
    world.create()
    await world.settle()
    world.start()
    for job in world.cluster.jobs():
        world.watch.job(None, job)
    world.deaf |= {"Job", "IngestRun"}
    world.cluster.user_delete_run(KEY)
    world.deaf.clear()
    other = add(world, "other")
    await world.settle()
    assert of_run(world, other) == []
    await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
    await world.settle()
    assert len(of_run(world, other)) == 1


async def test_a_clean_up_is_neither_counted_nor_held() -> None:
    world = World(JobLimits(in_all=1))
    container = {"image": "example/clean:1"}
    first = add(world, "a", onCancel=container)
    await world.settle()
    add(world, "b")
    world.cluster.user_patch_spec(first, {"cancel": True})
    await world.settle()
    stages = Counter(environment(job)["INGEST_STAGE"] for job in world.active_jobs())
    assert stages == {"fetch": 1, "on-cancel": 1}


def test_the_settings_are_the_caps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in ((PER_RUN, "2"), (PER_NAMESPACE, "30"), (IN_ALL, "400")):
        monkeypatch.setenv(name, value)
    assert Settings().caps == JobLimits(per_run=2, per_namespace=30, in_all=400)
    for name in (PER_RUN, PER_NAMESPACE, IN_ALL):
        monkeypatch.delenv(name)
    assert Settings().caps == JobLimits(in_all=500)


def refusals(world: World) -> int:
    return sum(1 for call in world.cluster.calls("create", "jobs") if not call.stored)


async def test_a_quota_of_zero_holds_until_cancel() -> None:
    world = World()
    world.cluster.job_quota["default"] = 0
    world.create(backpressure={"retrySeconds": 60})
    await world.settle()
    since = world.condition("Backpressured")
    assert (since["status"], since["reason"]) == ("True", "QuotaExceeded")
    assert "exceeded quota: jobs" in since["message"]
    for probe in range(5):
        assert 53 <= (world.due[KEY] - world.now).total_seconds() <= 67
        world.now = world.due[KEY]
        await world.settle()
        assert refusals(world) == probe + 2
    assert world.condition("Backpressured") == since, "since when stays"
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert world.cluster.jobs() == []


async def test_a_restart_keeps_since_when_and_asks_with_one_job() -> None:
    world = World()
    world.cluster.job_quota["default"] = 0
    world.create(**partitions(5, 5))
    await world.settle()
    since = world.condition("Backpressured")
    world.now += timedelta(seconds=30)
    before = refusals(world)
    world.restart()
    await world.settle()
    assert refusals(world) == before + 1
    assert world.condition("Backpressured") == since
    world.cluster.job_quota.clear()
    world.restart()
    await world.settle()
    assert world.condition("Backpressured")["status"] == "False"
    assert len(world.active_jobs()) == 5


async def pass_time(world: World, seconds: int) -> None:
    await world.settle()
    end = world.now + timedelta(seconds=seconds)
    while world.due and min(world.due.values()) <= end:
        world.now = max(world.now, min(world.due.values()))
        await world.settle()
    world.now = end


async def test_no_room_for_so_long_fails_the_run() -> None:
    world = World()
    world.cluster.job_quota["default"] = 0
    world.create(backpressure={"timeoutSeconds": 300})
    await world.settle()
    await pass_time(world, 295)
    assert world.phase == "Running"
    await pass_time(world, 10)
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "BackpressureTimeout"
    assert world.condition("Stalled")["message"].startswith(
        "no room for 300 s (backpressure.timeoutSeconds): QuotaExceeded: "
    )
    assert world.condition("Backpressured")["status"] == "False"


async def test_unschedulable_pods_run_into_the_time_out_too_and_their_jobs_go() -> None:
    world = World()
    world.create(backpressure={"timeoutSeconds": 300})
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.create_pod(job["metadata"]["name"], unschedulable="0/3 nodes are available")
    await world.settle()
    await pass_time(world, 310)
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "BackpressureTimeout"
    assert "0/3 nodes" in world.condition("Succeeded")["message"]
    assert world.active_jobs() == []


async def pass_hours(world: World, hours: int) -> None:
    """Hour by hour, and whoever keeps deadlines keeps them."""
    for _ in range(hours):
        await pass_time(world, 3600)
        world.cluster.keep_deadlines()
        await world.settle()


@pytest.mark.parametrize("full", ["no node has room", "a quota refuses the pod"])
async def test_waiting_for_room_for_hours_costs_no_attempt(full: str) -> None:
    """The stage's deadline is a minute, and there are no retries: one that ran while it waits would fail the run."""
    world = World()
    stage = {"image": "example/worker:1", "activeDeadlineSeconds": 60}
    world.create(fetch=stage, retries=0, batches={"partitions": {"count": 1}})
    await world.settle()
    (job,) = world.active_jobs()
    if full == "no node has room":
        world.cluster.create_pod(job["metadata"]["name"], unschedulable="0/3 nodes are available")
    else:
        world.cluster.refuse_pod(job["metadata"]["name"], message=QUOTA)
    for _ in range(3):
        await pass_hours(world, 2)
        assert world.phase == "Running"
        assert world.condition("Backpressured")["status"] == "True"
        assert world.status["failures"] == []
    world.cluster.start_pod(job["metadata"]["name"])
    await pass_time(world, 59)
    world.cluster.keep_deadlines()
    await world.settle()
    assert world.condition("Backpressured")["status"] == "False"
    await world.play()
    assert world.phase == "Succeeded"
    assert (world.status["retries"], world.status["failures"]) == ([], [])
    assert len([call for call in world.cluster.calls("create", "jobs") if "-fetch-" in call.name]) == 1


async def test_a_stage_is_held_to_its_deadline_from_when_a_node_has_taken_it() -> None:
    world = World()
    world.create(fetch={"image": "example/worker:1", "activeDeadlineSeconds": 60}, batches={"partitions": {"count": 1}})
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.start_pod(job["metadata"]["name"])
    await pass_time(world, 60)
    world.cluster.keep_deadlines()
    await world.settle()
    (failure,) = world.status["failures"]
    assert (failure["reason"], failure["attempt"]) == ("DeadlineExceeded", 0)
    assert failure["message"].startswith("the stage ran longer than its activeDeadlineSeconds; retry 1 of 3 in ")
    await world.play()
    assert world.status["retries"] == [{"stage": "fetch", "reason": "DeadlineExceeded", "count": 1}]
    assert world.phase == "Succeeded"


async def test_a_jobs_own_deadline_is_still_one() -> None:
    """Of a Job that an operator before decision 0007 has made: the upgrade must not take it for a lost pod."""
    world = World()
    world.create(batches={"partitions": {"count": 1}})
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.start_pod(job["metadata"]["name"])
    await world.settle()
    world.cluster.fail_job(job["metadata"]["name"], reason="DeadlineExceeded")
    await world.settle()
    assert [failure["reason"] for failure in world.status["failures"]] == ["DeadlineExceeded"]


async def test_the_time_out_is_for_want_of_room_not_for_waiting_in_turn() -> None:
    """Its Jobs run, one after another: it is never without room for long, however long it all takes."""
    world = World(JobLimits(in_all=1))
    world.create(**partitions(6, 6), backpressure={"timeoutSeconds": 100})
    await world.settle()
    for number in range(18):
        (job,) = world.active_jobs()
        assert world.condition("Backpressured")["status"] == ("True" if number < 15 else "False")
        world.cluster.start_pod(job["metadata"]["name"])
        await world.settle()
        await pass_time(world, 150)
        world.work(job)
        await world.settle()
        await pass_time(world, 50)
        if world.phase == "Succeeded":
            return
        assert world.phase == "Running", world.condition("Succeeded")
    assert world.phase == "Succeeded"


async def test_suspended_it_asks_for_nothing_and_its_patience_begins_anew() -> None:
    world = World()
    world.cluster.job_quota["default"] = 0
    world.create(backpressure={"timeoutSeconds": 300})
    await world.settle()
    await pass_time(world, 200)
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    await world.settle()
    held = world.condition("Backpressured")
    assert (held["status"], held["reason"]) == ("False", "Suspended")
    before = refusals(world)
    await pass_time(world, 1000)
    assert (world.phase, refusals(world)) == ("Suspended", before)
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.settle()
    assert world.condition("Backpressured")["status"] == "True"
    await pass_time(world, 280)
    assert world.phase == "Running"
    await pass_time(world, 40)
    assert world.condition("Succeeded")["reason"] == "BackpressureTimeout"


async def test_a_quota_on_jobs_is_lived_with_by_deleting_what_is_accounted_for() -> None:
    world = World()
    world.cluster.job_quota["default"] = 6
    world.create(**partitions(20, 2))
    await world.play(rounds=400)
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 200
    assert len(world.cluster.calls("deletecollection", "jobs")) <= 21


async def test_a_quota_is_shared_fairly() -> None:
    """Whoever has fewer is served first when a place comes free: the big run does not take it back at once."""
    world = World()
    world.cluster.job_quota["default"] = 9
    big = add(world, "big", **partitions(200, 3))
    await world.settle()
    small = add(world, "small", **partitions(3, 3))
    ends: Callable[[], bool] = lambda: world.cluster.run(small)["status"].get("phase") == "Succeeded"  # noqa: E731
    for _ in range(400):
        await world.settle()
        if ends():
            break
        if world.active_jobs():
            world.work(oldest(world))
        elif world.due:
            world.now = max(world.now, min(world.due.values()))
    published = world.cluster.run(big)["status"]["batches"]["published"]
    assert ends(), f"the small run starves; the big one has published {published}"
    assert int(published.rpartition("-")[2]) < 30


async def test_a_pod_that_a_quota_refuses_is_backpressure_with_the_servers_sentence() -> None:
    world = World()
    world.create(**partitions(4, 2))
    await world.settle()
    first, second = (job["metadata"]["name"] for job in world.active_jobs())
    world.cluster.start_pod(first)
    world.cluster.refuse_pod(second, message=QUOTA)
    await world.settle()
    assert world.cluster.calls("list", "events") == [], "not before it is late"
    await pass_time(world, 6)
    held = world.condition("Backpressured")
    assert (held["status"], held["reason"]) == ("True", "QuotaExceeded")
    assert "exceeded quota: compute, requested: pods=1" in held["message"]
    assert world.condition("Reconciling")["reason"] == "PodNotStarting"
    creates = len(world.cluster.calls("create", "jobs"))
    world.work(world.cluster.job(first))
    await world.settle()
    assert len(world.cluster.calls("create", "jobs")) == creates, "nothing new while it waits"
    await pass_time(world, 600)
    assert world.phase == "Running", "however long: a quota is no failure"
    assert len(world.cluster.calls("list", "events")) <= 42, "four a minute at most"
    world.cluster.start_pod(second)
    await world.play()
    assert world.phase == "Succeeded"


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            'pods "x" is forbidden: maximum memory usage per Container is 1Gi, but limit is 2Gi',
            "maximum memory usage per Container is 1Gi",
        ),
        ('pods "x" is forbidden: violates PodSecurity "restricted:latest": hostPath volumes', "violates PodSecurity"),
        ('pods "x" is forbidden: failed quota: q: must specify cpu for: fetch', "must specify cpu"),
        ('pods "x" is forbidden: error looking up service account default/gone', "service account"),
        ('admission webhook "no.example.com" denied the request: not here', "denied the request: not here"),
    ],
)
async def test_a_pod_that_is_refused_for_good_fails_its_batch_after_the_grace(message: str, words: str) -> None:
    world = World()
    world.create(retries=0)
    await world.settle()
    world.cluster.refuse_pod(world.active_jobs()[0]["metadata"]["name"], message=message)
    await world.settle()
    await pass_time(world, 20)
    assert world.phase == "Running"
    assert words in world.condition("Reconciling")["message"]
    assert world.condition("Backpressured") == {}
    await pass_time(world, 110)
    await world.play()
    assert world.phase == "Failed"
    (failure,) = world.status["failures"]
    assert failure["reason"] == "PodRefused"
    assert words in failure["message"]
    assert world.active_jobs() == []


async def test_the_normal_course_reads_no_events() -> None:
    world = World(JobLimits(in_all=2))
    for name in ("a", "b"):
        add(world, name, **partitions(5, 4))
    await world.play()
    assert world.cluster.calls("list", "events") == []


@pytest.mark.parametrize("batches", [4, 10])
async def test_waiting_under_a_cap_costs_no_call_per_batch(batches: int) -> None:
    """The budget of a batch of three Jobs holds for runs that wait for each other, however long they are."""
    world = World(JobLimits(in_all=3))
    keys = [add(world, name, **partitions(batches, 4)) for name in ("a", "b", "c")]
    await world.play(rounds=1000)
    assert all(world.cluster.run(key)["status"]["phase"] == "Succeeded" for key in keys)
    calls = [call for call in world.cluster.history if call.resource != "events"]
    reads = sum(1 for call in calls if call.verb in ("get", "list"))
    assert sum(1 for call in calls if call.verb == "create") == 3 * 3 * batches
    assert len(calls) - reads <= 3 * (5 * batches + 6)
    assert reads <= 3 * (3 * batches + 6)


async def test_a_look_at_a_namespace_serves_all_its_runs() -> None:
    world = World()
    for name in ("a", "b", "c"):
        add(world, name, **partitions(4, 4))
    await world.settle()
    for job in world.active_jobs():
        world.cluster.refuse_pod(job["metadata"]["name"], message=QUOTA)
    await pass_time(world, 61)
    assert len(world.cluster.calls("list", "events")) <= 5


async def test_a_refused_pod_comes_before_new_jobs_of_a_run_that_has_more() -> None:
    world = World()
    small = add(world, "small")
    await world.settle()
    (refused,) = of_run(world, small)
    world.cluster.refuse_pod(refused["metadata"]["name"], message=QUOTA)
    await pass_time(world, 6)
    big = add(world, "big", **partitions(50, 4))
    await world.settle()
    assert len(of_run(world, big)) == 1
    assert condition(world, big, "Backpressured")["reason"] == "QuotaExceeded"
    world.cluster.start_pod(refused["metadata"]["name"])
    await world.settle()
    assert len(of_run(world, big)) == 4, "woken when the pod is there"


async def test_one_whose_pod_never_fits_does_not_hold_the_others_for_ever() -> None:
    world = World()
    small = add(world, "small")
    await world.settle()
    world.cluster.refuse_pod(of_run(world, small)[0]["metadata"]["name"], message=QUOTA)
    await pass_time(world, 6)
    big = add(world, "big", **partitions(50, 4))
    await pass_time(world, 6)
    world.cluster.start_pod(of_run(world, big)[0]["metadata"]["name"])
    await pass_time(world, 700)
    assert len(of_run(world, big)) == 4


async def test_the_events_could_not_be_read() -> None:
    world = World()
    world.create()
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.refuse_pod(job["metadata"]["name"], message=QUOTA)
    world.cluster.fail_next("list", "events", Unknown("?"), times=2)
    await pass_time(world, 10)
    assert world.phase == "Running"
    assert world.condition("Backpressured") == {}
    await pass_time(world, 40)
    assert world.condition("Backpressured")["reason"] == "QuotaExceeded"


async def test_the_worst_sentence_keeps_the_status_small() -> None:
    world = World()
    world.create()
    await world.settle()
    world.cluster.refuse_pod(world.active_jobs()[0]["metadata"]["name"], message="pods x is forbidden: " + "x" * 5000)
    await pass_time(world, 20)
    assert len(json.dumps(world.status)) < 3000
