"""What a run can do, done by a pool: the rows of the table in docs/pool.md that need more than a plain run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from tests.fakes.pool import PoolWorld, SimulatedWorker, pool_spec
from tests.fakes.world import KEY

from ingestrun.kube.protocol import RunKey
from ingestrun.model.pool import ClaimRequest, PublishRequest
from ingestrun.planner.batch.pipeline import HOLD_GRACE
from ingestrun.planner.pool.requests import Replaced, WorkerRequest
from ingestrun.planner.run.fair_sharing import JobLimits


def world_of(*, caps: JobLimits | None = None, **spec: Any) -> PoolWorld:
    world = PoolWorld(caps=caps) if caps is not None else PoolWorld()
    world.create(**pool_spec(**spec))
    return world


async def until(world: PoolWorld, reached: Any, rounds: int = 200) -> None:
    """Let all act in turn until something holds, and no further."""
    for _ in range(rounds):
        await world.settle()
        world.run_pods()
        if reached():
            return
        for worker in list(world.workers.values()):
            if worker.job in world.workers and not reached():
                world.turn(worker)
        if not world.asked and world.due and not any(w.under_way is None for w in world.workers.values()):
            world.now = max(world.now + timedelta(milliseconds=1), min(world.due.values()))
    raise AssertionError(f"not reached: {world.status}")


def holding(world: PoolWorld) -> list[SimulatedWorker]:
    return [worker for worker in world.workers.values() if worker.claim is not None]


async def test_a_limit_is_exact_in_a_pool() -> None:
    world = world_of(batches={"cursor": {}, "size": 100, "limit": 250})

    await world.play_pool()

    assert world.phase == "Succeeded"
    assert world.status["records"] == {"fetched": 250, "rejected": 0, "published": 250}
    assert sum(world.source.published.values()) == 250


async def test_the_next_fetch_is_claimed_as_soon_as_the_cursor_is_known() -> None:
    world = world_of(batches={"cursor": {}, "size": 100})

    await until(world, lambda: len(holding(world)) == 2)

    assert world.status["batches"]["fetched"] == "0"
    assert world.status["batches"]["published"] == ""


async def test_a_resumed_run_does_the_rest_in_a_pool() -> None:
    world = world_of(batches={"cursor": {}, "size": 100})
    await until(world, lambda: world.status["batches"]["published"] == "0" and holding(world))
    world.cancel()
    await world.play_pool()
    assert world.phase == "Cancelled"
    done = dict(world.source.published)
    body = world.cluster.run(KEY)
    other = RunKey(namespace="default", name="rest")
    spec = {**body["spec"], "resumeFrom": {"name": KEY.name}}
    spec.pop("cancel")
    world.cluster.user_create_run(
        {
            **{key: body[key] for key in ("apiVersion", "kind")},
            "metadata": {"name": "rest", "namespace": "default"},
            "spec": spec,
        }
    )
    await world.play_pool()

    status = world.cluster.run(other)["status"]
    assert status["phase"] == "Succeeded", status
    assert status["records"]["published"] == world.source.total == sum(world.source.published.values())
    assert done.items() <= world.source.published.items()


async def test_terminate_ends_the_workers_pods() -> None:
    world = world_of(batches={"partitions": {"count": 4}}, parallelism=2)
    await until(world, lambda: len(holding(world)) == 2)

    world.cancel(cancellation={"policy": "Terminate"})
    await world.settle()

    assert [call.name for call in world.cluster.calls("delete", "pods")]
    await world.play_pool()
    assert world.condition("Drained")["status"] == "True"
    assert world.status["cancellation"]["notPublished"] == "0-1"


async def test_the_clean_up_runs_once_after_the_drain_of_a_pool() -> None:
    world = world_of(batches={"partitions": {"count": 4}}, onCancel={"image": "example/clean:1"})
    await until(world, lambda: bool(holding(world)))
    world.cancel()
    await until(world, lambda: bool(world.status["cancellation"].get("onCancel")))
    (job,) = world.active_jobs()
    assert job["metadata"]["labels"]["ingestrun.dev/stage"] == "on-cancel"
    assert world.condition("Drained")["status"] == "True"

    world.cluster.finish_job(job["metadata"]["name"], exit_code=0)
    await world.settle()

    assert world.status["cancellation"]["onCancel"]["state"] == "Succeeded"


async def test_a_worker_that_holds_its_batch_for_too_long_is_ended() -> None:
    world = world_of(batches={"partitions": {"count": 2}}, parallelism=1)
    await until(world, lambda: bool(holding(world)))
    (frozen,) = holding(world)
    frozen.stuck = True

    world.now += timedelta(seconds=2 * 3600) + HOLD_GRACE
    await world.settle()
    (deleted,) = world.cluster.calls("delete", "pods")
    assert deleted.name.startswith(frozen.job)
    assert world.status["workers"] == [{"worker": 0, "batch": 0}], "not released before its pod has ended"
    world.end(frozen, exit_code=137)
    await world.play_pool()

    assert world.phase == "Succeeded"
    assert [(claim.batch, claim.attempt, claim.worker) for claim in world.claims] == [(0, 0, 0), (0, 1, 1), (1, 0, 1)]


async def test_a_batch_waits_for_the_pod_of_a_job_that_is_gone() -> None:
    """Also after a restart, which has not seen the Job: the pod may still publish what it has permission for."""
    world = world_of(batches={"partitions": {"count": 2}}, parallelism=1)
    await until(world, lambda: bool(holding(world)))
    (worker,) = holding(world)
    worker.stuck = True
    world.cluster.pods_linger = True
    world.cluster.expire_job(worker.job)
    world.restart()
    await world.settle()
    world.run_pods()
    assert [entry["worker"] for entry in world.status["workers"] if "batch" in entry] == [0]
    assert world.active_jobs() == []

    world.cluster.pods_linger = False
    (pod,) = world.cluster.pods()
    world.cluster._remove("Pod", pod)
    await world.play_pool()

    assert world.phase == "Succeeded"
    assert [(claim.batch, claim.attempt) for claim in world.claims if claim.batch == 0] == [(0, 0), (0, 1)]


async def test_a_worker_that_was_given_up_gets_nothing() -> None:
    world = world_of(batches={"partitions": {"count": 3}}, parallelism=1)
    await until(world, lambda: bool(holding(world)))
    (worker,) = holding(world)
    claim, fetched = worker.claim, worker.fetched
    assert claim is not None
    assert fetched is not None
    world.end(worker, exit_code=137)
    await until(world, lambda: bool(holding(world)))
    zombie = [
        WorkerRequest(0, PublishRequest(batch=0, attempt=0, fetched=fetched, written=fetched.read, rejected=0)),
        WorkerRequest(0, ClaimRequest(wait_seconds=20)),
    ]

    answers = [await ask(world, request) for request in zombie]

    assert all(isinstance(answer, Replaced) for answer in answers)
    assert "publishing" not in world.status["batches"]


async def ask(world: PoolWorld, request: WorkerRequest) -> Any:
    """Put a request into the inbox, and return its answer."""
    import asyncio

    memory = world.store.memories.recall(world.uid())
    answer = memory.requests[request] = asyncio.get_running_loop().create_future()
    world.asked[KEY] = "worker"
    await world.settle()
    return answer.result() if answer.done() else None


async def test_runs_share_the_operators_limit_by_their_workers() -> None:
    """A run with all slots gives one up for a run that has none, at a worker's next claim."""
    world = world_of(caps=JobLimits(in_all=3), batches={"partitions": {"count": 30}}, parallelism=3)
    await until(world, lambda: len(holding(world)) == 3)
    world.cluster.user_create_run(
        {
            "apiVersion": "ingestrun.dev/v1alpha1",
            "kind": "IngestRun",
            "metadata": {"name": "other", "namespace": "default"},
            "spec": world.cluster.run(KEY)["spec"],
        }
    )
    other = RunKey(namespace="default", name="other")

    await until(world, lambda: len(world.cluster.run(other)["status"].get("workers") or ()) == 1)

    assert world.phase == "Running"
    assert len(world.active_jobs()) <= 3
    assert len(world.status["workers"]) == 2


async def test_one_run_a_key_in_a_pool_too() -> None:
    concurrency = {"key": "geo", "policy": "Replace"}
    world = world_of(batches={"partitions": {"count": 8}}, parallelism=2, concurrency=concurrency)
    await until(world, lambda: len(holding(world)) == 2)
    world.now += timedelta(seconds=1)
    world.cluster.user_create_run(
        {
            "apiVersion": "ingestrun.dev/v1alpha1",
            "kind": "IngestRun",
            "metadata": {"name": "newer", "namespace": "default"},
            "spec": world.cluster.run(KEY)["spec"],
        }
    )
    await world.settle()

    assert world.phase == "Cancelled"
    assert world.grants_after_end() == []


async def test_workers_wait_for_their_admission_by_kueue() -> None:
    world = PoolWorld()
    from tests.fakes.world import manifest

    body = manifest(**pool_spec(batches={"partitions": {"count": 2}}))
    body["metadata"]["labels"] = {"kueue.x-k8s.io/queue-name": "team"}
    world.cluster.user_create_run(body)
    await world.settle()

    assert all(job["spec"]["suspend"] for job in world.active_jobs())
    assert all(job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team" for job in world.active_jobs())


async def test_a_pool_keeps_the_workers_image_that_it_began_with() -> None:
    world = world_of(batches={"partitions": {"count": 4}}, parallelism=1)
    await until(world, lambda: bool(holding(world)))
    world.worker = "example/worker:2"
    for worker in list(world.workers.values()):
        world.end(worker, exit_code=137)
    world.restart()

    await world.play_pool()

    assert world.phase == "Succeeded"
    images = {
        call.body["spec"]["template"]["spec"]["containers"][0]["image"]
        for call in world.cluster.calls("create", "jobs")
        if call.body is not None
    }
    assert images == {"example/worker:1"}


async def test_a_deadline_of_the_run_ends_a_pool() -> None:
    world = world_of(batches={"partitions": {"count": 4}}, parallelism=1, activeDeadlineSeconds=60)
    await until(world, lambda: bool(holding(world)))
    world.now += timedelta(seconds=61)
    world.asked[KEY] = "timer"
    await world.settle()

    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "DeadlineExceeded"
    await world.play_pool()
    assert world.condition("Drained")["status"] == "True"
    assert world.grants_after_end() == []
