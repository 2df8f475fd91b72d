"""Cancel, at every point: the strict API server's own history is the judge of what was created when."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import structlog
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, Killed, World, environment, manifest

from ingestrun.kube.errors import Conflict, Forbidden, KubeError, Unavailable
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.names import LABEL_RUN_UID as RUN_UID
from ingestrun.model.names import LABEL_STAGE as STAGE

MODES: dict[str, dict[str, Any]] = {
    "chain": {"batches": {"cursor": {}, "size": 150}},
    "partitions": {"batches": {"partitions": {"count": 4}}, "parallelism": 2},
}


def retrying(job: Object) -> dict[str, Any]:
    """One hook fails once, so that a retry is among what a cancel meets."""
    env = environment(job)
    first = env["INGEST_STAGE"] == "hook" and env["INGEST_BATCH"] == "1" and env["INGEST_ATTEMPT"] == "0"
    return {"exit_code": 1} if first else {}


async def length_of(mode: str) -> int:
    """How many calls a run without any cancel takes."""
    world = World()
    world.create(**MODES[mode])
    await world.play(each=retrying)
    assert world.phase == "Succeeded"
    return len(world.cluster.history)


def at_call(world: World, number: int, stage: str, act: Any) -> None:
    """Do `act` once, right before or right after call `number` takes effect."""

    async def on_call(call: Call) -> None:
        if call.index == number and call.stage == stage:
            world.cluster.on_call = None
            act()

    world.cluster.on_call = on_call


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
async def test_cancel_around_every_call_starts_nothing_afterwards(mode: str, stage: str) -> None:
    outcomes = set()
    for number in range(await length_of(mode)):
        world = World()
        world.create(**MODES[mode])
        refused: list[KubeError] = []

        def cancel(world: World = world, refused: list[KubeError] = refused) -> None:
            try:
                world.cancel(cancellation={"reason": "enough"})
            except KubeError as error:
                refused.append(error)

        at_call(world, number, stage, cancel)
        await world.play(each=retrying)
        outcomes.add(world.phase)
        assert world.phase == ("Succeeded" if refused else "Cancelled"), number
        assert world.creates_after_cancelled() == [], number
        if world.phase == "Cancelled":
            assert world.condition("Drained")["status"] == "True", number
            assert_accounted(world)
    assert outcomes == {"Succeeded", "Cancelled"}


def assert_accounted(world: World) -> None:
    """Every batch that was in flight is told apart: landed all the same, or not; the counters did not move."""
    status = world.status
    landed = status["cancellation"]["published"]
    published = {f"{uid}/{n}" for uid in [world.cluster.run(KEY)["metadata"]["uid"]] for n in _indexes(landed)}
    counted = {f"{world.cluster.run(KEY)['metadata']['uid']}/{n}" for n in _indexes(status["batches"]["published"])}
    assert published | counted == set(world.source.published)
    assert status["records"]["published"] == sum(world.source.published[key] for key in counted)
    assert status["cancellation"]["reason"] == "enough"


def _indexes(text: str) -> set[int]:
    found: set[int] = set()
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
async def test_operator_killed_around_every_call_loses_and_doubles_nothing(mode: str, stage: str) -> None:
    for number in range(await length_of(mode)):
        world = World()
        world.create(**MODES[mode])

        def die(world: World = world) -> None:
            world.restart()
            raise Killed

        at_call(world, number, stage, die)
        await play_through_kill(world)
        assert world.phase == "Succeeded", number
        assert world.status["records"]["published"] == sum(world.source.published.values()), number
        names = [call.name for call in world.cluster.calls("create", "jobs") if call.stored]
        assert len(names) == len(set(names)), number


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("mode", MODES)
async def test_operator_killed_around_every_call_and_cancelled_while_down(mode: str, stage: str) -> None:
    for number in range(await length_of(mode)):
        world = World()
        world.create(**MODES[mode])
        created: list[int] = []

        def die(world: World = world, created: list[int] = created) -> None:
            if world.phase != "Succeeded":
                world.cancel(cancellation={"reason": "enough"})
                created.append(len(world.cluster.calls("create", "jobs")))
            world.restart()
            raise Killed

        at_call(world, number, stage, die)
        await play_through_kill(world)
        if created:
            assert world.phase == "Cancelled", number
            assert len(world.cluster.calls("create", "jobs")) == created[0], f"{number}: started before the cancel"
            assert_accounted(world)


async def play_through_kill(world: World) -> None:
    await world.play(each=retrying)


@pytest.mark.parametrize("verb", ["patch", "create"])
async def test_answers_lost_after_every_write_change_nothing(verb: str) -> None:
    resource = {"patch": "ingestruns/status", "create": "jobs"}[verb]
    world = World()
    world.create(**MODES["chain"])
    world.cluster.fail_next(verb, resource, when="after", times=40, match=lambda call: call.index % 3 != 0)
    await world.play(rounds=400, each=retrying)
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 450 == sum(world.source.published.values())


async def test_delayed_create_that_lands_after_cancelled_is_swept() -> None:
    world = World()
    world.create(**MODES["chain"])
    world.cluster.fail_next("create", "jobs", Unavailable("time-out"), when="late")
    await world.step()
    world.cancel()
    await world.settle()
    assert world.phase == "Cancelled"
    assert world.cluster.deliver_late() == [None]
    world.now = max(world.due.values())
    await world.settle()
    assert world.cluster.jobs() == []


async def test_started_pods_finish_and_unstarted_never_start() -> None:
    world = World()
    world.create(batches={"partitions": {"count": 3}}, parallelism=3)
    await world.settle()
    first, second, third = (job["metadata"]["name"] for job in world.active_jobs())
    world.cluster.start_pod(first)
    world.cluster.create_pod(second)
    world.cancel()
    await world.settle()
    assert world.phase == "Cancelled"
    assert [job["metadata"]["name"] for job in world.cluster.jobs()] == [first]
    assert third
    assert world.condition("Drained")["status"] == "False"
    assert world.status["cancellation"]["activeBatches"] == 3
    world.work(world.active_jobs()[0])
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    assert world.status["cancellation"]["notPublished"] == "0-2"
    assert world.status["records"]["fetched"] == 0


async def test_cancel_is_one_write_with_everything_in_it() -> None:
    world = World()
    world.create()
    await world.settle()
    before = len(world.cluster.calls("patch", "ingestruns/status"))
    world.cluster.user_patch_spec(KEY, {"cancel": True, "cancellation": {"reason": "wrong source"}}, user="ada")
    seen: list[dict[str, Any]] = []
    world.cluster.watch(lambda kind, _, obj: seen.append(dict(obj["status"])) if kind == "IngestRun" else None)
    await world.settle()
    cancelled = next(status for status in seen if status.get("phase") == "Cancelled")
    assert len(world.cluster.calls("patch", "ingestruns/status")) >= before + 1
    assert cancelled["completionTime"]
    assert cancelled["cancellation"] == {
        "reason": "wrong source",
        "requestedBy": "ada",
        "policy": "Drain",
        "cascade": False,
        "acceptedAt": cancelled["completionTime"],
        "activeBatches": 1,
        "published": "",
        "notPublished": "",
        "unknown": "",
    }
    kinds = {c["type"]: (c["status"], c["reason"]) for c in cancelled["conditions"]}
    assert kinds["Succeeded"] == ("False", "Cancelled")
    assert kinds["Finished"] == ("True", "Cancelled")
    assert kinds["Cancelled"] == ("True", "Requested")
    assert (kinds["Reconciling"], kinds["Stalled"]) == (("False", "Finished"), ("True", "Cancelled"))
    notes = [event["note"] for event in world.cluster.events() if event["reason"] == "Cancelled"]
    assert notes == ["cancelled by ada: wrong source"]


async def test_cancelled_at_creation_starts_nothing() -> None:
    world = World()
    world.create(cancel=True)
    await world.play()
    assert world.phase == "Cancelled"
    assert world.cluster.calls("create", "jobs") == []
    assert world.condition("Drained")["status"] == "True"


@pytest.mark.parametrize("state", ["suspended", "retrying", "publishing"])
async def test_cancel_from_every_state(state: str) -> None:
    world = World()
    world.create(suspend=True if state == "suspended" else None)
    await world.settle()
    if state == "retrying":
        world.work(world.active_jobs()[0], exit_code=1)
    while state == "publishing" and environment(world.active_jobs()[0])["INGEST_STAGE"] != "publish":
        world.work(world.active_jobs()[0])
        await world.settle()
    await world.settle()
    created = len(world.cluster.calls("create", "jobs"))
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert len(world.cluster.calls("create", "jobs")) == created


async def test_skips_are_logged_once_each_with_batch_and_stage() -> None:
    world = World()
    world.create()
    await world.settle()
    name = world.active_jobs()[0]["metadata"]["name"]
    world.cluster.start_pod(name)
    await world.settle()
    with structlog.testing.capture_logs() as logs:
        world.cancel()
        await world.settle()
        world.work(world.active_jobs()[0])
        await world.play()
    skipped = [(line["batch"], line["stage"]) for line in logs if line["event"] == "ingest run cancelled, skipping"]
    assert skipped == [(0, "hook check"), (1, "fetch")]


async def test_completion_and_cancel_race_by_compare_and_set() -> None:
    """Whichever status write comes first wins; the other is told, and one end stands."""
    for cancel_first in (True, False):
        world = World()
        world.create(batches={"partitions": {"count": 1}}, hooks=None)
        await world.settle()
        world.work(world.active_jobs()[0])
        await world.settle()
        publish = world.active_jobs()[0]
        world.cluster.on_call = None
        if cancel_first:
            world.cancel()
            world.work(publish)
            await world.play()
            assert world.phase == "Cancelled"
            assert world.status["cancellation"]["published"] == "0"
            assert world.status["records"]["published"] == 0
        else:
            world.work(publish)
            await world.play()
            assert world.phase == "Succeeded"
            with pytest.raises(KubeError, match="already Succeeded"):
                world.cancel()
        ends = {c.obj["status"].get("phase") for c in world.cluster.changes if c.kind == "IngestRun"}
        assert len(ends & {"Succeeded", "Cancelled", "Failed"}) == 1


async def test_refused_cancel_write_is_taken_again_and_nothing_starts() -> None:
    world = World()
    world.create()
    await world.settle()
    created = len(world.cluster.calls("create", "jobs"))
    for error in (Conflict("stale"), Unavailable("500")):
        world.cluster.fail_next("patch", "ingestruns/status", error)
    world.cancel()
    world.work(world.active_jobs()[0], result=json.dumps(world.source.run(world.active_jobs()[0])))
    await world.play()
    assert world.phase == "Cancelled"
    assert len(world.cluster.calls("create", "jobs")) == created


async def running(world: World, **spec: Any) -> list[str]:
    """Three partitions with their first pods running; the names of the Jobs."""
    world.create(batches={"partitions": {"count": 3}}, parallelism=3, **spec)
    await world.settle()
    names = [job["metadata"]["name"] for job in world.active_jobs()]
    for name in names:
        world.cluster.start_pod(name)
    await world.settle()
    return names


async def test_terminate_ends_running_pods_with_the_grace_asked_for() -> None:
    world = World()
    await running(world)
    world.cluster.pods_linger = True
    world.cancel(cancellation={"policy": "Terminate", "gracePeriodSeconds": 5})
    await world.settle()
    kills = world.cluster.calls("delete", "pods")
    assert [(call.body or {})["gracePeriodSeconds"] for call in kills] == [5, 5, 5]
    assert world.condition("Drained")["status"] == "False"
    for job in world.active_jobs():
        world.cluster.finish_job(job["metadata"]["name"], exit_code=143)
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    assert world.status["cancellation"]["policy"] == "Terminate"
    assert world.status["cancellation"]["notPublished"] == "0-2"
    assert world.cluster.jobs() == []
    assert len(world.cluster.calls("delete", "pods")) == 3


async def test_drain_can_be_turned_into_terminate_and_not_back() -> None:
    world = World()
    await running(world)
    world.cluster.pods_linger = True
    world.cancel()
    await world.settle()
    assert world.cluster.calls("delete", "pods") == []
    world.cluster.user_patch_spec(KEY, {"cancellation": {"policy": "Terminate"}})
    await world.settle()
    assert len(world.cluster.calls("delete", "pods")) == 3
    world.cluster.user_patch_spec(KEY, {"cancel": None, "cancellation": None})
    await world.settle()
    assert world.status["cancellation"]["policy"] == "Terminate"
    reasons = [event["reason"] for event in world.cluster.events()]
    assert reasons.count("Terminating") == 1


async def test_pod_that_does_not_end_is_named() -> None:
    world = World()
    (first, *_) = await running(world)
    world.cluster.pods_linger = True
    world.cancel(cancellation={"policy": "Terminate", "gracePeriodSeconds": 1})
    await world.settle()
    for job in world.active_jobs():
        if job["metadata"]["name"] != first:
            world.cluster.finish_job(job["metadata"]["name"], exit_code=143)
    await world.settle()
    for _ in range(20):
        world.now = min(world.due.values())
        await world.settle()
    assert world.condition("Drained")["reason"] == "PodStuckTerminating"
    assert first in world.condition("Drained")["message"]
    assert [event["reason"] for event in world.cluster.events()].count("PodStuckTerminating") == 1


async def test_cancelling_again_changes_nothing_and_clearing_is_answered() -> None:
    world = World()
    world.create()
    await world.settle()
    world.cancel(cancellation={"reason": "first"})
    await world.play()
    before = world.status
    world.cancel(cancellation={"reason": "second"})
    await world.play()
    assert world.status["cancellation"] == before["cancellation"]
    assert world.status["batches"] == before["batches"]
    world.cluster.user_patch_spec(KEY, {"cancel": None})
    await world.play()
    assert world.phase == "Cancelled"
    cleared = [event for event in world.cluster.events() if event["reason"] == "CancelCleared"]
    assert [(event["type"], "final" in event["note"]) for event in cleared] == [("Warning", True)]
    assert world.status["observedGeneration"] == world.cluster.run(KEY)["metadata"]["generation"]


def child(name: str, **more: Any) -> dict[str, Any]:
    body = manifest(**more)
    body["metadata"]["name"] = name
    return body


async def test_cascade_cancels_the_whole_tree_and_leaves_ended_runs_alone() -> None:
    world = World()
    world.create(batches={"partitions": {"count": 1}}, hooks=None)
    parent = world.cluster.run(KEY)
    owned = child("owned")
    owned["metadata"]["ownerReferences"] = [
        {
            "apiVersion": "ingestrun.dev/v1alpha1",
            "kind": "IngestRun",
            "name": KEY.name,
            "uid": parent["metadata"]["uid"],
        }
    ]
    for body in (
        child("direct", parentRef={"name": KEY.name}),
        child("below", parentRef={"name": "direct"}),
        child("ended", parentRef={"name": KEY.name}, activeDeadlineSeconds=1),
        child("stranger", parentRef={"name": "nobody"}),
        owned,
    ):
        world.cluster.user_create_run(body)
    await world.settle()
    world.now = world.due[RunKey(namespace="default", name="ended")]
    await world.settle()
    world.cluster.user_patch_spec(
        KEY, {"cancel": True, "cancellation": {"cascade": True, "reason": "storm"}}, user="ada"
    )
    await world.settle()

    def of(name: str) -> dict[str, Any]:
        status: dict[str, Any] = world.cluster.run(RunKey(namespace="default", name=name))["status"]
        return status

    assert {name: of(name)["phase"] for name in ("direct", "below", "ended", "stranger", "owned")} == {
        "direct": "Cancelled",
        "below": "Cancelled",
        "ended": "Failed",
        "stranger": "Running",
        "owned": "Cancelled",
    }
    assert of("direct")["cancellation"]["parent"] == KEY.name
    assert of("direct")["cancellation"]["requestedBy"] == "ada"
    assert of("direct")["cancellation"]["reason"] == "flights was cancelled: storm"
    assert of("below")["cancellation"]["parent"] == "direct"
    assert of(KEY.name)["cancellation"]["children"] == {
        "cancelled": 2,
        "endedBefore": 1,
        "endedBeforeNames": ["ended"],
        "waiting": 0,
    }


async def test_child_created_after_a_cascading_cancel_starts_nothing() -> None:
    world = World()
    world.create()
    await world.settle()
    world.cancel(cancellation={"cascade": True})
    await world.play()
    late = world.cluster.user_create_run(child("late", parentRef={"name": KEY.name}))
    world.restart()
    await world.settle()
    assert world.cluster.run(RunKey(namespace="default", name="late"))["status"]["phase"] == "Cancelled"
    assert [job for job in world.cluster.jobs() if job["metadata"]["labels"][RUN_UID] == late["metadata"]["uid"]] == []


async def test_cycles_are_survived() -> None:
    world = World()
    world.create(parentRef={"name": "other"})
    world.cluster.user_create_run(child("other", parentRef={"name": KEY.name}))
    await world.settle()
    world.cancel(cancellation={"cascade": True})
    await world.play()
    assert world.phase == "Cancelled"
    assert world.cluster.run(RunKey(namespace="default", name="other"))["status"]["phase"] == "Cancelled"


SWEPT = datetime(2026, 11, 23, 12, 5, tzinfo=UTC)
CLEAN_UP = {"image": "example/clean:1"}


@pytest.mark.parametrize(("how", "state"), [({"exit_code": 0}, "Succeeded"), ({"exit_code": 3}, "Failed")])
async def test_clean_up_runs_once_after_the_drain_and_its_end_is_shown(how: dict[str, Any], state: str) -> None:
    world = World()
    (first, *_) = await running(world, onCancel=CLEAN_UP)
    world.cluster.user_patch_spec(KEY, {"cancel": True, "cancellation": {"reason": "storm"}}, user="ada")
    await world.settle()
    assert all(job["metadata"]["labels"][STAGE] == "fetch" for job in world.active_jobs())
    for job in world.active_jobs():
        world.work(job)
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    (job,) = world.active_jobs()
    assert job["metadata"]["labels"][STAGE] == "on-cancel"
    told = environment(job)
    assert told["INGEST_CANCEL_REASON"] == "storm"
    assert told["INGEST_CANCEL_POLICY"] == "Drain"
    assert told["INGEST_CANCEL_REQUESTED_BY"] == "ada"
    assert told["INGEST_PUBLISHED"] == ""
    assert first
    world.work(job, **how)
    await world.play()
    assert world.status["cancellation"]["onCancel"]["state"] == state
    assert world.phase == "Cancelled"
    clean_ups = [call for call in world.cluster.calls("create", "jobs") if "on-cancel" in call.name]
    assert len(clean_ups) == 1
    assert [event["reason"] for event in world.cluster.events()].count(f"OnCancel{state}") == 1


async def clean_up_of(world: World) -> str:
    """The name of the clean-up Job of a run that is cancelled and drained."""
    world.create(batches={"partitions": {"count": 1}}, onCancel=CLEAN_UP)
    await world.settle()
    world.cancel()
    await world.settle()
    (job,) = world.active_jobs()
    assert job["metadata"]["labels"][STAGE] == "on-cancel"
    return str(job["metadata"]["name"])


async def pass_hours(world: World, hours: int) -> None:
    for _ in range(hours * 20):
        world.now += timedelta(minutes=3)
        world.cluster.keep_deadlines()
        await world.settle()


@pytest.mark.parametrize("full", ["no node has room", "a quota refuses the pod"])
async def test_clean_up_waits_for_room_as_long_as_it_takes_and_says_so(full: str) -> None:
    world = World()
    name = await clean_up_of(world)
    if full == "no node has room":
        world.cluster.create_pod(name, unschedulable="0/3 nodes are available")
        said = "waits for room: 0/3 nodes are available"
    else:
        world.cluster.refuse_pod(name, message='pods "x" is forbidden: exceeded quota: compute, limited: pods=2')
        said = "waits for room: its pod is refused: exceeded quota: compute, limited: pods=2"
    await pass_hours(world, 5)
    assert world.status["cancellation"]["onCancel"] == {"state": "Running", "message": said}
    world.cluster.start_pod(name)
    world.work(world.cluster.job(name), exit_code=0)
    await world.play()
    assert world.status["cancellation"]["onCancel"] == {"state": "Succeeded", "message": ""}


async def test_clean_up_that_hangs_ends_at_its_deadline() -> None:
    world = World()
    world.cluster.start_pod(await clean_up_of(world))
    await pass_hours(world, 1)
    told = {"state": "Failed", "message": "DeadlineExceeded: the stage ran longer than its activeDeadlineSeconds"}
    assert world.status["cancellation"]["onCancel"] == told


async def test_clean_up_that_is_told_to_end_and_exits_with_0_has_not_succeeded() -> None:
    world = World()
    world.cluster.exceed_deadline(await clean_up_of(world), exit_code=0)
    await world.play()
    assert world.status["cancellation"]["onCancel"]["state"] == "Failed"
    assert world.status["cancellation"]["onCancel"]["message"].startswith("DeadlineExceeded: ")


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("limits", "PodRefused: the pod has not started for 120 s: its pod is refused: maximum memory usage"),
        ("image", "ImagePull: the pod has not started for 120 s: image 'example/clean:1' cannot be pulled"),
    ],
)
async def test_clean_up_that_can_never_start_is_given_up_and_does_not_start_later(cause: str, said: str) -> None:
    world = World()
    name = await clean_up_of(world)
    if cause == "limits":
        world.cluster.refuse_pod(name, message='pods "x" is forbidden: maximum memory usage per Container is 1Gi')
    else:
        world.cluster.pod_waits(name, reason="ImagePullBackOff")
    await pass_hours(world, 1)
    told = world.status["cancellation"]["onCancel"]
    assert told["state"] == "Failed"
    assert told["message"].startswith(said)
    assert world.cluster.jobs() == []
    assert world.due == {}, "the run is over"


@pytest.mark.parametrize("stage", ["before", "after"])
async def test_clean_up_runs_once_though_the_operator_is_killed_around_every_call(stage: str) -> None:
    for number in range(60):
        world = World()
        world.create(batches={"partitions": {"count": 1}}, hooks=None, onCancel=CLEAN_UP)
        await world.settle()
        world.cancel()
        killed: list[bool] = []

        def die(world: World = world, killed: list[bool] = killed) -> None:
            killed.append(True)
            world.restart()
            raise Killed

        at_call(world, len(world.cluster.history) + number, stage, die)
        await world.play()
        assert world.status["cancellation"]["onCancel"]["state"] == "Succeeded", number
        stored = [call for call in world.cluster.calls("create", "jobs") if "on-cancel" in call.name and call.stored]
        assert len(stored) == 1, number
        if not killed:
            assert number > 5
            return
    raise AssertionError("the run never ended")


async def test_fence_is_armed_with_the_cancel_and_taken_down_after_the_last_sweep() -> None:
    world = World()
    world.cluster.fence = True
    world.create()
    await world.settle()
    world.cluster.fail_next("create", "jobs", Unavailable("time-out"), when="late")
    world.work(world.active_jobs()[0])
    await world.step()
    world.cancel()
    await world.settle()
    assert world.cluster.run(KEY)["metadata"]["labels"]["ingestrun.dev/cancelled"] == "true"
    (answer,) = world.cluster.deliver_late()
    assert isinstance(answer, Forbidden)
    await world.play()
    assert "ingestrun.dev/cancelled" not in world.cluster.run(KEY)["metadata"].get("labels", {})
    assert world.creates_after_cancelled() == []


async def test_fence_that_cannot_be_armed_does_not_hold_up_the_cancel() -> None:
    world = World()
    world.create()
    await world.settle()
    world.cluster.fail_next("patch", "ingestruns", Forbidden("no"), times=9)
    world.cancel()
    await world.settle()
    assert world.phase == "Cancelled"


async def test_what_was_skipped_is_two_events_at_most() -> None:
    world = World()
    names = await running(world)
    world.cancel()
    await world.settle()
    for name in names:
        world.work(world.cluster.job(name))
    await world.play()
    notes = {event["reason"]: event["note"] for event in world.cluster.events()}
    assert notes["StageSkipped"] == "not started after the cancel: hook check of batch 0-2"
    assert [event["reason"] for event in world.cluster.events()].count("StageSkipped") == 1


async def test_skipped_retry_is_told_as_a_stage_and_not_as_a_batch_that_was_not_begun() -> None:
    world = World()
    world.create(batches={"partitions": {"count": 2}}, parallelism=1)
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1)
    await world.settle()
    world.cancel()
    await world.play()
    notes = {event["reason"]: event["note"] for event in world.cluster.events()}
    assert notes["StageSkipped"] == "not started after the cancel: fetch of batch 0"
    assert "BatchSkipped" not in notes


async def test_parent_is_looked_at_until_the_last_child_has_followed() -> None:
    """However long that takes: its own drain and last sweep are over long before."""
    world = World()
    world.create(batches={"partitions": {"count": 1}}, hooks=None)
    world.cluster.user_create_run(child("late", parentRef={"name": KEY.name}))
    await world.settle()
    world.cluster.fail_next(
        "patch", "ingestruns/status", Forbidden("no"), times=200, match=lambda call: call.name == "late"
    )
    world.cancel(cancellation={"cascade": True})
    for _ in range(60):
        await world.settle(400)
        for job in world.active_jobs():
            world.work(job)
        world.now = max(world.now, min(world.due.values()))
        if "ingestrun.dev/cancelled" not in world.cluster.run(KEY)["metadata"].get("labels", {}) and world.now > SWEPT:
            break
    assert world.status["cancellation"]["children"]["waiting"] == 1
    world.cluster.faults.clear()
    for _ in range(60):
        await world.settle()
        if not world.due:
            break
        world.now = max(world.now, min(world.due.values()))
    assert world.status["cancellation"]["children"] == {
        "cancelled": 1,
        "endedBefore": 0,
        "endedBeforeNames": [],
        "waiting": 0,
    }


async def test_cancel_that_the_watch_has_not_shown_is_seen_by_the_read_before_a_create() -> None:
    """A hook's end starts a publish without a status write: then the run is read from the server, not the cache."""
    world = World()
    world.create(batches={"cursor": {}, "size": 1000})
    for _ in range(2):
        await world.settle()
        world.work(world.active_jobs()[0])
    world.deaf.add("IngestRun")
    world.cancel()
    assert not world.store.cancel_requested(KEY)
    created = len(world.cluster.calls("create", "jobs"))
    await world.settle()
    assert world.phase == "Cancelled"
    assert len(world.cluster.calls("create", "jobs")) == created == 2
