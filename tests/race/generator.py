"""Random runs and what happens to them, from a seed: the same seed gives the same plan (not the same timing).

A run is small (1 to 4 batches, pods of at most a second), because what is hunted for are the gaps between two calls,
and those come with the number of runs, not with their length.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from ingestrun.model.spec import CancellationPolicy
from tests.race.pool_workers import BATCH_SECONDS, BATCHES, ROWS, pool_spec

Json = dict[str, Any]

QUIET_SECONDS: Final = 4.0
"""Longer than any retry or backpressure delay below: what would start after a cancel has started by then."""
FALLBACK_SECONDS: Final = (6.0, 12.0)
"""When a run is cancelled whose moment does not come, after its creation; one that ends before that, at its end."""
POOL_FALLBACK_SECONDS: Final = (12.0, 20.0)
"""The same for a pool, whose workers have to start before anything else comes."""
POLICIES: Final[tuple[str | None, ...]] = (None, *CancellationPolicy)
STORM_EVERY: Final = 3
LEASE_EVERY: Final = int(os.environ.get("LEASE_EVERY") or 12)
"""Every so many waves the operator takes part in the leader election; after a SIGKILL its successor waits 15 s."""


class Moment(StrEnum):
    """When the cancel is sent; most are something that an observer of the API server has just seen."""

    CREATION = "at creation"
    AT_ONCE = "before the first claim"
    CLAIMED = "at the first claim"
    JOB = "a Job created"
    PENDING = "a pod pending"
    RUNNING = "a pod running"
    ENDED = "a pod ended, the next stage due"
    LAST_PUBLISH = "the last publish running"
    LAST_ENDED = "the last publish ended"
    RETRY = "a Job failed, in backoff"
    BACKPRESSURED = "backpressured"
    SUSPENDED = "suspended"
    RANDOM = "at any time"
    STARTING = "a worker starting"
    HANDED = "a worker told of its claim"
    ASKED = "permission asked"
    GRANTED = "a worker told of its permission"
    COMMITTED = "a batch committed, not yet reported"
    LAST_COMMITTED = "the last batch committed"
    BACKOFF = "a batch failed, in backoff"
    WORKER_DIED = "a worker's Job failed"


STAGES: Final = ("fetch", "hook", "publish")
_WEIGHTS: Final = {
    Moment.CREATION: 3,
    Moment.AT_ONCE: 6,
    Moment.CLAIMED: 8,
    Moment.JOB: 12,
    Moment.PENDING: 10,
    Moment.RUNNING: 16,
    Moment.ENDED: 18,
    Moment.LAST_PUBLISH: 8,
    Moment.LAST_ENDED: 4,
    Moment.RETRY: 10,
    Moment.SUSPENDED: 6,
    Moment.RANDOM: 10,
}


_POOL_WEIGHTS: Final = {
    Moment.CREATION: 2,
    Moment.AT_ONCE: 6,
    Moment.CLAIMED: 10,
    Moment.STARTING: 6,
    Moment.HANDED: 14,
    Moment.ASKED: 18,
    Moment.GRANTED: 18,
    Moment.COMMITTED: 18,
    Moment.LAST_COMMITTED: 8,
    Moment.BACKOFF: 10,
    Moment.WORKER_DIED: 8,
    Moment.SUSPENDED: 6,
    Moment.RANDOM: 10,
}


class Mode(StrEnum):
    """Which runs there are: those whose workers claim batches, those with a Job for each stage, or half of each."""

    POOL = "pool"
    JOBS = "jobs"
    BOTH = "both"


@dataclass(frozen=True, kw_only=True)
class Signal:
    """What the observer reports of a run, and what a cancel may wait for; None matches any."""

    kind: str
    stage: str | None = None
    batch: int | None = None

    def matches(self, seen: Signal) -> bool:
        """Whether what was seen is what was waited for."""
        return self.kind == seen.kind and self.stage in (None, seen.stage) and self.batch in (None, seen.batch)


@dataclass(frozen=True, kw_only=True)
class CancelPlan:
    """One run's cancel. All delays are seconds."""

    moment: Moment
    signal: Signal | None
    """What to wait for; None: `delay` counts from the run's creation."""
    delay: float
    fallback: float
    reason: str
    policy: str | None
    repeats: tuple[float, ...]
    """When it is sent again, each after the one before; with another reason, which must change nothing."""
    clear_after: float | None
    """`cancel` is taken back so long after Cancelled was seen: which must change nothing."""
    clear_at_once: bool
    """`cancel` is taken back as soon as it was answered: the operator may or may not have seen it."""
    resume: bool
    """The same patch clears `suspend`."""
    kill: float | None
    """The operator is killed so long after the cancel is sent (before it, where negative), and started again."""
    down_seconds: float


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """One run, and its cancel."""

    name: str
    slot: int
    """Which of the wave's namespaces."""
    start: float
    """When it is created, in seconds from the wave's beginning."""
    mode: str
    pooled: bool
    spec: Json
    batches: int
    suspend_at: float | None
    cancel: CancelPlan


@dataclass(frozen=True, kw_only=True)
class Wave:
    """Runs that are there at the same time."""

    number: int
    slots: int
    quota_slots: tuple[int, ...]
    """Namespaces with room for a few Jobs alone."""
    quota: int
    lift_quota_at: float
    lease: bool
    """The operator takes part in the leader election: after a SIGKILL its successor waits for the lease."""
    runs: tuple[RunPlan, ...]


def waves(
    seed: int, runs: int, *, size: int, mode: Mode = Mode.BOTH, kill_share: float = 0.1, slots: int = 4
) -> list[Wave]:
    """`runs` runs in waves of about `size`.

    The operator is killed beside the cancels of `kill_share` of the runs, all in every third wave: in the others it
    is up, and what they hunt for is its own passes.
    """
    rng = random.Random(seed)
    count = max(1, -(-runs // size))
    sizes = [runs // count + (number < runs % count) for number in range(count)]
    stormy = [number for number in range(count) if number % STORM_EVERY == STORM_EVERY - 1] or [count - 1]
    weather = sum(sizes[number] for number in stormy)
    kills = round(runs * kill_share)
    made: list[Wave] = []
    for number in range(count):
        here = 0
        if number in stormy:
            here = round(kills * sizes[number] / weather)
            kills, weather = kills - here, weather - sizes[number]
        lease = number % LEASE_EVERY == LEASE_EVERY - 1
        seeded = random.Random(rng.random())
        made.append(_wave(seeded, number, sizes[number], mode=mode, kills=here, slots=slots, lease=lease))
    return made


def _wave(rng: random.Random, number: int, size: int, *, mode: Mode, kills: int, slots: int, lease: bool) -> Wave:
    quota_slot = slots - 1
    killed = set(rng.sample(range(size), kills))
    shares = {Mode.POOL: 1.0, Mode.JOBS: 0.0, Mode.BOTH: 0.5}
    runs = []
    for index in range(size):
        make = _pool_run if rng.random() < shares[mode] else _run
        slot, name = index % slots, f"w{number}-{index}"
        runs.append(make(rng, name, slot, quota=slot == quota_slot, kill=index in killed))
    return Wave(
        number=number,
        slots=slots,
        quota_slots=(quota_slot,),
        quota=rng.randint(2, 8),
        lift_quota_at=rng.uniform(5, 10),
        lease=lease,
        runs=tuple(runs),
    )


def _run(rng: random.Random, name: str, slot: int, *, quota: bool, kill: bool) -> RunPlan:
    mode = rng.choice(("chain", "partitions"))
    batches = rng.randint(1, 4)
    hooks = rng.choice((0, 1, 1, 2))
    annotations = {"run-seconds": rng.choice(("0", "0", "0.2", "0.5", "1"))}
    if rng.random() < 0.4:
        annotations["start-seconds"] = rng.choice(("0.1", "0.3", "1"))
    if mode == "chain":
        annotations["batches"] = str(batches)
    moment = _moment(rng, quota=quota, weights=_WEIGHTS)
    if moment is Moment.RETRY or rng.random() < 0.15:
        annotations["fail-attempts"] = rng.choice(("1", "1", "2"))
        annotations["fail-stage"] = rng.choice(STAGES if hooks else ("fetch", "publish"))
        if moment is not Moment.RETRY and rng.random() < 0.3:
            annotations["exit-code"] = "65"
    spec = run_spec(
        annotations,
        hooks=hooks,
        batches={"cursor": {}, "size": ROWS} if mode == "chain" else {"partitions": {"count": batches}},
        parallelism=rng.randint(1, 4),
        retries=2,
        onBatchFailure=rng.choice(("FailRun", "Continue")),
    )
    return RunPlan(
        name=name,
        slot=slot,
        start=rng.uniform(0, 6),
        mode=mode,
        pooled=False,
        spec=spec,
        batches=batches,
        suspend_at=rng.uniform(0, 2) if moment is Moment.SUSPENDED else None,
        cancel=_cancel(rng, name, moment, _signals(rng, batches=batches, hooks=hooks), kill=kill),
    )


def _pool_run(rng: random.Random, name: str, slot: int, *, quota: bool, kill: bool) -> RunPlan:
    mode = rng.choice(("chain", "partitions"))
    batches = rng.randint(1, 8)
    moment = _moment(rng, quota=quota, weights=_POOL_WEIGHTS)
    spec = pool_spec(
        workers=rng.randint(1, 4),
        batches={"cursor": {}, "size": ROWS} if mode == "chain" else {"partitions": {"count": batches}},
        retries=rng.choice((0, 2, 2, 5)),
        onBatchFailure=rng.choice(("FailRun", "Continue")),
    )
    told: Json = {BATCHES: str(batches), BATCH_SECONDS: rng.choice(("0", "0.05", "0.1", "0.3"))}
    if rng.random() < 0.4:
        told["simulate.ingestrun.dev/start-seconds"] = rng.choice(("0.1", "0.3", "1"))
    spec["podTemplate"]["annotations"] |= told
    if rng.random() < 0.2:
        spec["execution"]["maxBatchesPerWorker"] = rng.randint(1, 3)
    batch = rng.choice((None, 0, rng.randrange(batches)))
    signals = {
        Moment.STARTING: Signal(kind="pending", stage="worker"),
        Moment.HANDED: Signal(kind="claim", batch=batch),
        Moment.ASKED: Signal(kind="asked", batch=batch),
        Moment.GRANTED: Signal(kind="permission", batch=batch),
        Moment.COMMITTED: Signal(kind="committed", batch=batch),
        Moment.LAST_COMMITTED: Signal(kind="committed", batch=batches - 1),
        Moment.BACKOFF: Signal(kind="backoff"),
        Moment.WORKER_DIED: Signal(kind="failed", stage="worker"),
    }
    return RunPlan(
        name=name,
        slot=slot,
        start=rng.uniform(0, 6),
        mode=mode,
        pooled=True,
        spec=spec,
        batches=batches,
        suspend_at=rng.uniform(0, 2) if moment is Moment.SUSPENDED else None,
        cancel=_cancel(rng, name, moment, _COMMON_SIGNALS | signals, kill=kill, fallback=POOL_FALLBACK_SECONDS),
    )


def _moment(rng: random.Random, *, quota: bool, weights: Mapping[Moment, int]) -> Moment:
    if quota and rng.random() < 0.7:
        return Moment.BACKPRESSURED
    return rng.choices(list(weights), weights=list(weights.values()))[0]


_COMMON_SIGNALS: Final = {
    Moment.CLAIMED: Signal(kind="claimed"),
    Moment.BACKPRESSURED: Signal(kind="backpressured"),
    Moment.SUSPENDED: Signal(kind="suspended"),
}


def _signals(rng: random.Random, *, batches: int, hooks: int) -> dict[Moment, Signal]:
    stages: Sequence[str | None] = (None, *(STAGES if hooks else ("fetch", "publish")))
    stage, batch = rng.choice(stages), rng.choice((None, 0, rng.randrange(batches)))
    return {
        **_COMMON_SIGNALS,
        Moment.JOB: Signal(kind="job", stage=stage, batch=batch),
        Moment.PENDING: Signal(kind="pending", stage=stage, batch=batch),
        Moment.RUNNING: Signal(kind="running", stage=stage, batch=batch),
        Moment.ENDED: Signal(kind="ended", stage=stage, batch=batch),
        Moment.LAST_PUBLISH: Signal(kind="running", stage="publish", batch=batches - 1),
        Moment.LAST_ENDED: Signal(kind="ended", stage="publish", batch=batches - 1),
        Moment.RETRY: Signal(kind="failed"),
    }


def _cancel(
    rng: random.Random,
    name: str,
    moment: Moment,
    signals: Mapping[Moment, Signal],
    *,
    kill: bool,
    fallback: tuple[float, float] = FALLBACK_SECONDS,
) -> CancelPlan:
    # Half of them at the very moment, where the gap between two calls is; the rest anywhere in the next second.
    delay = rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.2), rng.uniform(0, 1)))
    if moment is Moment.AT_ONCE:
        delay = rng.uniform(0, 0.05)
    elif moment is Moment.RANDOM:
        delay = rng.uniform(0, 6)
    repeats = tuple(rng.uniform(0, 1) for _ in range(rng.randint(1, 3))) if rng.random() < 0.2 else ()
    clearing = rng.random()
    return CancelPlan(
        moment=moment,
        signal=signals.get(moment),
        delay=delay,
        fallback=rng.uniform(*fallback),
        reason=f"race {name}",
        policy=rng.choice(POLICIES),
        repeats=repeats,
        clear_after=rng.uniform(0, 1) if clearing < 0.1 else None,
        clear_at_once=clearing > 0.97 and moment is not Moment.CREATION,
        resume=moment is Moment.SUSPENDED and rng.random() < 0.4,
        kill=rng.choice((rng.uniform(-0.3, 0), rng.uniform(0, 0.05), rng.uniform(0, 0.5))) if kill else None,
        down_seconds=rng.choice((0.0, rng.uniform(0, 2))),
    )


def run_spec(annotations: Json, *, hooks: int = 1, **changes: Any) -> Json:
    """A run whose pods are played by KWOK, as the annotations say."""
    container = {"image": "example/worker:1"}
    spec: Json = {
        "fetch": container,
        "publish": container,
        "backoff": {"initialSeconds": 1, "maxSeconds": 2},
        "backpressure": {"retrySeconds": 1},
        "podTemplate": {
            "annotations": {f"simulate.ingestrun.dev/{key}": value for key, value in annotations.items()},
            "nodeSelector": {"ingestrun.dev/simulated": "true"},
            "tolerations": [{"key": "ingestrun.dev/simulated", "operator": "Exists"}],
        },
    }
    if hooks:
        spec["hooks"] = [{"name": f"check{index}", "container": container} for index in range(hooks)]
    spec.update(changes)
    return spec
