"""Whole runs: the real reconciler and planner before the strict API server, every effect in its order."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.protocol import Object
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.manifest import adoptable


@pytest.fixture
def world() -> World:
    return World()


def stage_of(job: Object) -> str:
    return environment(job)["INGEST_STAGE"]


async def test_cursor_chain_publishes_every_record_once(world: World) -> None:
    world.create()
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["batches"]["published"] == "0-4"
    assert world.status["records"] == {"fetched": 450, "rejected": 0, "published": 450}
    assert sum(world.source.published.values()) == 450
    assert world.condition("Finished")["status"] == "True"
    assert world.condition("Drained")["status"] == "True"


async def test_partitions_run_side_by_side_up_to_parallelism(world: World) -> None:
    world.create(batches={"partitions": {"values": ["a", "b", "c", "d", "e"]}}, parallelism=2)
    await world.settle()
    assert [environment(job)["INGEST_CURSOR"] for job in world.active_jobs()] == ["a", "b"]
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["batches"]["published"] == "0-4"
    assert world.status["batches"]["progress"] == "5/5"
    assert world.status["records"]["published"] == 50


async def test_partitions_listed_in_a_file_are_told_where_it_is(world: World) -> None:
    world.create(
        batches={"partitions": {"count": 3, "file": "lists/stations.txt"}},
        workspace={"persistentVolumeClaim": {"claimName": "data"}},
    )
    await world.settle()
    told = [environment(job) for job in world.active_jobs()]
    assert [env["INGEST_CURSOR"] for env in told] == ["0", "1", "2"]
    assert {env["INGEST_PARTITION_FILE"] for env in told} == {"/workspace/lists/stations.txt"}
    world.work(world.active_jobs()[0])
    await world.settle()
    (hook,) = [env for env in map(environment, world.active_jobs()) if env["INGEST_STAGE"] == "hook"]
    assert "INGEST_PARTITION_FILE" not in hook


async def test_next_fetch_starts_while_hooks_of_the_batch_before_go_on(world: World) -> None:
    world.create()
    await world.settle()
    (fetch,) = world.active_jobs()
    world.work(fetch)
    await world.settle()
    assert sorted((environment(j)["INGEST_BATCH"], stage_of(j)) for j in world.active_jobs()) == [
        ("0", "hook"),
        ("1", "fetch"),
    ]
    assert world.status["cursor"] == "100"


async def test_limit_stops_exactly(world: World) -> None:
    world.create(batches={"cursor": {}, "size": 100, "limit": 250})
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 250
    assert world.status["batches"]["published"] == "0-2"


async def test_failed_stage_is_retried_after_its_backoff_and_told(world: World) -> None:
    world.create(retries=1)
    failed: list[str] = []

    def once(job: Object) -> dict[str, Any]:
        env = environment(job)
        if env["INGEST_STAGE"] == "hook" and env["INGEST_BATCH"] == "1" and env["INGEST_ATTEMPT"] == "0":
            failed.append(job["metadata"]["name"])
            return {"exit_code": 1, "result": "disk on fire"}
        return {}

    await world.play(each=once)
    assert len(failed) == 1
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 450
    assert [(f["batch"], f["stage"], f["attempt"], f["reason"]) for f in world.status["failures"]] == [
        (1, "hook check", 0, "Error")
    ]
    notes = [event["note"] for event in world.cluster.events() if event["reason"] == "StageFailed"]
    assert notes == ["batch 1, hook check, attempt 1: Error: exit code 1: disk on fire; retry 1 of 1 in 8 s"]
    assert world.status["failures"][0]["log"] == "disk on fire"
    assert world.status["retries"] == [{"stage": "hook check", "reason": "Error", "count": 1}]


async def test_retry_waits_for_its_time(world: World) -> None:
    world.create(parallelism=1)
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1)
    await world.settle()
    assert world.active_jobs() == []
    assert 8 <= (world.due[KEY] - world.now).total_seconds() <= 10
    assert world.condition("Reconciling")["reason"] == "Retrying"
    world.now = world.due[KEY]
    await world.settle()
    assert [environment(job)["INGEST_ATTEMPT"] for job in world.active_jobs()] == ["1"]


@pytest.mark.parametrize(
    ("policy", "phase", "reason"),
    [("FailRun", "Failed", "BatchFailed"), ("Continue", "Succeeded", "CompletedWithFailedBatches")],
)
async def test_failed_batch_under_either_policy(world: World, policy: str, phase: str, reason: str) -> None:
    world.create(onBatchFailure=policy, retries=0)

    def breaks(job: Object) -> dict[str, Any]:
        return {"exit_code": 65} if stage_of(job) == "publish" and environment(job)["INGEST_BATCH"] == "2" else {}

    await world.play(each=breaks)
    assert world.phase == phase
    assert world.condition("Succeeded")["reason"] == reason
    assert world.status["batches"]["failed"] == "2"
    if policy == "Continue":
        assert world.status["batches"]["published"] == "0-1,3-4"


async def test_broken_chain_fails_the_run_even_when_batches_may_fail(world: World) -> None:
    world.create(onBatchFailure="Continue", retries=0)
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1, result="no such host")
    await world.play()
    assert world.phase == "Failed"
    assert world.condition("Stalled")["message"] == "batch 0, fetch, attempt 1: Error: exit code 1: no such host"


async def test_all_batches_failed_is_no_success(world: World) -> None:
    world.create(onBatchFailure="Continue", retries=0, batches={"partitions": {"count": 3}})
    await world.play(each=lambda _: {"exit_code": 1})
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "AllBatchesFailed"


async def test_more_failed_batches_than_allowed_fail_the_run(world: World) -> None:
    world.create(
        onBatchFailure="Continue", maxFailedBatches=1, retries=0, parallelism=1, batches={"partitions": {"count": 9}}
    )
    await world.play(each=lambda _: {"exit_code": 1})
    assert world.phase == "Failed"
    assert world.status["batches"]["failed"] == "0-1"
    assert world.condition("Succeeded")["reason"] == "TooManyFailedBatches"


@pytest.mark.parametrize("result", ["", "not json", '{"v":"v2","outcome":"done"}', '{"v":"v1","outcome":"failed"}'])
async def test_result_that_cannot_be_taken_is_a_failure_never_the_end(world: World, result: str) -> None:
    world.create(retries=0)
    await world.settle()
    world.work(world.active_jobs()[0], result=result)
    await world.play()
    assert world.phase == "Failed"
    assert world.status["failures"][0]["reason"] == "ResultInvalid"


async def test_complete_job_without_its_pod_is_a_failure(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestrun.controller.state.memory.POD_GRACE_SECONDS", 0.0)
    world.create(retries=0)
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.on_call = None
    world.work(fetch, result=json.dumps({"v": "v1", "outcome": "done", "exhausted": True}))
    world.cluster.lose_pod(fetch["metadata"]["name"])
    world.restart()
    await world.play()
    assert world.phase == "Failed"
    assert world.status["failures"][0]["reason"] == "ResultMissing"


async def test_rows_lost_between_stages_are_noticed(world: World) -> None:
    world.create(retries=0)

    def loses(job: Object) -> dict[str, Any]:
        if stage_of(job) == "publish":
            return {"result": {"v": "v1", "outcome": "done", "read": 99, "written": 99}}
        return {}

    await world.play(each=loses)
    assert world.phase == "Failed"
    assert world.status["failures"][-1]["reason"] == "RowsMismatch"
    assert world.status["records"]["published"] == 0


async def test_chain_that_stands_still_is_stopped(world: World) -> None:
    world.create(batches={"cursor": {"start": "7"}, "size": 100})
    await world.settle()
    stuck = {"v": "v1", "outcome": "done", "nextCursor": "7", "exhausted": False}
    world.work(world.active_jobs()[0], result=stuck)
    await world.play()
    assert world.phase == "Failed"
    assert world.status["failures"][0]["reason"] == "NoProgress"


async def test_suspend_starts_nothing_and_resume_goes_on_there(world: World) -> None:
    world.create()
    await world.settle()
    world.cluster.user_patch_spec(KEY, {"suspend": True})
    await world.play()
    assert world.phase == "Suspended"
    assert world.status["batches"]["fetched"] == "0"
    assert world.active_jobs() == []
    world.cluster.user_patch_spec(KEY, {"suspend": None})
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 450


async def test_quota_holds_the_run_and_one_job_asks_again(world: World) -> None:
    world.cluster.job_quota["default"] = 1
    world.create(batches={"partitions": {"count": 4}}, parallelism=3)
    await world.settle()
    assert len(world.active_jobs()) == 1
    assert world.condition("Backpressured")["status"] == "True"
    assert world.condition("Backpressured")["reason"] == "QuotaExceeded"
    refused = len(world.cluster.calls("create", "jobs"))
    world.now = world.due[KEY]
    await world.settle()
    assert len(world.cluster.calls("create", "jobs")) == refused + 1
    assert world.condition("Backpressured")["status"] == "True"
    world.cluster.job_quota.clear()
    await world.play()
    assert world.phase == "Succeeded"
    assert world.condition("Backpressured")["status"] == "False"
    assert world.status["records"]["published"] == 40


async def test_cancel_ends_the_backpressure_loop(world: World) -> None:
    world.cluster.job_quota["default"] = 0
    world.create()
    await world.settle()
    assert world.condition("Backpressured")["status"] == "True"
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"
    assert world.condition("Backpressured")["status"] == "False"
    assert world.cluster.jobs() == []


async def test_unpullable_image_fails_the_batch_after_a_grace(world: World) -> None:
    world.create()
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.pod_waits(fetch["metadata"]["name"], reason="ImagePullBackOff", message="back-off")
    await world.settle()
    assert world.condition("Reconciling")["reason"] == "PodNotStarting"
    assert "cannot be pulled" in world.condition("Reconciling")["message"]
    world.now = world.due[KEY]
    await world.play()
    assert world.phase == "Failed"
    assert world.status["failures"][0]["reason"] == "ImagePull"
    assert world.active_jobs() == []


async def test_run_deadline(world: World) -> None:
    world.create(activeDeadlineSeconds=30)
    await world.settle()
    world.cluster.start_pod(world.active_jobs()[0]["metadata"]["name"])
    await world.settle()
    world.now = world.due[KEY]
    await world.settle()
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"


async def test_foreign_job_under_the_name_is_not_adopted(world: World) -> None:
    body = world.create()
    await world.settle()
    (fetch,) = world.active_jobs()
    stranger = {**fetch, "metadata": {**fetch["metadata"], "ownerReferences": []}}
    world.cluster.user_delete_run(KEY)
    assert body["metadata"]["uid"]
    world.cluster.collect_garbage()
    uid = world.create()["metadata"]["uid"]
    run = IngestRun.read(world.cluster.run(KEY))
    create = CreateJob(attempt=NextAttempt(batch=0, step=steps_of(run.spec)[0], number=0, input_attempt=None))
    assert uid == run.metadata.uid
    assert not adoptable(run, create, stranger)


async def test_a_job_is_missing_only_where_a_live_list_lacks_it(world: World) -> None:
    """The watch of runs may be ahead of that of Jobs: what has not been shown yet is not gone."""
    world.create()
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    uid = world.cluster.run(KEY)["metadata"]["uid"]
    for job in world.store.attempts(uid):
        world.store.remove_job(run_uid=uid, job_uid=job.job.uid)
    await world.reconciler.reconcile(KEY, "test")
    assert world.phase == "Running"
    await world.play()
    assert world.phase == "Succeeded"
