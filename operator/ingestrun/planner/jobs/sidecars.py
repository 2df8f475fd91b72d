"""The containers that others put into a run's pods: when they are ended, and what is said of them.

Kubernetes ends native sidecars when the other containers of a pod have ended. An ordinary container of a mesh or an
agent it lets run until the pod's deadline, and with it the pod, the room that it takes, and its Job. The operator ends
such a container when the stage's own has ended. It deletes neither pod nor Job for that, because the stage's result,
and what its failures have cost, are read from them (docs/decisions/0009-end-what-is-left-of-a-pod.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from ingestrun.planner.actions import DeleteJob, EndPod
from ingestrun.planner.batch.attempt import Attempt, ObservedPod
from ingestrun.planner.batch.containers import MAX_INIT_RESTARTS
from ingestrun.planner.status.events import Event, warning


def pods_to_end(attempts: Iterable[Attempt], deletions: Iterable[DeleteJob]) -> tuple[EndPod, ...]:
    """Return the pods to end, each told once: their stage is over, or an init container never lets it begin.

    Those whose Jobs are deleted anyway are none of them, because these deletions depend on the pod as it was seen.
    """
    deleted = {deletion.job.uid for deletion in deletions}
    return tuple(
        EndPod(name=pod.name, uid=pod.uid, containers=containers)
        for attempt in attempts
        if (pod := attempt.pod) is not None and attempt.job.uid not in deleted and not attempt.job.deleting
        if pod.deleting_until is None and not pod.told_to_end
        if (containers := pod.left_running or _hopeless_init(pod))
    )


def _hopeless_init(pod: ObservedPod) -> tuple[str, ...]:
    """Return the native sidecar that is started again and again, and keeps the stage from starting."""
    end = pod.failed_init
    return (end.name,) if not pod.ended and end is not None and end.restarts >= MAX_INIT_RESTARTS else ()


def left_running_words(pods: Iterable[ObservedPod]) -> str:
    """Return a sentence about the containers that still run although their stage is over; empty if there are none."""
    left = [pod for pod in pods if pod.left_running]
    if not left:
        return ""
    more = f" and in {len(left) - 1} more" if len(left) > 1 else ""
    return f"{_containers(left[0].left_running)}, which others have put into pod {left[0].name}{more}, was told to end"


def sidecar_event(end: EndPod) -> Event:
    """Return the Event about a container that the operator has to end."""
    note = (
        f"{_containers(end.containers)} did not end with the stage, as in pod {end.name}: the operator has ended it. "
    )
    note += "Kubernetes ends a native sidecar (an init container with restartPolicy: Always) by itself"
    return warning("SidecarEnded", note, action="End")


def _containers(names: tuple[str, ...]) -> str:
    return f"container{'s' if len(names) > 1 else ''} {', '.join(names)}"
