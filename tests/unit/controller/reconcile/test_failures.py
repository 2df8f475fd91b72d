"""What comes of failures in whole runs: memory raised, disruptions survived, retries counted, refusals said."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.world import KEY, World, environment

from ingestrun.kube.errors import Denied, Forbidden, KubeError, WebhookUnavailable
from ingestrun.kube.protocol import Object

OOM = {"exit_code": 137, "reason": "OOMKilled", "result": "row 7\nrow 8"}
EVICTED = {"exit_code": 137, "pod_reason": "Evicted"}


@pytest.fixture
def world() -> World:
    return World()


def container(limit: str | None = "256Mi", request: str | None = "128Mi") -> dict[str, Any]:
    resources: dict[str, Any] = {"limits": {"memory": limit}} if limit else {}
    if request:
        resources["requests"] = {"memory": request}
    return {"image": "example/worker:1", **({"resources": resources} if resources else {})}


def own(limit: str | None = "256Mi", request: str | None = "128Mi", **more: Any) -> dict[str, Any]:
    """A run of one batch in three containers of one's own."""
    image = container(limit, request)
    return {
        "fetch": image,
        "hooks": [{"name": "check", "container": image}],
        "publish": image,
        "batches": {"partitions": {"count": 1}},
        "outOfMemory": {"maxMemory": "1Gi"},
        "retries": 0,
        **more,
    }


def built_in(**more: Any) -> dict[str, Any]:
    """The same by the built-in worker, with its own resources (192Mi asked for, 1Gi at most)."""
    return {
        "fetch": None,
        "publish": None,
        "source": {"files": {"path": "in/*.csv"}},
        "hooks": [{"name": "check", "validate": {"columns": [{"name": "id"}]}}],
        "sink": {"parquet": {"path": "out"}},
        "workspace": {"persistentVolumeClaim": {"claimName": "data"}},
        "batches": {"partitions": {"count": 1}},
        "outOfMemory": {"maxMemory": "4Gi"},
        "retries": 0,
        **more,
    }


def memory(job: Object) -> tuple[str | None, str | None]:
    """The request and the limit of a Job's container."""
    resources = job["spec"]["template"]["spec"]["containers"][0].get("resources", {})
    return resources.get("requests", {}).get("memory"), resources.get("limits", {}).get("memory")


def failing(stage: str, *fates: dict[str, Any]) -> Callable[[Object], dict[str, Any]]:
    """The attempts of that stage meet these fates, then all goes well."""

    def each(job: Object) -> dict[str, Any]:
        env = environment(job)
        attempt = int(env["INGEST_ATTEMPT"])
        return fates[attempt] if env["INGEST_STAGE"] == stage and attempt < len(fates) else {}

    return each


def made(world: World) -> list[Object]:
    """All Jobs that there have been, those that are deleted by now included."""
    jobs = {change.obj["metadata"]["uid"]: change.obj for change in world.cluster.changes if change.kind == "Job"}
    return list(jobs.values())


def attempts(world: World, stage: str) -> list[Object]:
    jobs = [job for job in made(world) if environment(job)["INGEST_STAGE"] == stage]
    return sorted(jobs, key=lambda job: int(environment(job)["INGEST_ATTEMPT"]))


def notes(world: World, reason: str) -> list[str]:
    return [event["note"] for event in world.cluster.events() if event["reason"] == reason]


@pytest.mark.parametrize("stage", ["fetch", "hook", "publish"])
@pytest.mark.parametrize("kind", ["own", "built-in"])
async def test_killed_for_memory_it_gets_twice_as_much(world: World, stage: str, kind: str) -> None:
    world.create(**(own() if kind == "own" else built_in()))
    await world.play(each=failing(stage, OOM, OOM))
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 10
    ours = [("128Mi", "256Mi"), ("256Mi", "512Mi"), ("512Mi", "1Gi")]
    workers = [("192Mi", "1Gi"), ("384Mi", "2Gi"), ("768Mi", "4Gi")]
    assert [memory(job) for job in attempts(world, stage)] == (ours if kind == "own" else workers)
    others = {"fetch", "hook", "publish"} - {stage}
    assert {memory(job) for other in others for job in attempts(world, other)} == {
        (ours if kind == "own" else workers)[0]
    }
    label = "hook check" if stage == "hook" else stage
    first = "512Mi instead of 256Mi" if kind == "own" else "2Gi instead of 1Gi"
    second = "1Gi instead of 512Mi" if kind == "own" else "4Gi instead of 2Gi"
    assert notes(world, "MemoryRaised") == [
        f"batch 0, {label}, attempt 2: memory limit {first}",
        f"batch 0, {label}, attempt 3: memory limit {second}",
    ]
    assert f"retry 1 of 3 with {first} in " in notes(world, "StageFailed")[0]
    assert world.status["retries"] == [{"stage": label, "reason": "OOMKilled", "count": 2}]
    assert world.status["failures"][0]["log"] == "row 7\nrow 8"


async def test_a_raise_is_told_once_though_the_status_is_written_again(world: World) -> None:
    world.create(**own(batches={"partitions": {"count": 3}}, parallelism=3, backoff={"initialSeconds": 600}))
    await world.settle()
    first, *others = world.active_jobs()
    world.work(first, **OOM)
    await world.settle()
    for _ in range(3):
        for job in others:
            world.work(job)
        await world.settle()
        others = world.active_jobs()
    assert world.status["batches"]["published"] == "1-2"
    assert len(notes(world, "MemoryRaised")) == 1


async def test_raised_memory_is_kept_for_another_failure(world: World) -> None:
    world.create(**own(retries=1))
    await world.play(each=failing("fetch", OOM, {"exit_code": 1}, EVICTED))
    assert world.phase == "Succeeded"
    assert [memory(job)[1] for job in attempts(world, "fetch")] == ["256Mi", "512Mi", "512Mi", "512Mi"]


async def test_the_cap_holds_and_then_the_batch_fails(world: World) -> None:
    world.create(**own(outOfMemory={"maxMemory": "600Mi"}, retries=5))
    await world.play(each=failing("hook", *[OOM] * 9))
    assert world.phase == "Failed"
    assert [memory(job) for job in attempts(world, "hook")] == [
        ("128Mi", "256Mi"), ("256Mi", "512Mi"), ("300Mi", "600Mi"),
    ]  # fmt: skip
    assert world.condition("Succeeded")["reason"] == "BatchFailed"
    assert world.condition("Succeeded")["message"].endswith(
        "OOMKilled: the container used more memory than its limit; it had 600Mi, "
        "and outOfMemory.maxMemory of 600Mi allows no more"
    )


@pytest.mark.parametrize(
    ("spec", "number"),
    [
        (own(outOfMemory=None, retries=2), 3),
        (own(None, None, retries=2), 3),
        (own(outOfMemory={"retries": 0}, retries=2), 1),
    ],
    ids=["unset", "no limit", "never"],
)
async def test_without_a_cap_or_a_limit_nothing_is_raised(world: World, spec: dict[str, Any], number: int) -> None:
    world.create(**spec)
    await world.play(each=failing("fetch", *[OOM] * 9))
    assert world.phase == "Failed"
    assert len(attempts(world, "fetch")) == number
    assert len({memory(job) for job in attempts(world, "fetch")}) == 1
    assert notes(world, "MemoryRaised") == []


async def test_a_limit_that_the_namespace_gave_is_raised_too(world: World) -> None:
    """A LimitRange sets it in the pod; the Job does not name it."""
    world.create(**own(None, None))
    await world.settle()
    (fetch,) = world.active_jobs()
    create, pods = world.cluster.create_pod, world.cluster._objects["Pod"]
    name = create(fetch["metadata"]["name"])
    pods["default", name]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "100Mi"}}
    world.work(fetch, **OOM)
    await world.play()
    assert world.phase == "Succeeded"
    assert [memory(job) for job in attempts(world, "fetch")] == [(None, None), (None, "200Mi")]


async def test_disruptions_do_not_eat_the_retries(world: World) -> None:
    world.create(**own(retries=1))
    await world.play(each=failing("publish", *[EVICTED] * 4, {"exit_code": 1}, *[EVICTED] * 4))
    assert world.phase == "Succeeded"
    assert world.status["retries"] == [
        {"stage": "publish", "reason": "Evicted", "count": 8},
        {"stage": "publish", "reason": "Error", "count": 1},
    ]


async def test_disruptions_without_end_fail_the_batch(world: World) -> None:
    world.create(**own(retries=1))
    await world.play(each=failing("fetch", *[EVICTED] * 50))
    assert world.phase == "Failed"
    assert len(attempts(world, "fetch")) == 10 + 1 + 1


FATES = [OOM, EVICTED, {"exit_code": 1}, {"result": "<html>"}, {"result": ""}]


@settings(max_examples=30, deadline=None)
@given(
    fates=st.lists(st.sampled_from([None, *FATES]), max_size=30),
    restart_at=st.sets(st.integers(0, 30), max_size=8),
)
def test_each_retry_is_counted_once_and_memory_comes_out_the_same_whatever_restarts(
    fates: list[dict[str, Any] | None], restart_at: set[int]
) -> None:
    async def course(restarts: set[int]) -> World:
        world = World()
        world.create(**own(retries=50, onBatchFailure="Continue", batches={"partitions": {"count": 2}}, parallelism=1))
        left = iter(fates)
        for step in range(300):
            if step in restarts:
                world.restart()
            await world.settle()
            if jobs := world.active_jobs():
                world.work(jobs[0], **(next(left, None) or {}))
            elif world.due:
                world.now = max(world.now, min(world.due.values()))
            else:
                break
        return world

    plain, restarted = asyncio.run(course(set())), asyncio.run(course(restart_at))
    for key in ("phase", "retries", "records", "batches"):
        assert restarted.status.get(key) == plain.status.get(key)
    assert [memory(job) for job in made(restarted)] == [memory(job) for job in made(plain)]
    counted = sum(entry["count"] for entry in plain.status.get("retries", ()))
    assert counted == sum(1 for job in made(plain) if environment(job)["INGEST_ATTEMPT"] != "0")


async def test_only_the_two_newest_failures_keep_their_log(world: World) -> None:
    world.create(retries=9, batches={"partitions": {"count": 1}}, backoff={"initialSeconds": 1})
    await world.play(each=failing("fetch", *[{"exit_code": 1, "result": f"one\ntwo {n}"} for n in range(4)]))
    assert [failure.get("log") for failure in world.status["failures"]] == [None, None, "one\ntwo 2", "one\ntwo 3"]
    assert [failure["message"].partition(";")[0] for failure in world.status["failures"]] == [
        f"exit code 1: two {n}" for n in range(4)
    ]


async def test_a_failed_jobs_pod_is_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Job's end may be seen before its pod's: exit code 65 must not be taken for a lost pod."""
    world.create()
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.start_pod(fetch["metadata"]["name"])
    world.deaf.add("Pod")
    world.work(fetch, exit_code=65)
    await world.settle()
    assert world.status["failures"] == []
    monkeypatch.setattr("ingestrun.controller.state.memory.POD_GRACE_SECONDS", 0.0)
    world.now = world.due[KEY]
    await world.settle()
    assert world.status["failures"][0]["reason"] == "PermanentError"


async def test_a_pod_that_is_gone_is_looked_for_once(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingestrun.controller.state.memory.POD_GRACE_SECONDS", 0.0)
    world.create()
    await world.settle()
    (fetch,) = world.active_jobs()
    world.cluster.start_pod(fetch["metadata"]["name"])
    world.cluster.lose_pod(fetch["metadata"]["name"])
    world.cluster.fail_job(fetch["metadata"]["name"], reason="BackoffLimitExceeded")
    await world.settle()
    assert world.status["failures"][0]["reason"] == "PodLost"
    lists = len(world.cluster.calls("list", "pods"))
    for _ in range(5):
        world.add(KEY, "test")
        await world.settle()
    assert len(world.cluster.calls("list", "pods")) == lists


RBAC = (
    'jobs.batch is forbidden: User "system:serviceaccount:ingestrun-system:ingestrun-operator" cannot create resource '
    '"jobs" in API group "batch" in the namespace "default"'
)
NO = 'admission webhook "names.example.com" denied the request: call it geo-*'
DOWN = 'Internal error occurred: failed calling webhook "names.example.com": connection refused'


def refuse(world: World, error: KubeError | None) -> None:
    def admit(verb: str, resource: str, _: Object) -> None:
        if error is not None and (verb, resource) == ("create", "jobs"):
            raise error

    world.cluster.admit = admit


async def test_a_denied_job_fails_the_run_with_the_webhooks_own_sentence(world: World) -> None:
    refuse(world, Denied(NO))
    world.create()
    await world.play()
    assert world.phase == "Failed"
    assert world.condition("Succeeded")["reason"] == "AdmissionDenied"
    assert world.condition("Succeeded")["message"] == f"batch 0, fetch: {NO}"
    assert notes(world, "Failed") == [f"batch 0, fetch: {NO}"]
    assert len(world.cluster.calls("create", "jobs")) == 1


@pytest.mark.parametrize(
    ("error", "reason", "words"),
    [
        (Forbidden(RBAC), "Forbidden", f"the operator lacks a right that an administrator has to grant: {RBAC}"),
        (WebhookUnavailable(DOWN), "WebhookUnavailable", DOWN),
    ],
)
async def test_what_an_administrator_can_mend_holds_the_run(
    world: World, error: KubeError, reason: str, words: str
) -> None:
    refuse(world, error)
    world.create(backpressure={"retrySeconds": 60})
    await world.settle()
    for tries in (1, 2, 3):
        assert len(world.cluster.calls("create", "jobs")) == tries
        held = world.condition("Backpressured")
        assert (held["status"], held["reason"], held["message"]) == ("True", reason, words)
        assert 50 <= (world.due[KEY] - world.now).total_seconds() <= 66
        world.now = world.due[KEY]
        await world.settle()
    refuse(world, None)
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["records"]["published"] == 450
    assert world.condition("Backpressured")["status"] == "False"


async def test_a_namespace_that_is_being_deleted_is_said_without_a_hot_loop(world: World) -> None:
    world.create()
    world.cluster.terminating.add("default")
    await world.settle()
    assert world.condition("Backpressured")["reason"] == "NamespaceTerminating"
    assert world.condition("Backpressured")["message"] == "namespace default is being deleted: nothing can start there"
    assert len(world.cluster.calls("create", "jobs")) == 1
    assert (world.due[KEY] - world.now).total_seconds() >= 50
    world.cancel()
    await world.play()
    assert world.phase == "Cancelled"


@pytest.mark.parametrize(
    ("stage", "result", "words"),
    [
        ("hook", {"read": 10, "written": 9}, "read 10 rows, but wrote 9 and rejected 0"),
        ("hook", {"read": 10, "written": 20}, "read 10 rows, but wrote 20 and rejected 0"),
        ("hook", {"read": 9, "written": 9}, "read 9 rows of the 10 that the stage before handed on"),
        ("publish", {"read": 10, "written": 9}, "read 10 rows, but wrote 9 and rejected 0"),
    ],
)
async def test_rows_that_vanish_or_appear_inside_a_stage(
    world: World, stage: str, result: dict[str, Any], words: str
) -> None:
    world.create(**own())
    await world.play(each=failing(stage, {"result": {"v": "v1", "outcome": "done", **result}}))
    assert world.phase == "Failed"
    (failure,) = world.status["failures"]
    assert (failure["reason"], failure["message"]) == ("RowsMismatch", words)
    assert world.status["records"]["published"] == 0


async def test_a_mismatch_that_was_retried_is_in_the_history(world: World) -> None:
    world.create(**own(retries=1))
    await world.play(each=failing("hook", {"result": {"v": "v1", "outcome": "done", "read": 3, "written": 3}}))
    assert world.phase == "Succeeded"
    assert world.status["retries"] == [{"stage": "hook check", "reason": "RowsMismatch", "count": 1}]
    assert [failure["reason"] for failure in world.status["failures"]] == ["RowsMismatch"]


@pytest.mark.parametrize(("restarted", "reason"), [(False, "Error"), (True, "JobMissing")])
async def test_an_attempt_that_was_deleted_by_hand_counts_as_a_retry(
    world: World, restarted: bool, reason: str
) -> None:
    """Its reason is known as long as the process lives that has seen it."""
    world.create(**own(retries=2))
    await world.settle()
    (fetch,) = world.active_jobs()
    world.work(fetch, exit_code=1)
    await world.settle()
    world.now = world.due[KEY]
    await world.settle()
    world.cluster.expire_job(fetch["metadata"]["name"])
    if restarted:
        world.restart()
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["retries"] == [{"stage": "fetch", "reason": reason, "count": 1}]


async def test_deleting_failed_attempts_wins_no_retries(world: World) -> None:
    world.create(**own(retries=1))
    for attempt in (0, 1):
        await world.settle()
        (fetch,) = world.active_jobs()
        assert environment(fetch)["INGEST_ATTEMPT"] == str(attempt)
        world.work(fetch, exit_code=1)
        await world.settle()
        if attempt == 0:
            world.now = world.due[KEY]
            await world.settle()
            world.cluster.expire_job(fetch["metadata"]["name"])
    assert world.phase == "Failed"
