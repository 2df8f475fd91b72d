"""The number of unfinished Jobs by run, by namespace and in all, and the runs that wait for room for one more.

It is kept incrementally: an event costs a few additions, a run a few numbers. Other runs are planned between a plan and
the answers to its creates, so what a plan starts is reserved together with the plan, and the limits hold exactly
however passes interleave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from ingestrun.kube.protocol import RunKey
from ingestrun.planner.run.fair_sharing import Capacity, Demand, JobLimits, Quota, admissions

PRESSED_FOR: Final = timedelta(minutes=10)
"""Time after a pod's refusal by a quota that counts ended pods, for which what has ended in its namespace is given back
at once. Without a memory of it each stage would be refused once more."""


@dataclass(slots=True)
class _Run:
    namespace: str
    active: int = 0
    reserved: set[str] = field(default_factory=set)
    """Names of Jobs whose creates are under way, or got no answer."""
    doubtful: set[str] = field(default_factory=set)
    """Names of Jobs whose creates got no answer, so that they may exist. A live list decides."""
    turn: int = 0

    @property
    def load(self) -> int:
        """Return its Jobs as a limit counts them."""
        return self.active + len(self.reserved)


@dataclass(slots=True, kw_only=True)
class _Refused:
    message: str
    jobs: int
    """The operator's Jobs in the namespace, finished ones too, when its quota refused one."""
    until: datetime


class Usage:
    """The count of Jobs that one process keeps. Not thread-safe: everything happens on one event loop."""

    def __init__(self, limits: JobLimits, *, wake: Callable[[RunKey], None]) -> None:
        """Call `wake` with each run that waits and may start something now."""
        self.limits = limits
        self._wake = wake
        self._known = True
        self._runs: dict[str, _Run] = {}
        self._in_namespace: Counter[str] = Counter()
        self._in_all = 0
        self._jobs: Counter[str] = Counter()
        self._under_way: Counter[str] = Counter()
        self._needing: set[str] = set()
        self._waiting: dict[str, tuple[RunKey, int]] = {}
        self._refused: dict[str, _Refused] = {}
        self._pods_counted: dict[str, datetime] = {}
        self._without_pod: dict[str, int] = {}
        self._starved: set[str] = set()
        self.holders: Callable[[str], Iterable[RunKey]] = lambda _: ()
        """Function that returns the runs of a namespace that still have Jobs; the cache sets it."""
        self._turns = 0

    # ---- what the cache reports

    def adjust(self, run_uid: str, namespace: str, *, active: int, jobs: int) -> None:
        """Add to the unfinished Jobs of a run, and to the Jobs of any kind; both may be negative."""
        run = self._run(run_uid, namespace)
        run.active += active
        self._add(namespace, active)
        self._jobs[namespace] += jobs
        self._tidy(run_uid)
        if active < 0 or jobs < 0:
            self._tell()

    def job_exists(self, run_uid: str, name: str) -> None:
        """Count the Job of that name as itself from now on, because it exists."""
        self._unreserve(run_uid, {name})

    def jobs_listed(self, run_uid: str) -> None:
        """Free what unanswered creates reserved: after a live list their Jobs are counted, or do not exist."""
        run = self._runs.get(run_uid)
        if run is not None and run.doubtful:
            self._unreserve(run_uid, run.doubtful)

    def forget(self, run_uid: str) -> None:
        """Drop a run that is gone, or needs nothing more; its Jobs have been taken off before."""
        self._waiting.pop(run_uid, None)
        self._needing.discard(run_uid)
        self._without_pod.pop(run_uid, None)
        run = self._runs.get(run_uid)
        if run is not None:
            self._unreserve(run_uid, run.reserved)
            self._tidy(run_uid)
        self._tell()

    # ---- what a pass asks and reports

    def snapshot(self, run_uid: str, namespace: str, *, now: datetime) -> Capacity:
        """Return what the plan of this run may count on. Nothing may be awaited between this and `reserve`."""
        for place in [place for place, refused in self._refused.items() if now >= refused.until]:
            del self._refused[place]
        run = self._runs.get(run_uid) or _Run(namespace)
        return replace(
            self._capacity(exclude=run_uid),
            run=Demand(uid=run_uid, namespace=namespace, active=run.load, turn=run.turn or self._turns + 1),
            in_namespace={**self._places(exclude=run_uid), namespace: self._in_namespace[namespace]},
            fewest_jobs_without_pod=self._needy(run_uid, namespace),
            pods_counted=self._pods_counted.get(namespace, now) > now,
            starved=self.is_starved(namespace),
        )

    def reserve(self, key: RunKey, run_uid: str, names: Iterable[str], *, unmet_demand: int) -> None:
        """Reserve the Jobs that a plan starts, and note how many more it would start if it were allowed to."""
        started = set(names)
        if started or unmet_demand:
            run = self._run(run_uid, key.namespace)
            new = started - run.reserved
            run.reserved |= new
            self._under_way[key.namespace] += len(new)
            self._add(key.namespace, len(new))
            if new or run_uid not in self._waiting:
                self._turns += 1
                run.turn = self._turns
        if unmet_demand:
            self._waiting[run_uid] = (key, unmet_demand)
        else:
            self.withdraw(run_uid)

    def release(self, run_uid: str) -> None:
        """Free what the pass has reserved and not created, because it is over."""
        run = self._runs.get(run_uid)
        if run is not None and run.reserved - run.doubtful:
            self._unreserve(run_uid, run.reserved - run.doubtful)

    def mark_unanswered(self, run_uid: str, name: str) -> None:
        """Keep this Job reserved until the run's Jobs are listed, because its create got no answer."""
        run = self._runs.get(run_uid)
        if run is not None and name in run.reserved:
            run.doubtful.add(name)

    def withdraw(self, run_uid: str) -> None:
        """Withdraw the run's demand until it reconciles successfully."""
        if self._waiting.pop(run_uid, None) is not None:
            self._tidy(run_uid)
            self._tell()

    def quota_refused(self, namespace: str, message: str, *, until: datetime) -> None:
        """Note that a quota of the namespace has refused a Job, so that there is room only once a Job is gone."""
        new = namespace not in self._refused
        self._refused[namespace] = _Refused(message=message, jobs=self._jobs[namespace], until=until)
        self._ask_holders(namespace, new=new)

    def job_admitted(self, namespace: str) -> None:
        """Forget a quota's refusal once more Jobs were accepted than there were when it refused one."""
        refused = self._refused.get(namespace)
        if refused is not None and self._jobs[namespace] > refused.jobs:
            del self._refused[namespace]
            self._tell()

    def is_starved(self, namespace: str) -> bool:
        """Tell whether a quota that counts what has ended refuses a Job or pod, and nothing runs to make room."""
        unfinished = self._in_namespace[namespace]
        without_pod = sum(
            number
            for uid, number in self._without_pod.items()
            if uid in self._runs and self._runs[uid].namespace == namespace
        )
        refused = self._refused.get(namespace)
        no_job = refused is not None and not unfinished and not self._free(namespace, refused)
        return no_job or (without_pod > 0 and unfinished <= without_pod)

    def set_pods_counted(self, run_uid: str, namespace: str, *, refused: int, now: datetime) -> None:
        """Note to how many of the run's Jobs a quota refuses the pod that counts pods which have ended."""
        if not refused:
            self._without_pod.pop(run_uid, None)
            return
        self._run(run_uid, namespace)
        self._without_pod[run_uid] = refused
        new = self._pods_counted.get(namespace, now) <= now
        self._pods_counted[namespace] = now + PRESSED_FOR
        self._ask_holders(namespace, new=new)

    def set_pods_refused(self, run_uid: str, namespace: str, *, refused: bool) -> None:
        """Note whether a quota refuses a pod to one of the run's Jobs."""
        if refused:
            self._run(run_uid, namespace)
            self._needing.add(run_uid)
        elif run_uid in self._needing:
            self._needing.remove(run_uid)
            self._tidy(run_uid)
            self._tell()

    def start_sync(self) -> None:
        """Let nothing start under a limit until `finish_sync`: the Jobs of earlier processes are not counted."""
        self._known = not self.limits.any

    def finish_sync(self) -> None:
        """Note that the Jobs of earlier processes are counted."""
        if not self._known:
            self._known = True
            self._tell()

    @property
    def synced(self) -> bool:
        """Tell whether all Jobs that there are have been counted."""
        return self._known

    # ---- inside

    def _run(self, run_uid: str, namespace: str) -> _Run:
        return self._runs.setdefault(run_uid, _Run(namespace))

    def _tidy(self, run_uid: str) -> None:
        run = self._runs.get(run_uid)
        if run is not None and not (run.load or run_uid in self._needing or run_uid in self._waiting):
            del self._runs[run_uid]

    def _add(self, namespace: str, number: int) -> None:
        self._in_namespace[namespace] += number
        self._in_all += number

    def _unreserve(self, run_uid: str, names: Iterable[str]) -> None:
        run = self._runs.get(run_uid)
        gone = set(names) & run.reserved if run is not None else set()
        if run is None or not gone:
            return
        run.reserved -= gone
        run.doubtful -= gone
        self._under_way[run.namespace] -= len(gone)
        self._add(run.namespace, -len(gone))
        self._tidy(run_uid)
        self._tell()

    def _capacity(self, *, exclude: str | None = None) -> Capacity:
        others = []
        for uid, (key, wants) in self._waiting.items():
            if uid != exclude:
                run = self._runs.get(uid) or _Run(key.namespace)
                others.append(Demand(uid=uid, namespace=key.namespace, active=run.load, wants=wants, turn=run.turn))
        return Capacity(
            caps=self.limits,
            run=Demand(uid="", namespace=""),
            others=tuple(others),
            in_namespace=self._places(exclude=exclude),
            in_all=self._in_all,
            quotas={
                place: Quota(message=refused.message, free=self._free(place, refused), until=refused.until)
                for place, refused in self._refused.items()
            },
            synced=self._known,
        )

    def _places(self, *, exclude: str | None) -> dict[str, int]:
        places = {key.namespace for uid, (key, _) in self._waiting.items() if uid != exclude}
        return {place: self._in_namespace[place] for place in places}

    def _free(self, namespace: str, refused: _Refused) -> int:
        return max(0, refused.jobs - self._jobs[namespace] - self._under_way[namespace])

    def _needy(self, run_uid: str, namespace: str) -> int | None:
        others = (self._runs[uid] for uid in self._needing if uid != run_uid)
        return min((run.load for run in others if run.namespace == namespace), default=None)

    def _ask_holders(self, namespace: str, *, new: bool) -> None:
        """Wake the runs that may give something back, if the namespace has just become short of room, or starved."""
        starved = self.is_starved(namespace)
        if new or (starved and namespace not in self._starved):
            for key in self.holders(namespace):
                self._wake(key)
        if starved:
            self._starved.add(namespace)
        else:
            self._starved.discard(namespace)

    def _tell(self) -> None:
        """Wake the runs that would get a slot now. A needless wake-up is harmless: the plan stays the same."""
        if self._waiting:
            for uid in admissions(self._capacity()):
                self._wake(self._waiting[uid][0])
