"""More memory for a stage that was killed for want of it: how much, and the container's resources with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ingestrun.engine.facts import JobView
from ingestrun.model.quantity import QuantityError, read_bytes, render_bytes
from ingestrun.model.spec import OutOfMemory

FACTOR: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """The memory limit of an attempt, where it is not simply the spec's."""

    limit: int
    """Bytes."""
    before: int | None = None
    """Bytes that the attempt before had; None where this one has no more than that."""

    def __str__(self) -> str:
        was = f" instead of {render_bytes(self.before)}" if self.before is not None else ""
        return f"{render_bytes(self.limit)}{was}"


def limit_of(attempt: JobView) -> int | None:
    """The memory limit that an attempt's container had, in bytes.

    The pod knows best: a LimitRange may have given it one that the Job does not name. None: it had none.
    """
    pod = attempt.pod.memory_limit if attempt.pod is not None else None
    return pod if pod is not None else attempt.job.memory_limit


def raised(had: int, settings: OutOfMemory) -> Memory | None:
    """Twice as much, up to the cap; None where the cap allows no more than it had."""
    cap = read_bytes(settings.max_memory) if settings.max_memory is not None else had
    limit = min(had * FACTOR, cap)
    return Memory(limit=limit, before=had) if limit > had else None


def with_limit(resources: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """A container's resources with another memory limit; its request, if it has one, grows in proportion.

    In proportion, so that equal ones stay equal (the pod's QoS class does not change) and the scheduler still
    counts on what the stage really takes.
    """
    limits, requests = dict(resources.get("limits") or {}), dict(resources.get("requests") or {})
    before, asked = _bytes(limits.get("memory")), _bytes(requests.get("memory"))
    if before == limit:
        return dict(resources)
    limits["memory"] = render_bytes(limit)
    if before and asked:
        requests["memory"] = render_bytes(min(limit, asked * limit // before))
    return {**resources, "limits": limits, **({"requests": requests} if requests else {})}


def _bytes(quantity: str | int | None) -> int | None:
    if quantity is None:
        return None
    try:
        return read_bytes(quantity)
    except QuantityError:  # the API server will say so when it is given the Job
        return None
