"""`status.retries`: nothing is lost in it, and it does not grow without end."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.size_budget import RETRIES_BYTES
from ingestrun.model.status import RetryCount
from ingestrun.planner.batch.ledger import OTHER, add_retries


def test_the_same_reason_of_a_stage_is_one_entry() -> None:
    first = add_retries([], [("fetch", "Error"), ("fetch", "OOMKilled"), ("fetch", "Error")])
    then = add_retries(first, [("fetch", "Error"), ("publish", "Error")])
    assert [(entry.stage, entry.reason, entry.count) for entry in then] == [
        ("fetch", "Error", 3),
        ("fetch", "OOMKilled", 1),
        ("publish", "Error", 1),
    ]


def test_what_has_no_room_is_counted_under_other() -> None:
    entries = add_retries([], [("fetch", f"Reason{n}") for n in range(50)] + [("fetch", "Reason0")] * 3)
    assert entries[0] == RetryCount(stage="fetch", reason="Reason0", count=4)
    assert entries[-1] == RetryCount(stage=OTHER, reason=OTHER, count=50 - (len(entries) - 1))


WORDS = st.text(alphabet="abcdefghijklmnopqrstuvwxyz -", min_size=1)
REASONS = st.tuples(WORDS, WORDS) | st.sampled_from([("fetch", "Error"), ("publish", "Error"), ("h" * 68, "R" * 32)])


@given(st.lists(st.lists(REASONS, max_size=10)))
def test_every_retry_is_counted_once_within_the_bounds(writes: list[list[tuple[str, str]]]) -> None:
    entries: list[RetryCount] = []
    for retried in writes:
        entries = add_retries(entries, retried)
    assert sum(entry.count for entry in entries) == sum(len(retried) for retried in writes)
    assert len({(entry.stage, entry.reason) for entry in entries}) == len(entries)
    assert len(",".join(entry.model_dump_json(by_alias=True) for entry in entries)) <= RETRIES_BYTES
