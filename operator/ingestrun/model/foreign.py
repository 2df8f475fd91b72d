"""Reading of specs and statuses of which this version does not understand all: a newer version or a person wrote them.

What is understood is read, so that a cancel is seen and carried out. Each other part becomes a sentence, and the run is
held (`planner.run.hold`), because to ignore a part could mean to do another thing than was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final, TypeVar

from pydantic import ValidationError

from ingestrun.model.base import KubeModel
from ingestrun.model.size_budget import MAX_FAILED_BATCHES, MAX_PARALLELISM
from ingestrun.model.spec import Batches, Cancellation, Concurrency, CursorBatches, IngestRunSpec
from ingestrun.model.status import IngestRunStatus
from ingestrun.model.text import pluralize, truncate

M = TypeVar("M", bound=KubeModel)

_NAMED: Final = 3
"""Most problems that are named; the others are counted."""
_VALUE_CHARS: Final = 40


def read_spec(raw: Mapping[str, Any]) -> tuple[IngestRunSpec, list[str]]:
    """Return the spec and what of it is not understood, as sentences.

    If a value is not understood, little more than the cancel is read, because all other fields are about starts.
    """
    try:
        return IngestRunSpec.model_validate(raw, extra="forbid"), []
    except ValidationError as error:
        problems = _sentences("spec", error)
    spec = _known(IngestRunSpec, raw)
    if spec is None:
        spec = IngestRunSpec.model_construct(
            cancel=raw.get("cancel") is True,
            cancellation=_known(Cancellation, raw.get("cancellation") or {}) or Cancellation(),
            suspend=raw.get("suspend") is True,
            concurrency=_known(Concurrency, raw["concurrency"]) if "concurrency" in raw else None,
            batches=Batches(cursor=CursorBatches()),
        )
    return spec, problems


def read_status(raw: Mapping[str, Any]) -> tuple[IngestRunStatus, list[str]]:
    """Return the status, without its fields and list entries that are not understood, and these as sentences."""
    try:
        status, problems = IngestRunStatus.model_validate(raw, extra="forbid"), []
    except ValidationError as error:
        problems = _sentences("status", error)
        status = IngestRunStatus()
        for key, value in raw.items():
            known = _known_field(key, value)
            status = status.model_copy(update={name: getattr(known, name) for name in known.model_fields_set})
    for impossible in _impossible(status):
        problems.append(impossible)
        status = status.replace(batches=type(status.batches)())
    return status, problems


def _known_field(key: str, value: Any) -> IngestRunStatus:
    """Return a status with this one field, as far as it is understood."""
    known = _known(IngestRunStatus, {key: value})
    if known is None and isinstance(value, list):
        known = _known(
            IngestRunStatus, {key: [item for item in value if _known(IngestRunStatus, {key: [item]}) is not None]}
        )
    return known or IngestRunStatus()


def _known(model: type[M], raw: Any) -> M | None:
    """Return the fields that the model knows; None if one of them has a value that it does not."""
    try:
        return model.model_validate(raw, extra="ignore")
    except ValidationError:
        return None


def _impossible(status: IngestRunStatus) -> Iterable[str]:
    """Yield why no run can have this status. Such sets of batches could take hours to walk through."""
    in_flight, failed = len(status.batches.in_flight), len(status.batches.failed)
    if in_flight > MAX_PARALLELISM:
        batches = pluralize(in_flight, "batch", "batches")
        yield f"status.batches: {batches} would be in flight, and a run has at most {MAX_PARALLELISM}"
    elif failed > MAX_FAILED_BATCHES + MAX_PARALLELISM:
        yield f"status.batches.failed: {pluralize(failed, 'batch', 'batches')} would have failed, and a run ends before"


def _sentences(root: str, error: ValidationError) -> list[str]:
    """Return what is not understood, one sentence each. A value of the spec is not shown, because it may be secret."""
    problems = error.errors(include_url=False)
    sentences = []
    for problem in problems[:_NAMED]:
        where = ".".join(str(part) for part in (root, *problem["loc"]))
        if problem["type"] == "extra_forbidden":
            sentences.append(f"{where} is not known")
        elif problem["type"] in ("enum", "literal_error") and root == "status":
            sentences.append(
                f"{where} has the value {truncate(repr(problem['input']), _VALUE_CHARS)}, which is not known"
            )
        else:
            sentences.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    if len(problems) > _NAMED:
        sentences.append(f"and {len(problems) - _NAMED} more")
    return sentences
