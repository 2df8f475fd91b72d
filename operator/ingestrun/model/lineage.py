"""The tree of runs, by their JSON: the runs above a run, and whether a cancel goes down from one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ingestrun.model.names import KIND, RunKey
from ingestrun.model.phase import Phase


def parents_of(body: Mapping[str, Any]) -> list[RunKey]:
    """Return the runs above this one: by `spec.parentRef`, and by owner reference. Itself is none."""
    meta = body["metadata"]
    named = [(body.get("spec") or {}).get("parentRef") or {}]
    named += [ref for ref in meta.get("ownerReferences") or () if ref.get("kind") == KIND]
    own = RunKey.of(body)
    keys = [own.sibling(ref["name"]) for ref in named if ref.get("name")]
    return [key for key in dict.fromkeys(keys) if key != own]


def cancelled_with_cascade(body: Mapping[str, Any]) -> bool:
    """Tell whether the run is Cancelled, and those right below it have to follow."""
    status = body.get("status") or {}
    return status.get("phase") == Phase.CANCELLED and bool((status.get("cancellation") or {}).get("cascade"))
