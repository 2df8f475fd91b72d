"""`KubeModel.replace`: a changed copy, and no name that is none of the model's."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from ingestrun.model.status import BatchesStatus, IngestRunStatus, Phase


def test_replace_makes_a_changed_copy() -> None:
    status = IngestRunStatus(phase=Phase.RUNNING, cursor="7")

    changed = status.replace(phase=Phase.FAILED)

    assert changed == IngestRunStatus(phase=Phase.FAILED, cursor="7")
    assert status == IngestRunStatus(phase=Phase.RUNNING, cursor="7")


def test_what_was_changed_is_written() -> None:
    """Nothing of pydantic's own knowledge of which fields are set is lost in the copy."""
    changed = IngestRunStatus(cursor="7").replace(phase=Phase.FAILED)

    written = changed.model_dump(mode="json", by_alias=True, exclude_unset=True)
    assert written == {"cursor": "7", "phase": "Failed"}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"compeltion_time": None}, "compeltion_time"),
        ({"completionTime": None}, "completionTime"),
        ({"phase": Phase.FAILED, "zeal": 1, "mood": 2}, "mood, zeal"),
        ({"ended": True}, "ended"),
    ],
    ids=["misspelt", "alias", "several", "property"],
)
def test_an_unknown_name_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(TypeError, match=rf"^IngestRunStatus has no field {named}$"):
        IngestRunStatus().replace(**changes)


def test_a_model_is_frozen() -> None:
    batches = BatchesStatus(active=1)
    with pytest.raises(ValidationError, match="frozen"):
        batches.active = 2  # type: ignore[misc]
    assert batches.active == 1
