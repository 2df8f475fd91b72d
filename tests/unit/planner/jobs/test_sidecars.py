"""Which pods are ended: those whose stage is over, or can never begin, each told once."""

from __future__ import annotations

from tests.unit.planner.batch.test_containers import (
    DONE,
    FETCH,
    at,
    attempt,
    crash,
    injected,
    job_of,
    pod_of,
    told,
    waits,
    with_init,
)

from ingestrun.planner.actions import DeleteJob
from ingestrun.planner.batch.attempt import END_DEADLINE, JobState
from ingestrun.planner.batch.containers import MAX_INIT_RESTARTS
from ingestrun.planner.jobs.sidecars import pods_to_end


def test_what_is_left_of_a_pod_is_ended_once() -> None:
    job = job_of(FETCH, injected("agent"), injected("proxy"))
    own = told("fetch", exit=0, message=DONE)
    left = attempt(job, pod_of(job, [told("agent"), own, told("proxy")]))
    (end,) = pods_to_end([left], [])
    assert (end.name, end.uid, end.containers) == ("p", "p", ("agent", "proxy"))
    one = attempt(job, pod_of(job, [told("agent", exit=0), own, told("proxy")]))
    assert [end.containers for end in pods_to_end([one], [])] == [("proxy",)]
    for pod in (
        pod_of(job, [told("agent"), told("fetch"), told("proxy")]),
        pod_of(job, [told("agent"), own, told("proxy")], activeDeadlineSeconds=END_DEADLINE),
        pod_of(job, [told("agent"), own, told("proxy")], metadata={"deletionTimestamp": at(30)}),
        pod_of(job, [told("agent", exit=0), own, told("proxy", exit=0)], phase="Succeeded"),
    ):
        assert pods_to_end([attempt(job, pod)], []) == ()


def test_a_native_sidecar_is_left_to_the_kubelet() -> None:
    job = job_of(FETCH)
    pod = pod_of(job, [told("fetch", exit=0, message=DONE)], initContainers=[injected("proxy", restartPolicy="Always")])
    pod["status"]["initContainerStatuses"] = [told("proxy")]
    seen = attempt(job, pod)
    assert (seen.state, pods_to_end([seen], [])) == (JobState.SUCCEEDED, ())


def test_a_native_sidecar_that_cannot_start_has_its_pod_ended() -> None:
    early = with_init(waits(**crash(MAX_INIT_RESTARTS - 1)), phase="Pending", failed=False)
    assert pods_to_end([early], []) == ()
    late = with_init(waits(**crash(MAX_INIT_RESTARTS)), phase="Pending", failed=False)
    assert [end.containers for end in pods_to_end([late], [])] == [("proxy",)]
    assert pods_to_end([late], [DeleteJob(job=late.job, pod=late.pod)]) == (), "the deletion needs the pod unchanged"
    waiting = with_init(
        waits(**crash(MAX_INIT_RESTARTS)), phase="Pending", failed=False, activeDeadlineSeconds=END_DEADLINE
    )
    assert pods_to_end([waiting], []) == ()
