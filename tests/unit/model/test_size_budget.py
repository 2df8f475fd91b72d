"""The budget's table adds up, and no part of a status is larger than its row."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tests.unit.model.test_status import by_cascade, dumped, worst_status

from ingestrun.model.size_budget import (
    MAX_FAILED_BATCHES,
    MAX_PARALLELISM,
    OBJECT_BYTES,
    SAVED_STATE_BYTES,
    STATUS_BYTES,
    STATUS_PARTS,
    UNMEASURED_RANGES_BYTES,
    UNPUBLISHED_BYTES,
    UNPUBLISHED_FREE_BYTES,
    UNPUBLISHED_STATUS_BYTES,
)
from ingestrun.model.status import IngestRunStatus
from ingestrun.planner.status.writer import fit_status

RANGES = ("claimed", "fetched", "published", "failed", "replay")
DRAINED = ("published", "notPublished", "unknown", "onCancel", "drainedAt")
"""Fields of the cancellation that are empty until the run has drained, when its checkpoints go."""
CHECKPOINTS = "batches: checkpoints; once drained: the record of it"


def size(fields: Mapping[str, Any]) -> int:
    """Return the bytes of these fields inside of an object: without its braces, with a comma behind."""
    return len(json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()) - 1 if fields else 0


def take(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Move these fields, where they are there, out of an object."""
    return {name: fields.pop(name) for name in names if name in fields}


def parts(status: IngestRunStatus) -> dict[str, int]:
    """Return the bytes of each row of the table, of a status as it is written."""
    told = json.loads(dumped(status))
    batches, cancellation = told.pop("batches"), told["cancellation"]
    rows = {
        "batches: ranges": size(take(batches, *RANGES)),
        CHECKPOINTS: size(take(batches, "checkpoints"))
        + size(take(cancellation, *DRAINED))
        + size(take(told, "afterEnd")),
        "batches: unpublished": size(take(batches, "unpublished")),
        "resumedFrom, resumedBy": size(take(told, "resumedFrom", "resumedBy")),
    }
    rows["cursorState, cursorMark, sourceDigest"] = size(take(told, "cursorState", "cursorMark", "sourceDigest"))
    for name in ("conditions", "failures", "cancellation", "images", "cursor", "retries"):
        rows[name] = size(take(told, name))
    rows["counts, phase, times"] = size({**told, "batches": batches})
    assert abs(sum(rows.values()) - len(dumped(status).encode())) < 10, "the rows are not the whole status"
    return rows


def measured(status: IngestRunStatus) -> bool:
    """Tell whether its ranges are so long that `fit_status` measures it."""
    batches = json.loads(dumped(status))["batches"]
    return sum(len(batches[name]) for name in RANGES) > UNMEASURED_RANGES_BYTES


def longest_unmeasured() -> list[IngestRunStatus]:
    """Return the statuses that have the longest ranges of those that are not measured, of both kinds of holes."""
    found = []
    for drained in (True, False):
        for failed in range(0, MAX_FAILED_BATCHES + 1, 8):
            worst = (worst_status(failed=failed, in_flight=n, drained=drained) for n in range(MAX_PARALLELISM, -1, -1))
            longest = next((by_cascade(status) for status in worst if not measured(status)), None)
            if longest is not None:
                found.append(longest)
    assert len(found) > 10
    return found


def test_the_table_adds_up() -> None:
    assert sum(STATUS_PARTS.values()) <= STATUS_BYTES
    assert STATUS_BYTES + 3 * 1024 <= OBJECT_BYTES, "no room for the spec, the metadata and the managed fields"
    assert UNPUBLISHED_FREE_BYTES < UNPUBLISHED_BYTES < UNPUBLISHED_STATUS_BYTES < STATUS_BYTES
    assert 2 * SAVED_STATE_BYTES < STATUS_BYTES, "a saved state's ranges come again in the status"


def test_no_part_of_a_status_that_is_not_measured_is_larger_than_its_row() -> None:
    widest: dict[str, int] = {}
    for status in longest_unmeasured():
        assert fit_status(status) == status
        assert len(dumped(status).encode()) <= STATUS_BYTES
        for row, length in parts(status).items():
            widest[row] = max(widest.get(row, 0), length)

    assert widest.keys() == STATUS_PARTS.keys()
    assert {row: length for row, length in widest.items() if length > STATUS_PARTS[row]} == {}
    wasted = {row: length for row, length in widest.items() if length < 0.9 * STATUS_PARTS[row]}
    assert wasted == {}, "room that another part could have"


def test_only_the_ranges_outgrow_their_row() -> None:
    rows = parts(worst_status(failed=MAX_FAILED_BATCHES, in_flight=MAX_PARALLELISM))

    assert {row for row, length in rows.items() if length > STATUS_PARTS[row]} == {"batches: ranges"}
