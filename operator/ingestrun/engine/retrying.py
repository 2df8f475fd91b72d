"""What comes of a failed attempt: its row of the table, held against what is left of the stage's budgets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from ingestrun.engine.failure import Failure
from ingestrun.engine.memory import Memory, raised
from ingestrun.engine.verdicts import Budget, Verdict, rule_of
from ingestrun.model.quantity import render_bytes
from ingestrun.model.spec import Backoff, OutOfMemory

FREE_DISRUPTIONS: Final = 10
"""How many disruptions one stage of one batch survives without touching its `retries`.

Nobody's fault, so `retries: 0` survives them too; yet bounded, or a pod that a too full node evicts each time
would be started for ever.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allowance:
    """How often one stage may be tried again, and how long is waited before."""

    retries: int
    out_of_memory: OutOfMemory | None
    backoff: Backoff


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """How many of a stage's attempts have failed so far, by what they were taken from."""

    retries: int = 0
    memory: int = 0
    disruptions: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequel:
    """What comes of one failed attempt."""

    verdict: Verdict
    spent: Spent
    delay: timedelta = timedelta(0)
    memory: Memory | None = None
    said: str = ""
    """In words: which retry of how many comes when, or why none does."""

    @property
    def retried(self) -> bool:
        """Whether there is another attempt."""
        return self.verdict in (Verdict.RETRY, Verdict.RETRY_WITH_MORE_MEMORY)


def sequel(failure: Failure, *, allowance: Allowance, spent: Spent, had: int | None, identity: str) -> Sequel:
    """Decide about one failed attempt.

    `spent` is without it; `had` is the memory limit it had, in bytes. `identity` names the stage of the batch.
    """
    rule = rule_of(failure.reason)
    settings = allowance.out_of_memory
    if rule.budget is None:
        return Sequel(verdict=rule.verdict, spent=spent)
    if rule.budget is Budget.MEMORY and settings is not None and had is not None:
        return _more_memory(settings, had, allowance=allowance, spent=spent, identity=identity)
    if rule.budget is Budget.DISRUPTIONS and spent.disruptions < FREE_DISRUPTIONS:
        delay = retry_delay(allowance.backoff, identity=identity, attempt=spent.disruptions)
        number = spent.disruptions + 1
        return Sequel(
            verdict=Verdict.RETRY,
            spent=replace(spent, disruptions=number),
            delay=delay,
            said=f"retry {number} of {FREE_DISRUPTIONS} for disruptions {_when(delay)}",
        )
    # Without a setting for memory, or without a limit to raise, being killed for memory is an error like others.
    used = replace(spent, retries=spent.retries + 1)
    if spent.retries >= allowance.retries:
        return Sequel(verdict=Verdict.FAIL_BATCH, spent=used)
    delay = retry_delay(allowance.backoff, identity=identity, attempt=spent.retries)
    said = f"retry {used.retries} of {allowance.retries} {_when(delay)}"
    return Sequel(verdict=Verdict.RETRY, spent=used, delay=delay, said=said)


def retry_delay(backoff: Backoff, *, identity: str, attempt: int) -> timedelta:
    """How long to wait after so many failures of the same budget and one more.

    Doubles from `initialSeconds` up to `maxSeconds`; then up to a fifth is taken off, by a hash of `identity`,
    so that many batches which failed together do not come back together, and a restart changes nothing.
    """
    seconds = min(backoff.max_seconds, backoff.initial_seconds * 2 ** min(attempt, 30))
    share = int.from_bytes(hashlib.sha256(f"{identity}/{attempt}".encode()).digest()[:4]) / 2**32
    return timedelta(seconds=seconds * (1 - share / 5))


def _more_memory(settings: OutOfMemory, had: int, *, allowance: Allowance, spent: Spent, identity: str) -> Sequel:
    number = spent.memory + 1
    used = replace(spent, memory=number)
    more = raised(had, settings)
    if settings.retries == 0:
        return Sequel(verdict=Verdict.FAIL_BATCH, spent=used, said="outOfMemory.retries is 0")
    if more is None:
        cap = settings.max_memory
        said = f"it had {render_bytes(had)}, and outOfMemory.maxMemory of {cap} allows no more"
        return Sequel(verdict=Verdict.FAIL_BATCH, spent=used, said=said)
    if spent.memory >= settings.retries:
        said = f"it had {render_bytes(had)}, after {spent.memory} of {settings.retries} retries with more memory"
        return Sequel(verdict=Verdict.FAIL_BATCH, spent=used, said=said)
    delay = retry_delay(allowance.backoff, identity=identity, attempt=spent.memory)
    return Sequel(
        verdict=Verdict.RETRY_WITH_MORE_MEMORY,
        spent=used,
        delay=delay,
        memory=more,
        said=f"retry {number} of {settings.retries} with {more} {_when(delay)}",
    )


def _when(delay: timedelta) -> str:
    seconds = round(delay.total_seconds())
    return f"in {seconds} s" if seconds else "at once"
