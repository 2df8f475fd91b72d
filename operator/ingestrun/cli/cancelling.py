"""The decisions of a cancel: what is asked of a run, and what is told about it afterwards. No call is made here."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Final

from ingestrun.cli.errors import ExitCode
from ingestrun.cli.output import box
from ingestrun.cli.runs import Json, Run
from ingestrun.model.names import RunKey
from ingestrun.model.phase import Phase
from ingestrun.model.text import pluralize

CANCELLED: Final = "cancelled"
REQUESTED: Final = "requested"
ERROR: Final = "error"
SKIPPED: Final = "skipped"
DRY_RUN: Final = "dry-run"
TERMINATE: Final = "Terminate"
_SHOWN_STATUS: Final = {
    CANCELLED: "CANCELLED",
    REQUESTED: "CANCEL REQUESTED",
    ERROR: "ERROR",
    SKIPPED: "SKIPPED",
    DRY_RUN: "DRY RUN",
}


@dataclass(frozen=True, kw_only=True)
class Wish:
    """The options of a cancel."""

    reason: str | None = None
    cascade: bool = False
    terminate: bool = False
    grace_seconds: int | None = None


def _policy_of(wish: Wish) -> Json:
    """Return the fields of `spec.cancellation` that say how started pods end; none where nothing is said."""
    grace = {"gracePeriodSeconds": wish.grace_seconds} if wish.grace_seconds is not None else {}
    return {"policy": TERMINATE, **grace} if wish.terminate else {}


def patch_of(run: Run, wish: Wish) -> Json | None:
    """Return the merge patch that asks for the cancel; None if it is asked for already, as far as it can still be.

    A request is never weakened, and the reason of an earlier one stays: so a cancel can be repeated by anybody.
    """
    policy = _policy_of(wish)
    if run.phase == Phase.CANCELLED:
        terminates = run.cancellation.get("policy") == TERMINATE
        return {"spec": {"cancellation": policy}} if policy and not terminates and not run.drained else None
    stored = run.spec.get("cancellation") or {}
    wanted: Json = {**policy, **({"cascade": True} if wish.cascade else {})}
    if wish.reason is not None and not (run.cancel_requested and stored.get("reason")):
        wanted["reason"] = wish.reason
    if run.cancel_requested:
        changed = {key: value for key, value in wanted.items() if stored.get(key) != value}
        return {"spec": {"cancellation": changed}} if changed else None
    return {"spec": {"cancel": True, **({"cancellation": wanted} if wanted else {})}}


def guarded(patch: Json, run: Run) -> Json:
    """Return the patch with a precondition: the run is as it was read."""
    return {**patch, "metadata": {"resourceVersion": run.resource_version}}


@dataclass(kw_only=True)
class Outcome:
    """The outcome of a cancel for one run, and for those below it."""

    key: RunKey
    status: str
    message: str
    code: ExitCode = ExitCode.OK
    cancelled_runs: list[str] = field(default_factory=list)
    reason: str | None = None
    cascade: bool = False
    in_flight: str = ""
    drained: str = ""
    complaint: str = ""
    """The text that is printed as an error."""

    def to_json(self) -> dict[str, Any]:
        """Return the fields of the JSON output."""
        found = {
            "status": self.status,
            "run": self.key.name,
            "namespace": self.key.namespace,
            "cancelled_runs": self.cancelled_runs,
            "message": self.message,
        }
        return found | ({"reason": self.reason} if self.reason else {})

    def summary(self, *, with_namespace: bool) -> str:
        """Return the boxed summary."""
        lines = [
            ("Run", str(self.key) if with_namespace else self.key.name),
            ("Status", _SHOWN_STATUS[self.status]),
            ("Cancelled", f"{len(self.cancelled_runs)} run(s)"),
            ("Message", self.message),
            ("Reason", self.reason or ""),
            ("In flight", self.in_flight),
            ("Drained", self.drained),
        ]
        return box(lines, items=("Cancelled runs", self.cancelled_runs) if self.cascade else None)


def failure(key: RunKey, text: str, code: ExitCode, *, sentence: str | None = None) -> Outcome:
    """Return the outcome of a cancel that is refused."""
    return Outcome(key=key, status=ERROR, message=sentence or text, code=code, complaint=text)


def outcome_of(
    before: Run, after: Run, wish: Wish, *, family: Collection[Run] = (), was: Iterable[RunKey] = ()
) -> Outcome:
    """Return what has become of a run whose cancel was asked for.

    `family` has the runs below it as they are now, `was` those of them that were active when the cancel was sent.
    """
    active = set(was)
    followed = [run.name for run in family if run.key in active and run.phase == Phase.CANCELLED]
    waiting = [run.name for run in family if run.key in active and not run.ended]
    cancelled = after.phase == Phase.CANCELLED
    names = [*([after.name] if cancelled and not before.ended else []), *followed]
    message = _message(before, after, names)
    if waiting:
        message += f"; not yet: {', '.join(waiting)}"
    return Outcome(
        key=after.key,
        status=CANCELLED if cancelled else REQUESTED,
        message=message,
        cancelled_runs=names,
        reason=after.cancellation.get("reason") or (after.spec.get("cancellation") or {}).get("reason"),
        cascade=wish.cascade,
        in_flight=_in_flight(after) if cancelled else "",
    )


def _message(before: Run, after: Run, names: Collection[str]) -> str:
    if after.phase != Phase.CANCELLED:
        return "The cancel is stored, and the operator has not applied it yet: it does so first of all when it runs"
    if not before.ended:
        return f"Cancelled {len(names)} run(s)"
    if names:
        return f"{after.name} was already Cancelled; cancelled {len(names)} run(s) below"
    if before.resource_version != after.resource_version and _terminates(after) and not _terminates(before):
        return f"{after.name} was already Cancelled; its pods are terminated now"
    by, at = after.cancellation.get("requestedBy"), after.cancellation.get("acceptedAt")
    return f"{after.name} is already Cancelled, since {at}{f', by {by}' if by else ''}"


def _terminates(run: Run) -> bool:
    """Tell whether started pods are terminated: by the status, or by a request that is still to be applied."""
    asked = (run.spec.get("cancellation") or {}).get("policy")
    return TERMINATE in (run.cancellation.get("policy"), asked)


def _in_flight(run: Run) -> str:
    """Return what becomes of the batches that were in flight at the cancel; empty if there were none."""
    number = run.cancellation.get("activeBatches") or 0
    if not number or run.drained:
        return ""
    if _terminates(run):
        return f"{pluralize(number, 'batch', 'batches')}, being terminated"
    return f"{pluralize(number, 'batch', 'batches')}, may finish (--terminate ends them)"


def drained_words(run: Run) -> str:
    """Return how a run's batches in flight have ended, or why they have not."""
    if not run.drained:
        condition = run.condition("Drained")
        return f"no: {condition.get('message') or condition.get('reason') or 'the operator has not told'}"
    parts = [
        f"{words}: batch {run.late(name)}"
        for name, words in (("published", "published late"), ("notPublished", "not published"), ("unknown", "unknown"))
        if run.late(name)
    ]
    return "; ".join(["yes", *parts])
