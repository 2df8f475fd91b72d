"""From a run's history to what is wrong with it: pure functions, no cluster.

Each rule is a promise of the design. tests/unit/race/test_checker.py shows each of them a history that breaks it.
Orders are those of storage: one etcd numbers everything that it stores, so the resourceVersions of a run, its Jobs and
its pods compare. Where a Job's own is not known the audit log's times decide, and what they leave open counts as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tests.race import pool_rules
from tests.race.history import JobCreate, RunHistory, Version, indexes

CREATED: Final = 201


@dataclass(frozen=True, kw_only=True)
class Violation:
    """A broken promise."""

    rule: str
    run: str
    detail: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.run}: {self.detail}"


Finding = tuple[str, str]


def check(run: RunHistory) -> list[Violation]:
    """All that is wrong with a run that should have ended and drained by now."""
    return [
        Violation(rule=rule, run=f"{run.namespace}/{run.name} ({run.moment})", detail=detail)
        for look in RULES
        for rule, detail in look(run)
    ]


def stored_after(job: JobCreate, end: Version, seen: int | None) -> bool | None:
    """Whether a Job was stored after a version of its run; None where nothing tells."""
    exact = job.resource_version if job.resource_version is not None else seen
    if exact is not None:
        return exact > end.resource_version
    if job.received > end.answered:
        return True
    if job.answered < end.received:
        return False
    return None


def no_job_after_the_end(run: RunHistory) -> Iterator[Finding]:
    """Promise 1; for the other two ends as well."""
    end = run.terminal
    if end is None:
        return
    for job in run.creates:
        # One that was not answered (its sender was killed) may be stored all the same; then a watch has shown it.
        if job.code != CREATED and job.name not in run.job_versions:
            continue
        after = stored_after(job, end, run.job_versions.get(job.name))
        if after is not False:
            lag = (job.answered - end.answered) / 1000
            how = "after" if after else "at the same time as, and nothing tells the order,"
            yield "job-after-end", f"Job {job.name} was stored {how} {end.phase} ({lag:+.1f} ms)"
    asked = {job.name for job in run.creates}
    for name, version in run.job_versions.items():
        if version > end.resource_version and name not in asked:
            yield "job-after-end", f"Job {name} appeared after {end.phase}, and no create of it is in the audit log"


def ended_once_and_for_good(run: RunHistory) -> Iterator[Finding]:
    """Promise 4."""
    versions = run.ordered()
    if not any(version.ended for version in versions):
        yield "not-ended", f"the last phase is {versions[-1].phase if versions else 'unknown'}"
    for before, after in pairwise(versions):
        if before.ended and after.phase != before.phase:
            yield "end-left", f"{before.phase} became {after.phase} at {after.resource_version}"


def a_cancel_is_obeyed_by_the_next_status_write(run: RunHistory) -> Iterator[Finding]:
    """Promises 4 and 5: whatever was planned before the cancel conflicts, whatever is planned after it sees it."""
    asked = False
    for before, version in pairwise([None, *run.ordered()]):
        if before is not None and before.ended:
            return
        if version is None:
            continue
        if version.status_write:
            if asked and version.phase != "Cancelled":
                yield "cancel-ignored", f"a status write after the cancel was stored says {version.phase}"
                return
            if not asked and version.phase == "Cancelled":
                yield "cancelled-unasked", "Cancelled, and nobody had asked for it"
        asked = version.cancel


def nothing_moves_after_the_end(run: RunHistory) -> Iterator[Finding]:
    """Promise 3: results that come late never move the run's counters; nor does the record of the cancel."""
    end = run.terminal
    if end is None:
        return
    versions = run.ordered()
    before = [version for version in versions if version.resource_version < end.resource_version]
    if end.phase == "Cancelled" and before and before[-1].counters != end.counters:
        yield "counters-moved", f"by the cancel itself: {before[-1].counters} became {end.counters}"
    for version in versions:
        if version.resource_version <= end.resource_version:
            continue
        if version.counters != end.counters:
            yield "counters-moved", f"after {end.phase}: {end.counters} became {version.counters}"
        if version.completed != end.completed:
            yield "completion-moved", f"{end.completed} became {version.completed}"
        frozen = ("reason", "requestedBy", "acceptedAt", "activeBatches")
        old, new = end.cancellation or {}, version.cancellation or {}
        moved = [key for key in frozen if old.get(key) != new.get(key)]
        if moved:
            yield "record-moved", f"cancellation.{moved[0]}: {old.get(moved[0])} became {new.get(moved[0])}"


def landed_batches(run: RunHistory) -> set[int]:
    """The batches of which a publish pod has succeeded, whatever became of its Job; in a pool, the committed ones."""
    if run.pooled:
        return {commit.batch for commit in run.commits}
    return {pod.batch for pod in run.pods.values() if pod.stage == "publish" and pod.succeeded}


def every_publish_is_accounted_for(run: RunHistory) -> Iterator[Finding]:
    """Promise 3, the other half: what was in flight is told apart, and told right."""
    end, drained = run.terminal, run.drained
    if end is None or drained is None:
        return
    counted, landed = indexes(end.counters.published), landed_batches(run)
    records = end.counters.records
    if records[2] != run.rows * len(counted):
        yield "records-wrong", f"{records[2]} records published in the {len(counted)} batches {sorted(counted)}"
    if records[0] != run.rows * len(indexes(end.counters.fetched) | end.unpublished):
        yield "records-wrong", f"{records[0]} records fetched in the batches {end.counters.fetched!r}"
    if counted - landed:
        yield "published-invented", f"batches {sorted(counted - landed)} count as published; none of their pods did it"
    if end.phase != "Cancelled":
        if landed - counted - end.counters.in_flight - indexes(end.counters.failed):
            yield "publish-lost", f"batches {sorted(landed - counted)} were published and are not counted"
        return
    record = run.ordered()[-1].cancellation or {}
    late, missed = indexes(record.get("published", "")), indexes(record.get("notPublished", ""))
    flight, unknown = end.counters.in_flight, indexes(record.get("unknown", "")) if run.pooled else set()
    if Counter([*late, *missed, *unknown]) != Counter(flight):
        told = f"published {sorted(late)}, not {sorted(missed)}, unknown {sorted(unknown)}"
        yield "flight-unaccounted", f"in flight {sorted(flight)}; {told}"
    if not run.pooled and landed - counted != late:
        yield (
            "late-publish-wrong",
            f"published after all: {sorted(landed - counted)} by their pods, {sorted(late)} by the record "
            f"(not published: {sorted(missed)})",
        )


def no_batch_is_published_twice(run: RunHistory) -> Iterator[Finding]:
    """Nor is any Job created twice."""
    published = Counter(pod.batch for pod in run.pods.values() if pod.stage == "publish" and pod.succeeded)
    for batch, times in published.items():
        if times > 1:
            yield "published-twice", f"batch {batch} by {times} pods"
    names = Counter(job.name for job in run.creates if job.code == CREATED)
    for name, times in names.items():
        if times > 1:
            yield "job-twice", f"{name} was created {times} times"


def jobs_are_claimed_first(run: RunHistory) -> Iterator[Finding]:
    """A batch is claimed in the status before its Job is asked for; a pool's worker has its entry there."""
    versions = run.ordered()
    for job in run.creates:
        known = [version for version in versions if version.answered <= job.received][-1:]
        if job.stage == "worker":
            if not any(holder.worker == job.batch for version in known for holder in version.workers):
                yield "unclaimed-job", f"{job.name} was asked for before worker {job.batch} was in the status"
        elif not any(job.batch in indexes(version.counters.claimed) for version in known):
            yield "unclaimed-job", f"{job.name} was asked for before batch {job.batch} was claimed"


def the_record_is_right(run: RunHistory) -> Iterator[Finding]:
    """Promise 7: who, when, why; and the conditions that `kubectl wait` and Flux read."""
    end = run.terminal
    if end is None:
        return
    expected = {
        "Succeeded": {"Succeeded": "True", "Finished": "True", "Reconciling": "False"},
        "Failed": {"Succeeded": "False", "Finished": "True", "Stalled": "True"},
        "Cancelled": {
            "Succeeded": "False",
            "Finished": "True",
            "Cancelled": "True",
            "Reconciling": "False",
            "Stalled": "True",
        },
    }[end.phase or ""]
    for kind, status in expected.items():
        if end.condition(kind)[0] != status:
            yield "condition-wrong", f"{end.phase} with {kind}={end.condition(kind)[0] or 'unset'}"
    if end.condition("Backpressured")[0] == "True":
        yield "condition-wrong", f"{end.phase} with Backpressured=True"
    if not end.completed:
        yield "record-wrong", f"{end.phase} without completionTime"
    if end.phase != "Cancelled":
        if end.cancellation is not None:
            yield "record-wrong", f"{end.phase} with a cancellation"
        return
    record = end.cancellation or {}
    before = [version for version in run.ordered() if version.resource_version < end.resource_version]
    asked_reason = before[-1].reason if before else None
    if record.get("reason") != asked_reason:
        yield "record-wrong", f"the reason is {record.get('reason')!r}, {asked_reason!r} was given"
    if record.get("activeBatches", 0) != len(end.counters.in_flight):
        yield "record-wrong", f"activeBatches is {record.get('inFlight')}, of {sorted(end.counters.in_flight)}"
    if not record.get("acceptedAt"):
        yield "record-wrong", "no acceptedAt"
    if not record.get("requestedBy"):
        yield "record-wrong", "no requestedBy"
    if end.observed_generation > end.generation:
        yield "record-wrong", f"observedGeneration {end.observed_generation} of generation {end.generation}"


def drained_means_drained(run: RunHistory) -> Iterator[Finding]:
    """`Drained` comes, once no pod runs, and stays."""
    end, drained = run.terminal, run.drained
    if end is None:
        return
    if drained is None:
        yield "not-drained", f"{end.phase}, and never Drained"
        return
    last = run.ordered()[-1]
    if last.condition("Drained")[0] != "True" or last.condition("Reconciling")[0] == "True":
        yield "condition-wrong", f"in the end Drained={last.condition('Drained')}, {last.condition('Reconciling')}"
    if end.phase == "Cancelled" and not (drained.cancellation or {}).get("drainedAt"):
        yield "record-wrong", "Drained without drainedAt"
    for pod in run.pods.values():
        over = pod.ended or pod.gone
        if pod.started is not None and (over is None or over > drained.resource_version):
            yield "drained-early", f"pod {pod.name} ended after Drained"


def drain_lets_started_pods_finish(run: RunHistory) -> Iterator[Finding]:
    """Promise 3: soft by default. A pod that was running when Cancelled was stored is not told to end."""
    end = run.terminal
    if end is None or end.phase != "Cancelled" or any(version.terminate for version in run.ordered()):
        return
    for pod in run.pods.values():
        if pod.started is not None and pod.started < end.resource_version and pod.deleting is not None:
            yield "drain-killed", f"pod {pod.name} was running at Cancelled, and its Job was deleted"


Rule = Callable[[RunHistory], Iterator[Finding]]
RULES: Final[tuple[Rule, ...]] = (
    no_job_after_the_end,
    ended_once_and_for_good,
    a_cancel_is_obeyed_by_the_next_status_write,
    nothing_moves_after_the_end,
    every_publish_is_accounted_for,
    no_batch_is_published_twice,
    jobs_are_claimed_first,
    the_record_is_right,
    drained_means_drained,
    drain_lets_started_pods_finish,
    *pool_rules.RULES,
)


def state_at_cancel(run: RunHistory) -> str:
    """Where the run was when it became Cancelled, for the summary."""
    end = run.terminal
    if end is None or end.phase != "Cancelled":
        return f"ended first: {end.phase if end else 'not ended'}"
    before = [version for version in run.ordered() if version.resource_version < end.resource_version]
    last = before[-1]
    if last.condition("Backpressured")[0] == "True":
        return "backpressured"
    if last.phase == "Suspended":
        return "suspended"
    if not last.counters.claimed:
        return "before the first claim"
    if run.pooled:
        return pool_rules.pool_state(last)
    at = end.resource_version
    pods = [pod for pod in run.pods.values() if pod.created < at and not (pod.gone and pod.gone < at)]
    running = {pod.stage for pod in pods if pod.started and pod.started < at and not (pod.ended and pod.ended < at)}
    for stage in ("publish", "hook", "fetch"):
        if stage in running:
            return f"{stage} running"
    if any(not (pod.started and pod.started < at) and not (pod.ended and pod.ended < at) for pod in pods):
        return "pods pending"
    if any(pod.ended and pod.ended < at and not pod.succeeded for pod in pods):
        return "retry backoff"
    return "between two stages" if pods else "claimed, no pod yet"


def latency_ms(run: RunHistory) -> float | None:
    """From the answer to the cancel to the answer to the write of Cancelled; may be negative by a hair."""
    end, asked = run.terminal, run.requested
    if end is None or asked is None or end.phase != "Cancelled":
        return None
    return (end.answered - asked.answered) / 1000


def jobs_between(run: RunHistory) -> int:
    """Jobs that were asked for after the cancel was answered, before Cancelled was stored."""
    end, asked = run.terminal, run.requested
    if end is None or asked is None:
        return 0
    return sum(1 for job in run.creates if job.code == CREATED and asked.answered < job.received < end.received)


def started_after(run: RunHistory) -> int:
    """Pods that were pending at Cancelled and started all the same, before their deletion had reached them."""
    end = run.terminal
    if end is None or end.phase != "Cancelled":
        return 0
    return sum(1 for pod in run.pods.values() if pod.started is not None and pod.started > end.resource_version)
