"""The containers of a pod: the stage's own, which each fact about the stage comes from, and those put beside it.

A mesh, an agent or a policy adds containers to a pod, in any order, and the kubelet lists their states by name. So no
place in a list says whose a container is: the name alone does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from ingestrun.model.names import LABEL_STAGE
from ingestrun.model.times import parse_time

MAX_INIT_RESTARTS: Final = 3
"""Restarts of an init container after which its pod is given up: it has failed four times, within 70 s by default."""


STATUS_UNKNOWN: Final = "ContainerStatusUnknown"
"""The reason of a container that the kubelet cannot find: it was never started, or it is lost."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InitContainerEnd:
    """End of an init container that has kept the stage's own container from starting."""

    name: str
    exit_code: int
    reason: str | None
    message: str | None
    finished_at: datetime | None
    restarts: int
    """Number of times that it was started again, as a native sidecar (`restartPolicy: Always`) is."""


def own_container_name(labels: Mapping[str, str]) -> str:
    """Return the name of a stage's own container from the labels of its Job or pod: the stage's."""
    return labels.get(LABEL_STAGE, "")


def named(containers: Any, name: str) -> Mapping[str, Any]:
    """Return the container of that name, or its status; empty if there is none."""
    return next((container for container in containers or () if container.get("name") == name), {})


def native_sidecars(spec: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the init containers that run beside the pod's other containers."""
    containers = spec.get("initContainers") or ()
    return frozenset(it["name"] for it in containers if it.get("restartPolicy") == "Always")


def left_running(spec: Mapping[str, Any], status: Mapping[str, Any], own: str) -> tuple[str, ...]:
    """Return the names of the containers beside the stage's own that have not ended, in order.

    Native sidecars are none of them, because the kubelet ends those itself.
    """
    ended = {
        told["name"] for told in status.get("containerStatuses") or () if "terminated" in (told.get("state") or {})
    }
    names = (container["name"] for container in spec.get("containers") or ())
    return tuple(sorted(name for name in names if name != own and name not in ended))


def failed_init_container(spec: Mapping[str, Any], status: Mapping[str, Any]) -> InitContainerEnd | None:
    """Return the end of the init container that keeps the stage's own from starting; None if none does.

    An ordinary init container that has failed goes before a native sidecar, which the kubelet ends because of it.
    """
    native = native_sidecars(spec)
    ends = [_end_of(told, native=told["name"] in native) for told in status.get("initContainerStatuses") or ()]
    failed = [end for end in ends if end is not None]
    return min(failed, key=lambda end: end.name in native, default=None)


def _end_of(told: Mapping[str, Any], *, native: bool) -> InitContainerEnd | None:
    """Return how an init container has ended; None if it has not ended, or nothing waits for it."""
    told_end = (told.get("state") or {}).get("terminated")
    before = (told.get("lastState") or {}).get("terminated")
    if told_end is None or (told_end.get("reason") == STATUS_UNKNOWN and before is not None):
        # Between two starts there is no container, so at the end of its pod the kubelet finds none.
        told_end = before
    if told_end is None:
        return None
    code, restarts = told_end.get("exitCode", 0), told.get("restartCount") or 0
    # A native sidecar has to run, so that the next container can start: to end with 0, again and again, is no success.
    harmless = told.get("started") or (code == 0 and not restarts) if native else code == 0
    if harmless:
        return None
    return InitContainerEnd(
        name=told["name"],
        exit_code=code,
        reason=told_end.get("reason"),
        message=told_end.get("message"),
        finished_at=parse_time(told_end["finishedAt"]) if told_end.get("finishedAt") else None,
        restarts=restarts,
    )
