"""The operator's own limits on unfinished Jobs, and the sharing of the slots left under them: pure, from a snapshot.

Max-min fairness, slot by slot: each slot goes to the run that has the fewest unfinished Jobs of all that want one and
that the limits allow one; among equals, to the run that got one longest ago. So a run never starts a Job while
another that could use the slot has fewer, and no slot is left idle while a run could use it.
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
    """Limits on the number of unfinished Jobs; 0: no limit. Clean-ups after a cancel are not limited."""

    per_run: int = 0
    per_namespace: int = 0
    in_all: int = 0

    @property
    def any(self) -> bool:
        """Tell whether there is a limit at all."""
        return bool(self.per_run or self.per_namespace or self.in_all)


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Number of Jobs that one run has, and of further Jobs that it could start now if it were allowed to."""

    uid: str
    namespace: str
    active: int = 0
    """Its unfinished Jobs, and those whose create is under way."""
    wants: int = 0
    turn: int = 0
    """Order in which runs last got a slot or began to wait; lower is longer ago."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """State of a namespace's ResourceQuota since it refused a Job."""

    message: str
    free: int
    """Number of the operator's Jobs that have gone since, and that may therefore be tried before `until`."""
    until: datetime
    """Time from which any run may try again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capacity:
    """A snapshot of the Jobs that each run has and wants, from the view of one run's plan."""

    caps: JobLimits = JobLimits()
    run: Demand
    """The run itself; only its plan knows its demand."""
    others: tuple[Demand, ...] = ()
    """The other runs that wait for a slot."""
    in_namespace: Mapping[str, int] = field(default_factory=dict)
    """Unfinished Jobs of each namespace in which a run waits."""
    in_all: int = 0
    quotas: Mapping[str, Quota] = field(default_factory=dict)
    """Quotas by namespace."""
    fewest_jobs_without_pod: int | None = None
    """The Jobs of that run which has fewest, among the namespace's other runs to whose Job a quota refuses the pod.

    None: there is no such run.
    """
    pods_counted: bool = False
    """True if a quota of the run's namespace that counts ended pods has refused a pod lately."""
    starved: bool = False
    """True if a quota that counts what has ended refuses a Job or a pod in the namespace, and nothing runs there whose
    end would make room."""
    synced: bool = True
    """True once the Jobs that an earlier process has left are counted. Until then no Job is started."""

    @property
    def quota(self) -> Quota | None:
        """Return the known state of the quota of the run's own namespace."""
        return self.quotas.get(self.run.namespace)

    @property
    def pressed(self) -> bool:
        """Tell whether what has ended is to be given back now, because a quota of the namespace counts it."""
        return self.pods_counted or self.quota is not None

    def admit(self, wants: int) -> Admission:
        """Return how many of the Jobs that the run wants it may start now, and what prevents the rest."""
        if not self.synced:
            return Admission(number=0)
        run = replace(self.run, wants=wants)
        headroom = _Headroom(self)
        number = _share(headroom, (*self.others, run)).get(run.uid, 0)
        fewest = self.fewest_jobs_without_pod
        if fewest is not None and number > max(0, fewest - run.active):
            message = (
                "a quota of the namespace refuses a pod to a run that has no more Jobs than this one: it comes first"
            )
            return Admission(number=max(0, fewest - run.active), reason="QuotaExceeded", message=message)
        if number == wants:
            return Admission(number=number)
        reason, message = headroom.limit_for(run.namespace, run.active + number)
        return Admission(number=number, reason=reason, message=message)


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """Number of Jobs that a run may start now, with the reason if that is less than it wants."""

    number: int
    reason: str | None = None
    message: str = ""


def admissions(capacity: Capacity) -> dict[str, int]:
    """Return how many Jobs each waiting run would be admitted now, without those that would get none."""
    return _share(_Headroom(capacity), capacity.others) if capacity.synced else {}


def ought_to_yield(capacity: Capacity, *, active: int) -> bool:
    """Tell whether a run with so many Jobs, which may go on for hours, should give one up for a run that has fewer.

    Only for one that had fewer even afterwards, so that no slot goes to and fro between two runs.
    """
    run = replace(capacity.run, active=active - 1, wants=1, turn=-1)
    places = {**capacity.in_namespace, run.namespace: capacity.in_namespace.get(run.namespace, 0) - 1}
    freed = replace(capacity, run=run, in_namespace=places, in_all=capacity.in_all - 1)
    others = [demand for demand in capacity.others if demand.active < run.active]
    if not capacity.synced or not others or not capacity.caps.any:
        return False
    return bool(_share(_Headroom(freed), others))


class _Headroom:
    """Room left under the limits while slots are given out."""

    def __init__(self, capacity: Capacity) -> None:
        self._caps = capacity.caps
        self._quotas = capacity.quotas
        self._in_namespace = Counter(capacity.in_namespace)
        self._in_all = capacity.in_all
        self._given: Counter[str] = Counter()

    def take(self, namespace: str, active: int) -> bool:
        """Take a slot for a run of that namespace with that many Jobs; return False if there is none."""
        if self.limit_for(namespace, active)[0] is not None:
            return False
        self._in_namespace[namespace] += 1
        self._in_all += 1
        self._given[namespace] += 1
        return True

    def limit_for(self, namespace: str, active: int) -> tuple[str | None, str]:
        """Return which limit prevents one more Job for a run of that namespace with that many, as reason and message.

        The message has no counts that change, because it is part of the status, and a change of it is a write.
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
        if quota is not None and self._given[namespace] >= quota.free:
            return "QuotaExceeded", quota.message
        return None, ""


def _share(headroom: _Headroom, demands: Iterable[Demand]) -> dict[str, int]:
    """Give out slots one by one; return how many each run gets."""
    given: dict[str, int] = {}
    left = {demand.uid: demand for demand in demands if demand.wants > 0}
    heap = [(demand.active, demand.turn, demand.uid) for demand in left.values()]
    heapq.heapify(heap)
    while heap:
        active, turn, uid = heapq.heappop(heap)
        # Limits only tighten during one round, so a run refused once is out of this round.
        if headroom.take(left[uid].namespace, active):
            given[uid] = given.get(uid, 0) + 1
            if given[uid] < left[uid].wants:
                heapq.heappush(heap, (active + 1, turn, uid))
    return given
