"""What users are told: refusals by whatever still works, transitions by one line each, and nothing twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, MutableMapping
from datetime import timedelta
from typing import Any

import pytest
import structlog
from structlog.contextvars import merge_contextvars
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World, manifest

from ingestrun.controller.watch.resync import resync_once
from ingestrun.kube.errors import Denied, Forbidden, Invalid, KubeError, QuotaExceeded, Unavailable, Unknown
from ingestrun.kube.protocol import RunKey

BESIDE = RunKey(namespace="default", name="beside")
FROZEN = "ValidatingAdmissionPolicy 'bug-status' denied request: the namespace is frozen for the audit"

Lines = list[MutableMapping[str, Any]]


@pytest.fixture
def lines() -> Iterator[Lines]:
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as found:
        yield found


def told(world: World, reason: str, run: str = KEY.name) -> list[str]:
    events = world.cluster.events()
    return [event["note"] for event in events if event["reason"] == reason and event["regarding"]["name"] == run]


async def passes(world: World, number: int) -> None:
    for _ in range(number):
        if not await world.step() and world.due:
            world.now = max(world.now, min(world.due.values()))


def freeze(world: World, error: KubeError, *, name: str = KEY.name) -> None:
    """Refuse each write of that run's status."""

    def admit(_: str, resource: str, obj: Any) -> None:
        if resource == "ingestruns/status" and obj["metadata"]["name"] == name:
            raise error

    world.cluster.admit = admit


async def test_a_refused_status_write_is_told_once_with_the_servers_sentence(lines: Lines) -> None:
    world = World()
    uid = world.create()["metadata"]["uid"]
    other = manifest(batches={"partitions": {"count": 1}})
    world.cluster.user_create_run({**other, "metadata": {"name": BESIDE.name, "namespace": BESIDE.namespace}})
    freeze(world, Denied(FROZEN))
    for _ in range(20):
        await passes(world, 3)
        for job in world.active_jobs():
            world.work(job)
    assert world.cluster.run(BESIDE)["status"]["phase"] == "Succeeded"
    assert "phase" not in world.status
    (note,) = told(world, "RequestRefused")
    assert FROZEN in note
    own = [line for line in lines if line.get("run") == KEY.name]
    (line,) = [line for line in own if line["event"] == "request refused"]
    assert (line["namespace"], line["uid"], line["ingest_run_id"]) == (KEY.namespace, uid, uid)
    assert FROZEN in line["why"]
    assert told(world, "RequestRefused", BESIDE.name) == []

    world.cluster.admit = None
    await world.play()
    assert world.phase == "Succeeded"


async def test_another_refusal_is_told_anew_and_so_is_the_same_after_a_pass_that_went_well() -> None:
    world = World()
    world.create()
    freeze(world, Denied(FROZEN))
    await passes(world, 5)
    freeze(world, Forbidden("no right to patch ingestruns/status"))
    await passes(world, 5)
    assert [note.rpartition(": ")[2] for note in told(world, "RequestRefused")] == [
        "the namespace is frozen for the audit",
        "no right to patch ingestruns/status",
    ]
    world.cluster.admit = None
    await passes(world, 5)
    assert world.phase == "Running"
    freeze(world, Denied(FROZEN))
    for job in world.active_jobs():
        world.work(job)
    await passes(world, 5)
    assert len(told(world, "RequestRefused")) == 3


@pytest.mark.parametrize("error", [Unavailable("no connection"), Unknown("no answer")])
async def test_a_server_that_does_not_answer_is_no_event(error: KubeError) -> None:
    world = World()
    world.create()
    freeze(world, error)
    await passes(world, 10)
    assert world.cluster.events() == []


async def test_a_refused_delete_is_told() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()
    world.cluster.fail_next("delete", "jobs", Forbidden("cannot delete resource jobs"), times=1000)
    world.cancel()
    await passes(world, 20)
    assert world.phase == "Cancelled"
    (note,) = told(world, "RequestRefused")
    assert "cannot delete resource jobs" in note


async def test_what_an_event_would_have_told_is_in_the_log_if_it_is_refused(lines: Lines) -> None:
    world = World()
    uid = world.create()["metadata"]["uid"]
    world.cluster.fail_next("create", "events", Denied("Events are frozen, too"), times=1000)
    await world.settle()
    refused = [line for line in lines if line["event"] == "an Event could not be posted"]
    assert [(line["reason"], line["why"]) for line in refused] == [("Started", "the first batch is claimed")]
    assert refused[0]["error"] == "Events are frozen, too"
    assert {refused[0][field] for field in ("uid", "ingest_run_id")} == {uid}


async def test_a_fault_of_the_operator_is_told_without_its_text() -> None:
    world = World()
    world.create(parallelism=1)
    await world.settle()

    async def fail(call: Call) -> None:
        if call.resource == "ingestruns/status":
            raise RuntimeError("hunter2")

    world.cluster.on_call = fail
    for job in world.active_jobs():
        world.work(job)
    for _ in range(3):
        world.add(KEY, "test")
        with pytest.raises(RuntimeError):
            await world.settle()
    (note,) = told(world, "PassFailed")
    assert "RuntimeError" in note
    assert "hunter2" not in note


@pytest.mark.parametrize(
    ("error", "ends", "tries"),
    [
        (Forbidden("jobs is forbidden"), None, 2),
        (QuotaExceeded("exceeded quota: count/jobs.batch"), None, 2),
        (Invalid("spec.template: Invalid value"), "Failed", 1),
        (Denied("ValidatingAdmissionPolicy 'p' denied request: no clean-ups"), "Failed", 1),
    ],
)
async def test_a_refused_clean_up_is_told_and_not_repeated_at_once(
    error: KubeError, ends: str | None, tries: int
) -> None:
    world = World()
    world.create(parallelism=1, onCancel={"image": "example/clean:1"})
    await world.settle()
    world.cancel()
    world.cluster.fail_next("create", "jobs", error, times=1000)
    before = len(world.cluster.calls("create", "jobs"))
    until = world.now + timedelta(seconds=90)
    while world.now < until and (await world.step() or world.due):
        if not world.asked and not world.settling and world.due:
            world.now = max(world.now, min(world.due.values()))
    assert len(world.cluster.calls("create", "jobs")) - before == tries
    state = world.status["cancellation"]["onCancel"]
    assert state["state"] == (ends or "Claimed")
    assert str(error) in state["message"]
    (note,) = told(world, "OnCancelFailed" if ends else "OnCancelWaiting")
    assert str(error) in note
    world.cluster.faults.clear()
    await world.play()
    assert world.status["cancellation"]["onCancel"]["state"] == (ends or "Succeeded")
    assert world.creates_after_cancelled() == [] or not ends


def occasions(lines: Lines) -> list[tuple[str, str]]:
    return [(line["event"], line["reason"]) for line in lines if "reason" in line]


async def test_each_transition_has_one_line(lines: Lines) -> None:
    world = World()
    world.create(parallelism=1, suspend=True)
    await world.settle()
    world.cluster.job_quota["default"] = 0
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.settle()
    for _ in range(3):
        world.now = max(world.now, *world.due.values())
        await world.settle()
    world.cluster.job_quota.clear()
    world.now = max(world.now, *world.due.values())
    await world.settle()
    (job,) = world.active_jobs()
    world.cluster.create_pod(job["metadata"]["name"])
    world.cluster.pod_waits(job["metadata"]["name"], reason="ErrImagePull")
    await world.settle()
    world.cluster.start_pod(job["metadata"]["name"])
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.settle()
    world.restart()
    await world.settle()
    found = [occasion for occasion in occasions(lines) if occasion[0] != "job refused"]
    assert found == [
        ("ingest run suspended", "Suspended"),
        ("ingest run running", "Running"),
        ("backpressured", "Backpressured"),
        ("capacity available", "CapacityAvailable"),
        ("pod not starting", "PodNotStarting"),
        ("ingest run suspended", "Suspended"),
        ("ingest run running", "Running"),
    ]
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    assert {(line["run"], line["namespace"], line["uid"]) for line in lines} == {(KEY.name, KEY.namespace, uid)}


async def test_a_run_that_is_resumed_before_its_first_batch_is_told_so() -> None:
    world = World()
    world.create(concurrency={"key": "a", "policy": "Replace"}, parallelism=1)
    await world.settle()
    other = manifest(concurrency={"key": "a", "policy": "Replace"}, suspend=True)
    world.cluster.user_create_run({**other, "metadata": {"name": BESIDE.name, "namespace": BESIDE.namespace}})
    await world.settle()
    world.cluster.user_patch_spec(BESIDE, {"suspend": None})
    await world.settle()
    assert len(told(world, "Resumed", BESIDE.name)) == 1


async def test_a_change_of_what_holds_a_run_back_is_told() -> None:
    world = World()
    world.create(parallelism=1)
    world.cluster.fail_next("create", "jobs", QuotaExceeded("exceeded quota: a"))
    world.cluster.fail_next("create", "jobs", Forbidden("no right"), times=3)
    await world.settle()
    for _ in range(3):
        world.now = max(world.now, *world.due.values())
        await world.settle()
    assert [note.partition(":")[0] for note in told(world, "Backpressured")] == ["QuotaExceeded", "Forbidden"]


@pytest.mark.parametrize("how", ["cancelled", "failed"])
async def test_a_restart_repeats_nothing_about_a_run_that_is_drained(how: str, lines: Lines) -> None:
    world = World()
    world.create(parallelism=2, retries=0, onCancel={"image": "example/clean:1"})
    await world.settle()
    if how == "cancelled":
        world.cluster.start_pod(world.active_jobs()[0]["metadata"]["name"])
        world.cancel()
        await world.play()
    else:
        await world.play(each=lambda _: {"exit_code": 1})
    assert world.condition("Drained")["status"] == "True"
    world.now += timedelta(days=1)
    events, said = Counter(event["reason"] for event in world.cluster.events()), len(lines)
    for _ in range(2):
        world.restart()
        await resync_once(world.cluster, world.store, world)  # type: ignore[arg-type]
        await world.play()
    assert Counter(event["reason"] for event in world.cluster.events()) == events
    assert lines[said:] == []


async def test_everything_that_has_an_event_has_a_line(lines: Lines) -> None:
    world = World()
    world.create(parallelism=1, retries=1, onCancel={"image": "example/clean:1"})
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=137, reason="OOMKilled")
    await world.settle()
    world.cancel(cancellation={"policy": "Terminate"})
    await world.play()
    reasons = {event["reason"] for event in world.cluster.events()}
    logged = {line.get("reason") for line in lines} | {line["event"] for line in lines}
    otherwise = {
        "Started": "ingest run running",
        "BatchSkipped": "ingest run cancelled, skipping",
        "StageSkipped": "ingest run cancelled, skipping",
        "StageFailed": "stage failed",
    }
    assert reasons >= {"Started", "Cancelled", "Terminating", "Drained", "OnCancelSucceeded", "StageFailed"}
    assert {reason for reason in reasons if reason not in logged and otherwise.get(reason) not in logged} == set()
