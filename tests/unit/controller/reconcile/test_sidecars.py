"""Runs in whose pods others have put containers: what never ends holds nothing up, and is ended."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from tests.fakes.shapes import Json
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.errors import Forbidden, Unavailable
from ingestrun.kube.protocol import Object
from ingestrun.planner.run.fair_sharing import JobLimits

ONE = {"batches": {"partitions": {"count": 1}}, "backoff": {"initialSeconds": 1, "maxSeconds": 1}}


def inject(*names: str) -> Callable[[Json], None]:
    """A policy that puts these containers before all others."""

    def mutate(spec: Json) -> None:
        spec["containers"][:0] = [{"name": name, "image": "example/mesh:9"} for name in names]

    return mutate


@pytest.fixture
def world() -> World:
    world = World()
    world.cluster.mutate_pod = inject("agent")
    return world


def end(world: World, job: Object, **how: Any) -> None:
    """Only the stage's own container ends: well, unless `how` says otherwise."""
    how = how or {"result": json.dumps(world.source.run(job))}
    world.cluster.end_container(job["metadata"]["name"], **how)


def job_of(world: World, stage: str, attempt: int = 0) -> Object:
    (found,) = [
        job
        for job in world.cluster.jobs()
        if environment(job)["INGEST_STAGE"] == stage and environment(job)["INGEST_ATTEMPT"] == str(attempt)
    ]
    return found


def told_to_end(world: World) -> int:
    return sum(1 for pod in world.cluster.pods() if pod["spec"].get("activeDeadlineSeconds") == 1)


def notes(world: World, reason: str) -> list[str]:
    return [event["note"] for event in world.cluster.events() if event["reason"] == reason]


async def test_a_sidecar_that_never_ends_holds_no_stage_up(world: World) -> None:
    world.create(**ONE)
    for stage in ("fetch", "hook", "publish"):
        await world.settle()
        end(world, job_of(world, stage))
    await world.settle()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 10
    assert world.status["failures"] == []
    assert [len(world.cluster.calls("patch", "pods")), told_to_end(world)] == [3, 3], "each was told once"
    assert len(notes(world, "SidecarEnded")) == 1
    assert "container agent did not end with the stage" in notes(world, "SidecarEnded")[0]
    assert "container agent, which others have put into pod" in world.condition("Drained")["message"]


async def test_what_the_kubelet_then_says_of_the_pods_changes_nothing(world: World) -> None:
    """It calls them overdue, and their Jobs have failed: while the next stages run, and after a restart."""
    world.create(**ONE)
    for stage in ("fetch", "hook", "publish"):
        await world.settle()
        job = job_of(world, stage)
        end(world, job)
        await world.settle()
        world.cluster.exceed_deadline(job["metadata"]["name"])
        world.restart()
    await world.play()
    assert (world.phase, world.status["retries"]) == ("Succeeded", [])
    assert world.status["batches"]["published"] == "0"


async def test_a_stage_that_fails_beside_a_sidecar_is_retried_after_its_own_backoff(world: World) -> None:
    world.create(**{**ONE, "retries": 1, "backoff": {"initialSeconds": 40, "maxSeconds": 40}})
    await world.settle()
    failed_at = world.now
    end(world, job_of(world, "fetch"), exit_code=7, result="no route")
    await world.settle()
    (failure,) = world.status["failures"]
    assert (failure["reason"], failure["log"]) == ("Error", "no route")
    assert failure["message"].startswith("exit code 7: no route; retry 1 of 1 in ")
    assert (world.due[KEY] - failed_at).total_seconds() <= 40
    world.now += timedelta(seconds=30)
    world.cluster.exceed_deadline(job_of(world, "fetch")["metadata"]["name"])  # the kubelet has ended the sidecar
    await world.settle()
    assert (world.due[KEY] - failed_at).total_seconds() <= 40, "the time is not counted anew with the end of the Job"
    world.now = world.due[KEY]
    await world.settle()
    world.cluster.mutate_pod = None
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["retries"] == [{"stage": "fetch", "reason": "Error", "count": 1}]


@pytest.mark.parametrize("how", [{}, {"exit_code": 7}], ids=["well", "badly"])
async def test_a_stage_that_is_over_takes_no_slot(how: dict[str, Any]) -> None:
    world = World(JobLimits(per_run=1))
    world.cluster.mutate_pod = inject("agent")
    world.create(**{**ONE, "retries": 1})
    await world.settle()
    end(world, job_of(world, "fetch"), **how)
    await world.settle()
    if how:
        world.now = world.due[KEY]
        await world.settle()
    assert len(world.active_jobs()) == 2, "the next, beside the one whose sidecar is being ended"


@pytest.mark.parametrize("policy", ["Drain", "Terminate"])
async def test_a_drain_waits_for_the_stages_alone(world: World, policy: str) -> None:
    world.cluster.pods_linger = True
    world.create(batches={"partitions": {"count": 2}})
    await world.settle()
    first, second = world.active_jobs()
    for job in (first, second):
        world.cluster.start_pod(job["metadata"]["name"])
    await world.settle()
    world.cancel(cancellation={"policy": policy})
    await world.settle()
    assert (world.phase, world.condition("Drained")["status"]) == ("Cancelled", "False")
    end(world, first)
    await world.settle()
    assert world.condition("Drained")["status"] == "False", "the other stage's own container still runs"
    end(world, second, **({} if policy == "Drain" else {"exit_code": 143}))
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    assert "container agent, which others have put into pod" in world.condition("Drained")["message"]
    for pod in world.cluster.pods():
        ending = pod["spec"].get("activeDeadlineSeconds") == 1 or "deletionTimestamp" in pod["metadata"]
        assert ending, "nothing else would end its sidecar"
    assert world.creates_after_cancelled() == []


async def test_a_publish_that_lands_beside_a_sidecar_is_told_as_published(world: World) -> None:
    world.create(**ONE)
    for stage in ("fetch", "hook"):
        await world.settle()
        end(world, job_of(world, stage))
    await world.settle()
    world.cluster.start_pod(job_of(world, "publish")["metadata"]["name"])
    world.cancel()
    await world.settle()
    end(world, job_of(world, "publish"))
    await world.settle()
    assert world.condition("Drained")["status"] == "True"
    assert world.status["cancellation"]["published"] == "0"


async def test_what_is_left_of_a_failed_run_is_ended_too(world: World) -> None:
    """Its Jobs are kept for their logs, so no deletion would end it."""
    world.create(**{**ONE, "retries": 0})
    await world.settle()
    end(world, job_of(world, "fetch"), exit_code=1)
    await world.settle()
    assert (world.phase, world.condition("Drained")["status"]) == ("Failed", "True")
    assert told_to_end(world) == 1
    while world.due:
        world.now = min(world.due.values())
        await world.settle()
    assert len(world.cluster.jobs()) == 1


@pytest.mark.parametrize(
    ("code", "told"),
    [(0, {"state": "Succeeded"}), (4, {"state": "Failed", "message": "Error: exit code 4: words"})],
)
async def test_the_clean_up_is_over_when_its_container_is(world: World, code: int, told: dict[str, str]) -> None:
    world.create(**ONE, onCancel={"image": "example/worker:1"}, cancel=True)
    await world.settle()
    end(world, job_of(world, "on-cancel"), exit_code=code, result="words")
    await world.settle()
    assert world.status["cancellation"]["onCancel"].items() >= told.items()
    assert told_to_end(world) == 1


async def test_a_refusal_to_end_a_sidecar_holds_nothing_up(world: World) -> None:
    """As with a ClusterRole of an earlier version: the pod's own deadline ends it then."""

    def admit(verb: str, resource: str, _: Object) -> None:
        if (verb, resource) == ("patch", "pods"):
            raise Forbidden('cannot patch resource "pods"')

    world.cluster.admit = admit
    world.create(**ONE)
    for stage in ("fetch", "hook", "publish"):
        await world.settle()
        end(world, job_of(world, stage))
    await world.settle()
    assert (world.phase, told_to_end(world)) == ("Succeeded", 0)
    assert notes(world, "SidecarEnded") == []


async def test_a_call_that_fails_is_made_again(world: World) -> None:
    world.cluster.fail_next("patch", "pods", Unavailable("try again"))
    world.create(**ONE)
    await world.settle()
    end(world, job_of(world, "fetch"))
    await world.settle()
    world.now = world.due[KEY]
    await world.settle()
    assert told_to_end(world) == 1


async def test_a_failed_init_container_is_taken_from_the_retries(world: World) -> None:
    world.create(**{**ONE, "retries": 1})
    for attempt in (0, 1):
        await world.settle()
        fetch = job_of(world, "fetch", attempt)
        world.cluster.fail_init(fetch["metadata"]["name"], "vault", exit_code=3, message="vault: sealed\n")
        await world.settle()
        if not attempt:
            world.now = world.due[KEY]
    assert world.phase == "Failed"
    message = "InitContainerFailed: init container vault: exit code 3: vault: sealed"
    assert world.condition("Succeeded")["message"] == f"batch 0, fetch, attempt 2: {message}"
    assert len(world.cluster.calls("create", "jobs")) == 2
    assert world.status["retries"] == [{"stage": "fetch", "reason": "InitContainerFailed", "count": 1}]


async def test_a_native_sidecar_that_never_starts_has_its_pod_ended(world: World) -> None:
    world.create(**ONE)
    await world.settle()
    fetch = job_of(world, "fetch")["metadata"]["name"]
    for restarts in range(4):
        assert told_to_end(world) == 0
        world.cluster.crash_init(fetch, "proxy", restarts=restarts, message="no certificate")
        await world.settle()
    assert told_to_end(world) == 1
    assert len(world.cluster.jobs()) == 1, "it could still start"


async def test_a_cancel_deletes_what_waits_for_an_init_container(world: World) -> None:
    """Its deletion depends on the pod as it was seen, so nothing else may change that pod in the same pass."""
    world.create(**ONE)
    await world.settle()
    world.cluster.crash_init(job_of(world, "fetch")["metadata"]["name"], "proxy", restarts=3)
    world.cancel()
    await world.settle()
    assert world.cluster.jobs() == []
    assert world.condition("Drained")["status"] == "True"
