"""The operator's own caps on unfinished Jobs, and how runs share what is left under them: pure, from a snapshot.

Max-min fairness, slot by slot: each goes to the run that has the fewest unfinished Jobs of all that want one and that
the caps let have one; among equals, to the one whose turn came longest ago. So a run never starts a Job while
another that could use the slot has fewer, and no slot is left idle while anyone could use it.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Final

PER_RUN: Final = "INGESTRUN_MAX_JOBS_PER_RUN"
PER_NAMESPACE: Final = "INGESTRUN_MAX_JOBS_PER_NAMESPACE"
IN_ALL: Final = "INGESTRUN_MAX_JOBS"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobLimits:
    """How many unfinished Jobs there may be; 0: no cap. Clean-ups after a cancel are not counted and not held."""

    per_run: int = 0
    per_namespace: int = 0
    in_all: int = 0

    @property
    def any(self) -> bool:
        """Whether there is a cap at all."""
        return bool(self.per_run or self.per_namespace or self.in_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What one run has, and what it could start now if it were let."""

    uid: str
    namespace: str
    active: int = 0
    """Its unfinished Jobs, those included whose create is under way."""
    wants: int = 0
    turn: int = 0
    """When it last got a slot or began to wait: lower is longer ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """That the API server has refused a Job in this namespace by its ResourceQuota: what was learned from that."""

    message: str
    free: int
    """How many Jobs of ours have gone since: so many more may be tried before `until`."""
    until: datetime
    """From here on anyone may ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A snapshot of who has and who wants what, as one run's plan sees it."""

    caps: JobLimits = JobLimits()
    run: Demand
    """The run itself; what it wants is only known to its plan."""
    others: tuple[Demand, ...] = ()
    """The other runs that wait for a slot."""
    in_namespace: Mapping[str, int] = field(default_factory=dict)
    """Unfinished Jobs by namespace: of those in which anyone waits."""
    in_all: int = 0
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """By namespace."""
    needy: int | None = None
    """The Jobs of the run of this namespace that has fewest, of those to whose Job a quota refuses the pod.

    None: there is no such run but this one.
    """
    known: bool = True
    """Whether the Jobs that a process before this one has left are counted yet. Until then nothing is started."""

    @property
    def quota(self) -> Quota | None:
        """What is known of the quota of the run's own namespace."""
        return self.quotas.get(self.run.namespace)

    def admit(self, wants: int) -> Admission:
        """How many of the Jobs that the run wants it may start now, and what it is that holds the rest."""
        run = replace(self.run, wants=wants)
        if not self.known:
            return Admission(number=0)
        room = _Headroom(self)
        number = _share(room, (*self.others, run)).get(run.uid, 0)
        if self.needy is not None and number > max(0, self.needy - run.active):
            waits = (
                "a quota of the namespace refuses a pod to a run that has no more Jobs than this one: it comes first"
            )
            return Admission(number=max(0, self.needy - run.active), reason="QuotaExceeded", message=waits)
        if number == wants:
            return Admission(number=number)
        reason, message = room.full(run.namespace, run.active + number)
        return Admission(number=number, reason=reason, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a run may start now. With a reason: why not all that it wants."""

    number: int
    reason: str | None = None
    message: str = ""


def admissions(capacity: Capacity) -> dict[str, int]:
    """What each of those that wait would get now: of interest are those with more than 0."""
    return _share(_Headroom(capacity), capacity.others) if capacity.known else {}


class _Headroom:
    """What is left under the caps while slots are dealt out."""

    def __init__(self, capacity: Capacity) -> None:
        self._caps = capacity.caps
        self._quotas = capacity.quotas
        self._in_namespace = Counter(capacity.in_namespace)
        self._in_all = capacity.in_all
        self._dealt: Counter[str] = Counter()

    def take(self, namespace: str, active: int) -> bool:
        """A slot for a run of that namespace that has so many; False when there is none."""
        if self.full(namespace, active)[0] is not None:
            return False
        self._in_namespace[namespace] += 1
        self._in_all += 1
        self._dealt[namespace] += 1
        return True

    def full(self, namespace: str, active: int) -> tuple[str | None, str]:
        """Which limit keeps a run of that namespace with so many from one more, as reason and sentence.

        The sentence has no counts that move: it is part of the status, and a change of it is a write.
        """
        caps, quota = self._caps, self._quotas.get(namespace)
        if caps.per_run and active >= caps.per_run:
            return "JobLimitReached", f"the operator's limit of {caps.per_run} unfinished Jobs a run ({PER_RUN})"
        if caps.per_namespace and self._in_namespace[namespace] >= caps.per_namespace:
            return "JobLimitReached", (
                f"the operator's limit of {caps.per_namespace} unfinished Jobs in namespace {namespace} "
                f"({PER_NAMESPACE}), which its runs share"
            )
        if caps.in_all and self._in_all >= caps.in_all:
            return "JobLimitReached", (
                f"the operator's limit of {caps.in_all} unfinished Jobs in all ({IN_ALL}), which all runs share"
            )
        if quota is not None and self._dealt[namespace] >= quota.free:
            return "QuotaExceeded", quota.message
        return None, ""


def _share(room: _Headroom, loads: Iterable[Demand]) -> dict[str, int]:
    given: dict[str, int] = {}
    left = {load.uid: load for load in loads if load.wants > 0}
    heap = [(load.active, load.turn, load.uid) for load in left.values()]
    heapq.heapify(heap)
    while heap:
        active, turn, uid = heapq.heappop(heap)
        # What keeps a run from a slot keeps it for the rest of the deal: nothing is given back meanwhile.
        if room.take(left[uid].namespace, active):
            given[uid] = given.get(uid, 0) + 1
            if given[uid] < left[uid].wants:
                heapq.heappush(heap, (active + 1, turn, uid))
    return given
