"""`cancel`: by name, by label, all, or what stands still."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Final

from ingestrun.cli.arguments import (
    Parser,
    Selection,
    add_cluster_flags,
    add_dry_run_flag,
    add_output_flag,
    add_selection,
    selection_of,
)
from ingestrun.cli.cancelling import (
    CANCELLED,
    DRY_RUN,
    ERROR,
    REQUESTED,
    SKIPPED,
    Outcome,
    Wish,
    drained_words,
    failure,
    guarded,
    outcome_of,
    patch_of,
)
from ingestrun.cli.durations import human_duration, parse_duration
from ingestrun.cli.errors import CliError, ConflictError, ExitCode, ServerError, UsageError, gravest
from ingestrun.cli.follow import Follower
from ingestrun.cli.runs import Run, descendants
from ingestrun.cli.session import Session, side_by_side
from ingestrun.cli.stale import may_be_stale, stands_still
from ingestrun.model.lineage import cancelled_with_cascade
from ingestrun.model.names import LABEL_RUN_UID, RunKey
from ingestrun.model.phase import Phase

SETTLE_SECONDS: Final = 5.0
"""Time for which the operator is waited for, also without --wait, so that a cancel can be told as done."""
MAX_TRIES: Final = 5
"""Number of times that a run which changes all the time is judged before its cancel is given up."""
WAITS: Final = ("cancelled", "drained")


def parser() -> Parser:
    """Return the parser."""
    made = Parser(
        "cancel",
        usage="(NAME... | -l LABELS | --all | --stale DURATION) [flags]",
        description="Cancel runs. From then on nothing is started for them; pods that have started may finish.\n"
        "It goes on after a failure, and can be repeated: a run that is Cancelled already stays as it is.",
        examples="""
kubectl ingestrun cancel flights --reason "wrong source"
kubectl ingestrun cancel flights --cascade --wait=drained
kubectl ingestrun cancel -l team=geo --dry-run
kubectl ingestrun cancel --stale 10m -A
""",
    )
    add_selection(made, "cancel")
    made.add_argument(
        "--stale",
        metavar="DURATION",
        type=parse_duration,
        help="cancel the Pending and Running runs that have made no progress for so long, by the server's clock",
    )
    add_cancel_flags(made)
    return made


def add_cancel_flags(made: Parser) -> None:
    """Add the flags that `cancel` and `cleanup` share."""
    made.add_argument("--reason", metavar="TEXT", help="why; shown in the status, the Event and the operator's log")
    made.add_argument("--cascade", action="store_true", help="cancel the runs below, too")
    made.add_argument("--terminate", action="store_true", help="end the pods that have started (SIGTERM)")
    made.add_argument(
        "--grace-period", type=int, metavar="SECONDS", help="with --terminate: seconds from SIGTERM to SIGKILL"
    )
    made.add_argument(
        "--wait",
        choices=WAITS,
        metavar="STATE",
        help="wait until the run is cancelled (also without a value) or drained: its last pod has ended",
    )
    made.add_argument(
        "--timeout",
        type=parse_duration,
        default=parse_duration("5m"),
        metavar="DURATION",
        help="how long --wait waits (default: 5m)",
    )
    add_dry_run_flag(made)
    add_output_flag(made, "json", "yaml", "name")
    add_cluster_flags(made, all_namespaces=True)


def run(session: Session) -> ExitCode:
    """Cancel, print a summary for each run, and return the gravest of the runs' exit codes."""
    options = session.options
    selection = selection_of(options, other=options.stale is not None)
    return cancel_selected(session, selection, stale=options.stale)


def wish_of(options: Namespace) -> Wish:
    """Return the options of the cancel. Raises UsageError."""
    if options.grace_period is not None and not options.terminate:
        raise UsageError("--grace-period goes together with --terminate")
    if options.reason is not None and not 1 <= len(options.reason) <= 512:
        raise UsageError("--reason has 1 to 512 characters")
    return Wish(
        reason=options.reason,
        cascade=options.cascade,
        terminate=options.terminate,
        grace_seconds=options.grace_period,
    )


@dataclass(kw_only=True)
class Target:
    """A run to cancel, and what has become of it so far."""

    key: RunKey
    wish: Wish
    before: Run | None = None
    family: tuple[RunKey, ...] = ()
    """The active runs below it when the cancel was sent."""
    after: Run | None = None
    outcome: Outcome | None = None
    below: list[Target] = field(default_factory=list)
    """The runs below it that are cancelled one by one, because it was Cancelled alone."""


def cancel_selected(session: Session, selection: Selection, *, stale: timedelta | None = None) -> ExitCode:
    """Cancel the selected runs, print what has become of each, and return the gravest of their exit codes."""
    canceller = Canceller(session, stale=stale)
    targets = canceller.targets(selection)
    if not targets and not selection.names:
        session.complain_of_none("stale " if stale is not None else "active ")
        if session.options.output in ("json", "yaml"):
            session.output.data({"items": []}, session.options.output)
        return ExitCode.OK
    everything = [each for target in targets for each in (target, *target.below)]
    side_by_side(canceller.send, everything)
    if session.options.dry_run == "none":
        canceller.wait(everything)
    outcomes = [canceller.finish(target) for target in targets]
    _print(session, outcomes, one=selection.one)
    return gravest(outcome.code for outcome in outcomes)


class Canceller:
    """The steps of a cancel of one or many runs."""

    def __init__(self, session: Session, *, stale: timedelta | None = None) -> None:
        self._session = session
        self._options = session.options
        self._wish = wish_of(session.options)
        self._stale = stale
        self._follower: Follower | None = None

    # ------------------------------------------------------------------------------------------------ choosing

    def targets(self, selection: Selection) -> list[Target]:
        """Return the runs to cancel. Raises CliError."""
        if selection.names:
            keys = [RunKey(namespace=self._session.namespace, name=name) for name in selection.names]
            targets = side_by_side(self._read, keys)
        else:
            listed = self._session.api.runs(self._session.scope, selector=selection.selector)
            runs = [found for found in map(Run, listed.items) if self._is_meant(found, listed.at)]
            targets = [Target(key=found.key, wish=self._wish, before=found) for found in runs]
        return self._with_families(targets) if self._wish.cascade else targets

    def _read(self, key: RunKey) -> Target:
        target = Target(key=key, wish=self._wish)
        try:
            body, _ = self._session.api.run(key.namespace, key.name)
            target.before = Run(body)
        except CliError as error:
            target.outcome = _failure(key, error)
        return target

    def _is_meant(self, found: Run, now: datetime) -> bool:
        """Tell whether a run that a selector has found is to be cancelled: it is active, and stale if that is asked."""
        if self._stale is not None:
            return may_be_stale(found) and stands_still(found, now) >= self._stale
        terminates = self._wish.terminate and found.phase == Phase.CANCELLED and not found.drained
        return not found.ended or terminates

    def _with_families(self, targets: list[Target]) -> list[Target]:
        """Add the active runs below each target. The operator cancels them, but not below a run Cancelled alone."""
        self._follower = Follower(self._session.api, self._session.scope)
        everything = list(self._follower.runs.values())
        taken = {target.key for target in targets}

        def family_of(key: RunKey) -> list[Run]:
            return [run for run in descendants(key, everything) if not run.ended and run.key not in taken]

        for target in targets:
            family, before = family_of(target.key), target.before
            if before is not None and before.phase == Phase.CANCELLED and not cancelled_with_cascade(before.body):
                children = [run for run in family if target.key in run.parents]
                taken |= {run.key for run in children}
                target.below = [Target(key=run.key, wish=self._wish, before=run) for run in children]
                for child in target.below:
                    child.family = tuple(run.key for run in family_of(child.key))
            else:
                target.family = tuple(run.key for run in family)
        return targets

    # ------------------------------------------------------------------------------------------------- sending

    def send(self, target: Target) -> None:
        """Ask for the cancel of one run; what is refused becomes its outcome."""
        if target.before is None:
            return
        try:
            for _ in range(MAX_TRIES):
                if self._sent(target):
                    return
            text = f'error: run "{target.key.name}" changes all the time: try again'
            target.outcome = failure(target.key, text, ExitCode.CONFLICT)
        except CliError as error:
            target.outcome = _failure(target.key, error)

    def _sent(self, target: Target) -> bool:
        """Send the request once; False if the run has changed since it was judged, so that it has to be judged anew."""
        if self._stale is not None and not self._still_stale(target):
            return True
        found = target.before
        assert found is not None  # noqa: S101  (send asks)
        patch = patch_of(found, target.wish)
        if self._options.dry_run == "client" and found.ended and found.phase != Phase.CANCELLED:
            raise ConflictError(f'run "{found.name}" is already {found.phase} and cannot be cancelled')
        if patch is None or self._options.dry_run == "client":
            target.after = found
            return True
        guard = self._stale is not None
        try:
            body = self._session.api.patch(
                found.namespace,
                found.name,
                guarded(patch, found) if guard else patch,
                dry_run=self._options.dry_run == "server",
            )
        except ServerError as error:
            if guard and error.http_code == 409:
                return False
            raise
        target.after = Run(body)
        return True

    def _still_stale(self, target: Target) -> bool:
        """Read the run and its Jobs and tell whether it stands still; if not, that is its outcome."""
        api, key = self._session.api, target.key
        body, now = api.run(key.namespace, key.name)
        found = target.before = Run(body)
        still = stands_still(found, now, api.jobs(key.namespace, f"{LABEL_RUN_UID}={found.uid}"))
        if not may_be_stale(found):
            target.outcome = Outcome(key=key, status=SKIPPED, message=f"Left alone: it is {found.phase}")
        elif self._stale is not None and still < self._stale:
            message = f"Left alone: it made progress {human_duration(still)} ago"
            target.outcome = Outcome(key=key, status=SKIPPED, message=message)
        elif target.wish.reason is None:
            target.wish = replace(target.wish, reason=f"no progress for {human_duration(still)}")
        return target.outcome is None

    # ------------------------------------------------------------------------------------------------- waiting

    def wait(self, targets: Iterable[Target]) -> None:
        """Wait until the operator has applied the cancels, and as long as --wait asks for."""
        sent = [target for target in targets if target.outcome is None]
        try:
            late = self._late(sent) if sent else set()
        except CliError as error:
            # The cancels are stored, whatever this user may see of them: without the right to watch, say.
            self._session.output.complain(str(error))
            code = error.code if self._options.wait else ExitCode.OK
            for target in sent:
                target.outcome = replace(self._outcome(target), code=code)
            return
        for target in sent:
            if self._options.wait and late & {target.key, *target.family}:
                target.outcome = replace(
                    self._outcome(target),
                    code=ExitCode.TIMED_OUT,
                    complaint=f"error: timed out waiting for the condition on ingestruns/{target.key.name}",
                )

    def _late(self, sent: list[Target]) -> set[RunKey]:
        """Wait, read the runs as they are then, and return those that are not as far as they should be."""
        options = self._options
        patience = options.timeout.total_seconds() if options.wait else SETTLE_SECONDS
        deadline = time.monotonic() + patience
        keys = {target.key for target in sent}
        follower = self._follower or self._follow(sent)
        late = follower.until(keys, lambda run: run.ended, deadline=deadline)
        below = {key for target in sent if target.key not in late for key in target.family}
        late |= follower.until(below, lambda run: run.ended, deadline=deadline)
        if options.wait == "drained":
            late |= follower.until(keys | below, lambda run: run.drained, deadline=deadline)
        for target in sent:
            target.after = follower.runs.get(target.key, target.after)
        return late

    def _follow(self, sent: list[Target]) -> Follower:
        by_name = f"metadata.name={sent[0].key.name}" if len(sent) == 1 else None
        scope = sent[0].key.namespace if len({target.key.namespace for target in sent}) == 1 else None
        self._follower = Follower(self._session.api, scope, field_selector=by_name)
        return self._follower

    # ------------------------------------------------------------------------------------------------ finishing

    def finish(self, target: Target) -> Outcome:
        """Return what has become of a run, and of those that were cancelled one by one below it."""
        outcome = target.outcome or self._outcome(target)
        if not target.below:
            return outcome
        below = [self.finish(child) for child in target.below]
        names = [name for each in below for name in each.cancelled_runs]
        return replace(
            outcome,
            cancelled_runs=[*outcome.cancelled_runs, *names],
            message=f"{outcome.message}; cancelled {len(names)} run(s) below",
            code=gravest([outcome.code, *(each.code for each in below)]),
            complaint="\n".join(each.complaint for each in (outcome, *below) if each.complaint),
        )

    def _outcome(self, target: Target) -> Outcome:
        before, after = target.before, target.after
        assert before is not None  # noqa: S101  (else it has an outcome)
        assert after is not None  # noqa: S101
        if self._options.dry_run != "none":
            names = [*([] if before.ended else [target.key.name]), *(key.name for key in target.family)]
            how = "server dry run" if self._options.dry_run == "server" else "dry run"
            return Outcome(
                key=target.key,
                status=DRY_RUN,
                message=f"Would cancel {len(names)} run(s) ({how})",
                cancelled_runs=names,
                reason=target.wish.reason,
                cascade=target.wish.cascade,
            )
        runs = self._follower.runs if self._follower is not None else {}
        family = [runs[key] for key in target.family if key in runs]
        made = outcome_of(before, after, target.wish, family=family, was=target.family)
        return replace(made, drained=drained_words(after)) if self._options.wait == "drained" else made


def _failure(key: RunKey, error: CliError) -> Outcome:
    sentence = error.sentence if isinstance(error, ServerError) else None
    return failure(key, str(error), error.code, sentence=sentence)


def _print(session: Session, outcomes: Sequence[Outcome], *, one: bool) -> None:
    """Print the outcomes: summaries and, as errors, refusals; or data; or names."""
    output, form = session.output, session.options.output
    for outcome in outcomes:
        if not form and outcome.status != ERROR:
            output.write(outcome.summary(with_namespace=session.scope is None))
        if form == "name" and outcome.status in (CANCELLED, REQUESTED, DRY_RUN):
            output.write(f"ingestrun.ingestrun.dev/{outcome.key.name}")
        if outcome.complaint:
            output.complain(outcome.complaint)
    if form in ("json", "yaml"):
        found = [outcome.to_json() for outcome in outcomes]
        output.data(found[0] if one else {"items": found}, form)
