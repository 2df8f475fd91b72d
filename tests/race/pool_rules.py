"""The promises of a pool, as rules of the checker: by the statuses that were stored, and by what the workers say."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from tests.race.history import Holder, RunHistory, Version, indexes
from tests.race.pool_workers import Commit, Told

Finding = tuple[str, str]


def nothing_is_granted_after_the_end(run: RunHistory) -> Iterator[Finding]:
    """No claim and no permission grows in an ended run, nor in the write that ends it."""
    for before, after in pairwise(run.ordered()):
        if not after.ended:
            continue
        claimed = indexes(after.counters.claimed) - indexes(before.counters.claimed)
        if claimed:
            yield "granted-after-end", f"{after.phase}, and batches {sorted(claimed)} are claimed"
        permitted = indexes(after.publishing) - indexes(before.publishing)
        if permitted:
            yield "granted-after-end", f"{after.phase}, and batches {sorted(permitted)} may be published"
        handed = {holder for holder in after.workers if holder.batch is not None} - set(before.workers)
        if handed:
            yield (
                "granted-after-end",
                f"{after.phase}, and {sorted(handed, key=str)} hold what they did not hold before",
            )


def workers_are_told_what_is_stored(run: RunHistory) -> Iterator[Finding]:
    """A claim or permission is stored, in a run that goes on, before its worker hears of it."""
    versions = [version for version in run.ordered() if not version.ended]
    for told in run.told:
        stored = next((version for version in versions if _grants(version, told)), None)
        what = f"worker {told.worker} was told of its {told.what}, attempt {told.attempt} at batch {told.batch}"
        if stored is None:
            yield "told-unstored", f"{what}: no status of the run that goes on has it"
        elif told.at * 1_000_000 < stored.received:
            early = stored.received / 1000 - told.at * 1000
            yield "told-unstored", f"{what}, {early:.1f} ms before it was asked to be stored"


def _grants(version: Version, told: Told) -> bool:
    holder = Holder(worker=told.worker, batch=told.batch, attempt=told.attempt)
    return holder in version.workers and (told.what == "claim" or told.batch in indexes(version.publishing))


def an_attempt_has_one_worker(run: RunHistory) -> Iterator[Finding]:
    """A batch is held by one worker at a time, and an attempt by one for good."""
    holder_of: dict[tuple[int, int], int] = {}
    for version in run.ordered():
        held = [holder for holder in version.workers if holder.batch is not None]
        if len({holder.batch for holder in held}) < len(held):
            yield "held-twice", f"at {version.resource_version}: {held}"
        for holder in held:
            attempt = (holder.batch or 0, holder.attempt)
            if holder_of.setdefault(attempt, holder.worker) != holder.worker:
                yield (
                    "held-twice",
                    f"attempt {holder.attempt} at batch {holder.batch}, of {holder_of[attempt]} and {holder.worker}",
                )


def commits_are_repeated_after_a_death_alone(run: RunHistory) -> Iterator[Finding]:
    """Two attempts commit a batch only if the first one's worker was dead before the second was claimed.

    It may have committed and died before its report; the sink takes the second one for the first, by its key.
    """
    for first, second in repeated_commits(run):
        dead = min(
            (pod.ended or pod.gone or 0 for pod in run.pods.values() if _is_pod_of(first, pod.stage, pod.batch)),
            default=0,
        )
        claimed = next((version.resource_version for version in run.ordered() if _holds(version, second)), 0)
        if not dead or not claimed or dead > claimed:
            yield (
                "published-twice",
                f"batch {first.batch} by attempt {first.attempt} of worker {first.worker}, which had not ended, "
                f"and by attempt {second.attempt} of worker {second.worker}",
            )
    told = {(each.batch, each.attempt, each.worker) for each in run.told if each.what == "permission"}
    for commit in run.commits:
        if (commit.batch, commit.attempt, commit.worker) not in told:
            yield "published-unasked", f"batch {commit.batch} by worker {commit.worker}, without a permission"


def _is_pod_of(commit: Commit, stage: str, number: int) -> bool:
    return stage == "worker" and number == commit.worker


def _holds(version: Version, commit: Commit) -> bool:
    return Holder(worker=commit.worker, batch=commit.batch, attempt=commit.attempt) in version.workers


def repeated_commits(run: RunHistory) -> Iterator[tuple[Commit, Commit]]:
    """The commits of batches that an earlier attempt has committed already, each with the earlier one."""
    by_batch: dict[int, list[Commit]] = {}
    for commit in run.commits:
        by_batch.setdefault(commit.batch, []).append(commit)
    for commits in by_batch.values():
        yield from pairwise(sorted(commits, key=lambda commit: commit.attempt))


def every_commit_is_told(run: RunHistory) -> Iterator[Finding]:
    """A batch that has landed is published, published after the end, or unknown; never told as not published."""
    end, drained = run.terminal, run.drained
    if end is None or drained is None or not run.pooled:
        return
    last = run.ordered()[-1]
    landed = {commit.batch for commit in run.commits}
    late, unknown = indexes(last.after_end), indexes(last.unknown)
    if late - landed:
        yield "published-invented", f"batches {sorted(late - landed)} count as published after the end; nobody did it"
    if end.phase != "Cancelled":
        return
    record = last.cancellation or {}
    missed = indexes(record.get("notPublished", ""))
    if missed & landed:
        yield "landed-denied", f"batches {sorted(missed & landed)} have landed, and are told as not published"
    # Of one that has failed it is not said whether it has landed: its workers died, the last of them with its word.
    lost = landed - indexes(end.counters.published) - indexes(end.counters.failed) - late - unknown - missed
    if lost:
        yield "landed-denied", f"batches {sorted(lost)} have landed, and are told nowhere"


def pool_state(version: Version) -> str:
    """Where a pool was in this version, for the summary."""
    if version.publishing:
        return "pool: a worker may publish"
    if any(holder.batch is not None for holder in version.workers):
        return "pool: a worker holds a batch"
    if version.counters.in_flight:
        return "pool: a batch waits for a worker"
    return "pool: workers without a batch" if version.workers else "pool: no worker"


RULES = (
    nothing_is_granted_after_the_end,
    workers_are_told_what_is_stored,
    an_attempt_has_one_worker,
    commits_are_repeated_after_a_death_alone,
    every_commit_is_told,
)
