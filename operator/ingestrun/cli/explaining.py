"""The answer to "why is nothing started now?", from the conditions that the operator's planner has written."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

from ingestrun.cli.runs import Run
from ingestrun.model.phase import Phase
from ingestrun.model.text import pluralize

_RUNS_ON: Final = "the run goes on by itself"
HINTS: Final[dict[str, str]] = {
    # Why there is no room (docs/capacity.md).
    "JobLimitReached": f"wait for other runs' Jobs to end, or raise the operator's limit; {_RUNS_ON}",
    "QuotaExceeded": f"raise the quota, or wait until it has room; {_RUNS_ON}",
    "Unschedulable": f"add nodes, or wait until there is room on one; {_RUNS_ON}",
    "NodeMismatch": "add or label a node that matches; or cancel, and correct podTemplate in a new run",
    "SchedulingGated": "take the scheduling gates off the pods; whoever has set them mostly does it",
    "JobNotStarted": "see to the cluster's Job controller (kube-controller-manager)",
    "WebhookUnavailable": f"repair the admission webhook, or delete its configuration; {_RUNS_ON}",
    # Whom it waits for (docs/lifecycle.md, docs/resume.md).
    "WaitingForDrain": "wait for that run's last pods, or end them: kubectl ingestrun cancel --terminate",
    "WaitingForReplaced": "wait for that run's last pods, or end them: kubectl ingestrun cancel --terminate",
    "WaitingForEnd": "wait for that run's end, or cancel it",
    "WaitingForDeletion": "wait until that run is deleted",
    "PredecessorHeld": "see to the run that is held: kubectl ingestrun explain on it",
    "Queued": "Kueue admits its Jobs when the queue has room; or unsuspend the Job that was suspended by hand",
    "Held": "deploy an operator that understands the run, or put its status right; a cancel is carried out",
    # What is wrong with its pods (docs/failures.md).
    "PodNotStarting": "put right what the message names; the pod then starts by itself",
    "PodStuckTerminating": "see to the node that the message names, or delete the Node",
    "Retrying": "the stage is tried again after its backoff; the message has the cause",
    "Suspended": "kubectl ingestrun unsuspend",
}
"""The remedy for each reason of a condition."""
NOT_SEEN: Final = "NotSeen"
CANCEL_PENDING: Final = "CancelPending"
SLOTS_IN_USE: Final = "ParallelismReached"
ALL_BEGUN: Final = "AllBatchesBegun"
FETCHING: Final = "WaitingForFetch"
NOTHING: Final = "Nothing"


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """The reason why nothing new is started, as one word and as a sentence, with the time since when, and a hint."""

    run: str
    namespace: str
    phase: str
    reason: str
    message: str
    since: datetime | None = None
    hint: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return it as data."""
        found = asdict(self) | {"since": self.since.isoformat().replace("+00:00", "Z") if self.since else None}
        return {key: value for key, value in found.items() if value not in (None, "")}


def explain(run: Run) -> Explanation:
    """Return why nothing new is started for a run now."""

    def because(reason: str, message: str, *, since: datetime | None = None, hint: str = "") -> Explanation:
        return Explanation(
            run=run.name,
            namespace=run.namespace,
            phase=run.phase,
            reason=reason,
            message=message,
            since=since,
            hint=hint or HINTS.get(reason, ""),
        )

    if run.ended:
        return because(run.reason, run.message or f"it has ended: {run.phase}", since=run.completed, hint=_next(run))
    if run.cancel_requested:
        return because(CANCEL_PENDING, "its cancel is stored, and not applied yet", hint=_SEE_TO_OPERATOR)
    observed = run.status.get("observedGeneration", -1)
    if run.phase == Phase.PENDING and not run.status.get("conditions"):
        return because(NOT_SEEN, "the operator has not seen the run yet", since=run.created, hint=_SEE_TO_OPERATOR)
    if run.holds("Backpressured"):
        held = run.condition("Backpressured")
        reason, message = str(held.get("reason")), str(held.get("message") or "")
        return because(reason, message or "there is no room", since=run.since("Backpressured"))
    if run.phase == Phase.SUSPENDED:
        return because("Suspended", "spec.suspend is set", since=run.since("Suspended"))
    reconciling = run.condition("Reconciling")
    reason, message = str(reconciling.get("reason") or run.phase), str(reconciling.get("message") or "")
    if reason in HINTS:
        return because(reason, message or reason)
    if observed < run.meta.get("generation", 0):
        return because(NOT_SEEN, "the operator has not seen the last change of its spec", hint=_SEE_TO_OPERATOR)
    return because(*_undisturbed(run))


_SEE_TO_OPERATOR: Final = "see whether the operator runs: kubectl -n ingestrun-system get pods"


def _undisturbed(run: Run) -> tuple[str, str]:
    """Return what a run waits for that nothing keeps from going on: its own stages."""
    claimed = run.indexes("claimed")
    in_flight = len(claimed - run.indexes("published") - run.indexes("failed") - run.indexes("replay"))
    words = f"{pluralize(in_flight, 'batch', 'batches')} in flight"
    parallelism = int(run.spec.get("parallelism") or 1)
    if run.total is not None and len(claimed) >= run.total:
        return ALL_BEGUN, f"every batch has begun; {words}"
    if run.batches.get("exhausted"):
        return ALL_BEGUN, f"the source has no more; {words}"
    if in_flight >= parallelism:
        return SLOTS_IN_USE, f"{words}, and spec.parallelism is {parallelism}"
    if in_flight:
        return FETCHING, f"{words}; the next begins with the cursor that the fetch before it returns"
    return NOTHING, "nothing holds it back: it starts its next batch now"


def _next(run: Run) -> str:
    """Return what can be done about an ended run."""
    if run.phase == Phase.SUCCEEDED and not run.indexes("failed"):
        return ""
    resumed = run.status.get("resumedBy")
    if resumed:
        return f"run {resumed.get('name')} goes on with its rest"
    return f"kubectl ingestrun resume {run.name}"
