"""The run that does the rest of an ended one: its manifest, and why there may be none."""

from __future__ import annotations

import copy
import re
from collections.abc import Container
from typing import Final

from ingestrun.cli.errors import ConflictError
from ingestrun.cli.runs import Json, Run
from ingestrun.model.names import GROUP, KIND, VERSION
from ingestrun.model.phase import Phase

NOT_TAKEN_OVER: Final = ("cancel", "cancellation", "suspend", "resumeFrom", "parentRef")
"""Fields of the spec that are about the old run's own life."""
_NUMBERED: Final = re.compile(r"(.+)-(\d+)")


def refusal(ended: Run, *, failed: bool) -> str | None:
    """Return why a run cannot be resumed, or with `failed` why there is nothing to retry; None if it can be.

    The operator has the last word: it refuses a run that does not fit (docs/resume.md).
    """
    if not ended.ended:
        return f'run "{ended.name}" has not ended ({ended.phase}): wait, or cancel it first'
    resumed = ended.status.get("resumedBy")
    if resumed:
        return f'run "{ended.name}" is already resumed by run "{resumed.get("name")}"'
    if failed and not ended.indexes("failed"):
        return f'run "{ended.name}" has no failed batches'
    if ended.phase == Phase.SUCCEEDED and not ended.indexes("failed") and not _limited(ended):
        return f'run "{ended.name}" has Succeeded, and nothing of it is left'
    return None


def _limited(run: Run) -> bool:
    """Tell whether a run has ended at its limit, so that a larger one goes on."""
    return (run.spec.get("batches") or {}).get("limit") is not None


def next_name(name: str, taken: Container[str]) -> str:
    """Return the name of the next run: flights-2 after flights, flights-3 after flights-2."""
    numbered = _NUMBERED.fullmatch(name)
    stem, number = (numbered[1], int(numbered[2])) if numbered else (name, 1)
    while True:
        number += 1
        found = f"{stem[: 253 - len(str(number)) - 1]}-{number}"
        if found not in taken:
            return found


def resuming_run(
    ended: Run,
    name: str,
    *,
    parallelism: int | None = None,
    limit: int | None = None,
    retries: int | None = None,
    suspend: bool = False,
) -> Json:
    """Return the manifest of a run that does the rest of the ended one, with these changes.

    It keeps the labels of people; those of the operator are about the old run.
    """
    spec = {key: copy.deepcopy(value) for key, value in ended.spec.items() if key not in NOT_TAKEN_OVER}
    changes = {"parallelism": parallelism, "retries": retries, "suspend": suspend or None}
    spec |= {key: value for key, value in changes.items() if value is not None}
    if limit is not None:
        spec["batches"] = {**spec["batches"], "limit": limit}
    labels = {key: value for key, value in (ended.meta.get("labels") or {}).items() if not key.startswith(f"{GROUP}/")}
    return {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": KIND,
        "metadata": {"name": name, "namespace": ended.namespace, **({"labels": labels} if labels else {})},
        "spec": {"resumeFrom": {"name": ended.name}, **spec},
    }


def checked(ended: Run, *, failed: bool) -> Run:
    """Return the run if it can be resumed. Raises ConflictError."""
    why = refusal(ended, failed=failed)
    if why is not None:
        raise ConflictError(why)
    return ended
