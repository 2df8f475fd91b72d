"""Whose container it is: facts about a stage come from the container of its name, whatever stands beside it."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any

import pytest
from tests.fakes.world import manifest

from ingestrun.model.contract import StageResult
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.batch.attempt import (
    END_DEADLINE,
    Attempt,
    JobState,
    ObservedPod,
    attempt_of,
    read_job,
    read_pod,
)
from ingestrun.planner.batch.containers import MAX_INIT_RESTARTS
from ingestrun.planner.batch.failure_policy import Failure, outcome_of
from ingestrun.planner.batch.pipeline import Step, on_cancel_step, steps_of
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.manifest import WorkerImage, job_manifest

START = "2026-11-28T12:00:00Z"
DONE = json.dumps({"v": "v1", "outcome": "done", "read": 3, "written": 3})
DEADLINE = 60
ITS = "its activeDeadlineSeconds"


def at(seconds: int) -> str:
    return (datetime.fromisoformat(START) + timedelta(seconds=seconds)).astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def run() -> IngestRun:
    image = {"image": "example/worker:1", "activeDeadlineSeconds": DEADLINE}
    limited = {**image, "resources": {"limits": {"memory": "256Mi"}}}
    body = manifest(fetch=limited, hooks=[{"name": "check", "container": limited}], publish=limited, onCancel=limited)
    meta = {"namespace": "default", "name": "n", "uid": "u", "resourceVersion": "1", "creationTimestamp": START}
    return IngestRun.read({**body, "metadata": meta, "status": {"observedGeneration": -1}})


def steps() -> list[Step]:
    clean_up = on_cancel_step(run().spec)
    assert clean_up is not None
    return [*steps_of(run().spec), clean_up]


def injected(name: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "image": "example/mesh:9", "resources": {"limits": {"memory": "1Mi"}}, **more}


def job_of(step: Step, *others: dict[str, Any]) -> dict[str, Any]:
    """The Job of a stage, with these containers put before its own."""
    create = CreateJob(attempt=NextAttempt(batch=0, step=step, number=0, input_attempt=None))
    job = job_manifest(run(), create, worker=WorkerImage(name="example/worker:1"))
    job["metadata"].update(uid="j", creationTimestamp=START)
    job["spec"]["template"]["spec"]["containers"][:0] = others
    return {**job, "status": {"startTime": START}}


def told(name: str, **state: Any) -> dict[str, Any]:
    """The state of a container: `exit` and `message` if it has ended, `after` so many seconds."""
    common = {"name": name, "imageID": f"id-of-{name}", "restartCount": 0}
    if "exit" not in state:
        return {**common, "started": True, "state": {"running": {}}}
    end = {"exitCode": state["exit"], "reason": state.get("reason", "Error"), "finishedAt": at(state.get("after", 5))}
    return {**common, "started": False, "state": {"terminated": {**end, "message": state.get("message")}}}


def pod_of(
    job: dict[str, Any], statuses: list[dict[str, Any]], *, phase: str = "Running", **more: Any
) -> dict[str, Any]:
    template = job["spec"]["template"]
    meta = {
        "name": "p",
        "uid": "p",
        "labels": template["metadata"]["labels"],
        "creationTimestamp": START,
        "ownerReferences": [{"kind": "Job", "uid": "j", "controller": True}],
        **more.pop("metadata", {}),
    }
    status = {"phase": phase, "startTime": START, "containerStatuses": statuses, **more.pop("status", {})}
    return {"metadata": meta, "spec": {**template["spec"], **more}, "status": status}


def attempt(job: dict[str, Any], pod: dict[str, Any], *, failed: bool = False) -> Attempt:
    """Return the attempt as the planner sees it; `failed`: of a Job that its controller has found Failed."""
    if failed:
        ended = {"type": "Failed", "status": "True", "reason": "BackoffLimitExceeded", "lastTransitionTime": at(90)}
        job = {**job, "status": {**job["status"], "conditions": [ended]}}
    seen = read_pod(pod)
    assert seen is not None
    return attempt_of(read_job(job), [seen])


def failure(seen: Attempt) -> tuple[str, str, str | None]:
    assert seen.state is JobState.FAILED
    outcome = outcome_of(seen)
    assert isinstance(outcome, Failure)
    return outcome.reason, outcome.message, outcome.log


def pod_seen(seen: Attempt) -> ObservedPod:
    assert seen.pod is not None
    return seen.pod


@pytest.mark.parametrize("step", steps(), ids=lambda step: step.job_part)
def test_the_result_is_that_of_the_container_of_its_name_in_any_order(step: Step) -> None:
    """One name is listed before each stage's own, one after it; one fails, one runs on."""
    others = [injected("aaa-agent"), injected("zzz-proxy")]
    job = job_of(step, *others)
    statuses = [
        told("aaa-agent", exit=9, message="agent's words"),
        told(step.stage.value, exit=0, message=DONE),
        told("zzz-proxy"),
    ]
    for order in permutations(statuses):
        seen = attempt(job, pod_of(job, list(order)))
        assert seen.state is JobState.SUCCEEDED
        outcome = outcome_of(seen)
        assert isinstance(outcome, StageResult)
        assert outcome.written == 3
        pod = pod_seen(seen)
        assert (pod.left_running, pod.image_id) == (("zzz-proxy",), f"id-of-{step.stage.value}")
        assert (pod.memory_limit, seen.job.memory_limit, seen.job.image) == (2**28, 2**28, "example/worker:1")


FETCH = steps()[0]


@pytest.mark.parametrize(
    ("own", "reason", "message", "log"),
    [
        ({"exit": 7, "message": "one\ntwo"}, "Error", "exit code 7: two", "one\ntwo"),
        ({"exit": 65, "message": "no"}, "PermanentError", "exit code 65: no", "no"),
        (
            {"exit": 137, "reason": "OOMKilled", "message": "row 9"},
            "OOMKilled",
            "the container used more memory than its limit",
            "row 9",
        ),
        ({"exit": 1, "after": DEADLINE}, "DeadlineExceeded", f"the stage ran longer than {ITS}", None),
    ],
)
def test_a_stage_that_fails_beside_others_fails_at_once_and_for_the_same_reason_afterwards(
    own: dict[str, Any], reason: str, message: str, log: str | None
) -> None:
    """When the operator has ended the others, the kubelet calls the whole pod overdue."""
    job = job_of(FETCH, injected("agent"))
    before = attempt(job, pod_of(job, [told("agent"), told("fetch", **own)]))
    assert failure(before) == (reason, message, log)
    overdue = {"reason": "DeadlineExceeded", "message": "Pod was active on the node longer than the specified deadline"}
    statuses = [told("agent", exit=137, after=80), told("fetch", **own)]
    pod = pod_of(job, statuses, phase="Failed", status=overdue, activeDeadlineSeconds=END_DEADLINE)
    after = attempt(job, pod, failed=True)
    assert failure(after) == (reason, message, log)
    assert before.ended_at == after.ended_at == datetime.fromisoformat(at(own.get("after", 5)))


def test_a_result_stays_a_success_though_the_job_fails_for_what_else_ran() -> None:
    job = job_of(FETCH, injected("agent"))
    statuses = [told("agent", exit=137, after=80), told("fetch", exit=0, message=DONE)]
    for status in ({}, {"reason": "DeadlineExceeded"}, {"reason": "Evicted"}):
        seen = attempt(job, pod_of(job, statuses, phase="Failed", status=status), failed=True)
        assert seen.state is JobState.SUCCEEDED
        assert isinstance(outcome_of(seen), StageResult)


DISRUPTED = {"conditions": [{"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}]}


@pytest.mark.parametrize(
    ("own", "more"),
    [
        ({"exit": 143}, {}),
        ({"exit": 137}, {}),
        ({"exit": 1}, {"metadata": {"deletionTimestamp": at(40)}}),
        ({"exit": 1}, {"status": DISRUPTED}),
    ],
)
def test_a_container_that_may_have_been_ended_with_its_pod_is_judged_when_the_pod_has_ended(
    own: dict[str, Any], more: dict[str, Any]
) -> None:
    """By an eviction, or because Kueue has suspended its Job: then the Job is to start another pod."""
    job = job_of(FETCH, injected("agent"))
    assert attempt(job, pod_of(job, [told("agent"), told("fetch", **own)], **more)).state is JobState.RUNNING
    evicted = {"reason": "Evicted", **DISRUPTED}
    pod = pod_of(job, [told("agent", exit=137, after=6), told("fetch", **own)], phase="Failed", status=evicted)
    assert failure(attempt(job, pod, failed=True))[0] == "Evicted"


@pytest.mark.parametrize("name", ["agent", "zzz"])
def test_a_stage_has_started_when_its_own_container_has(name: str) -> None:
    job = job_of(FETCH, injected(name))
    waiting = {"name": "fetch", "state": {"waiting": {"reason": "ContainerCreating"}}}
    statuses = sorted([told(name), waiting], key=lambda status: str(status["name"]))
    assert attempt(job, pod_of(job, statuses, phase="Pending")).state is JobState.WAITING
    pulling = {"name": name, "state": {"waiting": {"reason": "ImagePullBackOff"}}}
    running = attempt(job, pod_of(job, [pulling, told("fetch")], phase="Pending"))
    assert (running.state, running.obstacle) == (JobState.RUNNING, None)
    done = attempt(job, pod_of(job, [pulling, told("fetch", exit=0, message=DONE)], phase="Pending"))
    assert (done.state, pod_seen(done).left_running) == (JobState.SUCCEEDED, (name,))


def test_a_pod_without_the_stages_container_is_no_success() -> None:
    job = job_of(FETCH, injected("agent"))
    pod = pod_of(job, [told("agent", exit=0, message=DONE)], phase="Succeeded")
    seen = attempt(job, pod)
    assert seen.state is not JobState.SUCCEEDED
    complete = {"type": "Complete", "status": "True", "lastTransitionTime": at(9)}
    outcome = outcome_of(attempt({**job, "status": {"conditions": [complete]}}, pod))
    assert isinstance(outcome, Failure)
    assert outcome.reason == "ResultInvalid"


# ---- init containers


def waits(**init: Any) -> dict[str, Any]:
    return {"initContainerStatuses": [init], "containerStatuses": [{"name": "fetch", "state": {"waiting": {}}}]}


def ended_init(code: int, *, reason: str = "Error", message: str = "vault: sealed\n", after: int = 4) -> dict[str, Any]:
    end = {"exitCode": code, "reason": reason, "message": message, "finishedAt": at(after)}
    return {"name": "vault", "restartCount": 0, "started": False, "state": {"terminated": end}}


def with_init(told: dict[str, Any], *, phase: str = "Failed", failed: bool = True, **more: Any) -> Attempt:
    """A pod of two init containers of which its status tells this; `more` is its status, metadata, or spec."""
    job = job_of(FETCH)
    spec = {"initContainers": [injected("vault"), injected("proxy", restartPolicy="Always")]}
    pod = pod_of(job, [], phase=phase, status={**told, **more.pop("status", {})}, **spec, **more)
    return attempt(job, pod, failed=failed)


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (ended_init(3), "init container vault: exit code 3: vault: sealed"),
        (ended_init(65, message=""), "init container vault: exit code 65"),
        (ended_init(1, message='{"v":"v1","outcome":"done"}'), "init container vault: exit code 1"),
        (ended_init(137, reason="OOMKilled"), "init container vault: exit code 137 (OOMKilled): vault: sealed"),
        (ended_init(128, reason="StartError"), "init container vault: exit code 128 (StartError): vault: sealed"),
        (ended_init(143), "init container vault: exit code 143: vault: sealed"),
    ],
)
def test_an_init_container_fails_the_stage_by_its_name_code_and_words(init: dict[str, Any], message: str) -> None:
    assert failure(with_init(waits(**init)))[:2] == ("InitContainerFailed", message)


@pytest.mark.parametrize(
    ("init", "more", "reason"),
    [
        (ended_init(143), {"status": DISRUPTED}, "Evicted"),
        (ended_init(1), {"status": DISRUPTED}, "Evicted"),
        (ended_init(137), {"metadata": {"deletionTimestamp": at(40)}}, "PodDeleted"),
        (ended_init(137, reason="ContainerStatusUnknown"), {}, "NodeLost"),
        (ended_init(137), {"status": {"reason": "Evicted"}}, "StorageExceeded"),
        (ended_init(137, after=DEADLINE + 1), {"status": {"reason": "DeadlineExceeded"}}, "DeadlineExceeded"),
    ],
)
def test_what_was_done_to_a_pod_while_an_init_container_ran_is_no_failure_of_it(
    init: dict[str, Any], more: dict[str, Any], reason: str
) -> None:
    seen = failure(with_init(waits(**init), **more))
    assert seen[0] == reason
    if reason == "DeadlineExceeded":
        assert seen[1].endswith(f"had not started at the end of {ITS}: it waited for init container vault")


def test_the_init_container_that_failed_is_named_and_not_the_one_that_was_ended_for_it() -> None:
    proxy = {**ended_init(137, after=6), "name": "proxy"}
    status = {**waits(), "initContainerStatuses": [proxy, ended_init(3)]}
    assert failure(with_init(status))[1].startswith("init container vault: exit code 3")


def crash(restarts: int, code: int = 4, **more: Any) -> dict[str, Any]:
    end = {"exitCode": code, "reason": "Error", "message": "no certificate\n", "finishedAt": at(30)}
    state = {"state": {"waiting": {"reason": "CrashLoopBackOff"}}, "lastState": {"terminated": end}}
    return {"name": "proxy", "restartCount": restarts, "started": False, **state, **more}


@pytest.mark.parametrize("code", [4, 0])
def test_a_native_sidecar_that_cannot_start_fails_the_stage_once_its_pod_has_ended(code: int) -> None:
    """The kubelet finds no container of it then, because there is none between two starts."""
    crashing = with_init(waits(**crash(MAX_INIT_RESTARTS, code)), phase="Pending", failed=False)
    assert crashing.state is JobState.WAITING, "no other attempt may begin while this one can still start"
    gone = {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": "not located", "finishedAt": None}
    init = crash(MAX_INIT_RESTARTS, code, state={"terminated": gone})
    told_to_end: dict[str, Any] = {"activeDeadlineSeconds": END_DEADLINE}
    ended = with_init(waits(**init), status={"reason": "DeadlineExceeded"}, **told_to_end)
    assert failure(ended)[:2] == (
        "InitContainerFailed",
        f"init container proxy: exit code {code}, 4 times: no certificate",
    )


def test_a_native_sidecar_that_runs_is_not_to_blame() -> None:
    healthy = with_init(waits(**crash(5, started=True)), phase="Pending", failed=False)
    assert pod_seen(healthy).failed_init is None
    lost = with_init(waits(**crash(5, started=True)))
    assert failure(lost)[0] == "PodLost"
