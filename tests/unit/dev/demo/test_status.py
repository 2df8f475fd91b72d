"""The demo's own reading of a status."""

from __future__ import annotations

import pytest
from dev.demo.status import ROWS, Status, count


@pytest.mark.parametrize(("ranges", "number"), [("", 0), ("0", 1), ("0-3", 4), ("0-3,5,7-8", 7)])
def test_ranges_are_counted(ranges: str, number: int) -> None:
    assert count(ranges) == number


def test_a_run_that_nobody_has_looked_at_is_pending() -> None:
    status = Status({})
    assert (status.phase, status.published, status.files, status.rows) == ("Pending", 0, 0, 0)
    assert status.line().startswith("Pending ")
    assert "no conditions" in status.message


def test_what_landed_after_the_cancel_is_in_the_dataset_too() -> None:
    status = Status({"batches": {"published": "0-2"}, "cancellation": {"published": "3,5"}})
    assert (status.published, status.files) == (3, 5)


def test_the_bar_is_full_when_all_rows_are_there() -> None:
    line = Status({"phase": "Succeeded", "records": {"published": ROWS}, "batches": {"published": "0-6"}}).line()
    assert "[" + "#" * 24 + "]" in line
