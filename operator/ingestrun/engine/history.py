"""How often which stage was retried and why: `status.retries`, bounded, each retry counted once.

A batch's retries are counted in the write that accounts for it, from its attempts, which are all there until
then: whatever is repeated after a restart, that write is made once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ingestrun.model.status import RetryCount

MAX_BYTES: Final = 450
"""Of all entries as JSON, about eight; what has no room is counted under `OTHER`."""
OTHER: Final = "Other"
_ENTRY_BYTES: Final = len('{"stage":"","reason":"","count":1234567890},')


def counted_retries(old: Iterable[RetryCount], retried: Iterable[tuple[str, str]]) -> list[RetryCount]:
    """The old counts, and the newly retried attempts, each as (stage, reason), in the order they were seen."""
    counts = {(entry.stage, entry.reason): entry.count for entry in old}
    other = (OTHER, OTHER)
    for key in retried:
        if key not in counts and not _room(counts.keys() - {other}, key):
            key = other
        counts[key] = counts.get(key, 0) + 1
    rest = counts.pop(other, None)
    if rest is not None:
        counts[other] = rest  # last, where people look for the rest
    return [RetryCount(stage=stage, reason=reason, count=count) for (stage, reason), count in counts.items()]


def _room(known: Iterable[tuple[str, str]], new: tuple[str, str]) -> bool:
    """Whether one more entry fits, with the one for the rest beside it."""
    entries = [*known, new, (OTHER, OTHER)]
    return sum(len(stage.encode()) + len(reason.encode()) + _ENTRY_BYTES for stage, reason in entries) <= MAX_BYTES
