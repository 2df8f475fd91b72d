"""The bodies of runs in little memory: without what nobody reads, and with equal parts shared.

Most of a body, as Python objects, is managed fields, and parts and strings that thousands of runs have in common.
`make bench-idle` prints what a run takes.
"""

from __future__ import annotations

import json
import sys
from collections import OrderedDict
from typing import Any, Final

from ingestrun.kube.protocol import Object
from ingestrun.model.names import LABEL_CANCELLED

SHARED_PARTS: Final = 2000
"""Different parts of which one copy is kept for all bodies that have them."""
INTERNED_CHARS: Final = 64
"""Longest string that is shared with equal ones; longer ones are seldom equal."""
_SMALL: Final = ("apiVersion", "kind")
LAST_APPLIED: Final = "kubectl.kubernetes.io/last-applied-configuration"


class BodyCompactor:
    """Makes compact copies of bodies."""

    def __init__(self) -> None:
        self._parts: OrderedDict[str, Any] = OrderedDict()

    def compact(self, body: Object, *, before: Object | None = None) -> Object:
        """Return a copy of the body with all that the operator reads. Its parts must not be changed.

        `before` is the compact body of an earlier version, whose spec is mostly the same.
        """
        compact: dict[str, Any] = {sys.intern(key): self._share(value) for key, value in body.items() if key in _SMALL}
        compact["metadata"] = _compact_metadata(body["metadata"])
        for part in ("spec", "status"):
            if part in body:
                known = before.get(part) if before is not None else None
                compact[part] = known if known == body[part] else self._share_fields(body[part])
        return compact

    def _share_fields(self, value: Any) -> Any:
        """Return a value that is unlike others as a whole, with its parts shared."""
        if isinstance(value, dict):
            return {sys.intern(str(key)): self._share(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._share(item) for item in value]
        return _intern(value)

    def _share(self, value: Any) -> Any:
        """Return a value as one object for all bodies that have an equal one."""
        if not isinstance(value, dict | list):
            return _intern(value)
        text = json.dumps(value, sort_keys=True)
        shared = self._parts.pop(text, None)
        if shared is None:
            shared = self._share_fields(value)
            while len(self._parts) >= SHARED_PARTS:
                self._parts.popitem(last=False)
        self._parts[text] = shared
        return shared


def _compact_metadata(meta: Object) -> Object:
    compact = {sys.intern(key): _intern(value) for key, value in meta.items() if key != "managedFields"}
    annotations = compact.get("annotations")
    if annotations and LAST_APPLIED in annotations:
        compact["annotations"] = {key: value for key, value in annotations.items() if key != LAST_APPLIED}
    owners = [entry for entry in map(_cancel_owner, meta.get("managedFields") or ()) if entry is not None]
    if owners:
        compact["managedFields"] = owners
    return compact


def _cancel_owner(entry: Object) -> Object | None:
    """Return what of a managed field's entry says who owns the request to cancel; None if it says nothing of that.

    `model.run` asks for no more: who has set `spec.cancel`, and who owns the label of a cancel.
    """
    fields = entry.get("fieldsV1") or {}
    kept: dict[str, Any] = {}
    if "f:cancel" in (fields.get("f:spec") or {}):
        kept["f:spec"] = {"f:cancel": {}}
    label = f"f:{LABEL_CANCELLED}"
    if label in ((fields.get("f:metadata") or {}).get("f:labels") or {}):
        kept["f:metadata"] = {"f:labels": {label: {}}}
    if not kept:
        return None
    return {"fieldsV1": kept, **({"manager": _intern(entry["manager"])} if "manager" in entry else {})}


def _intern(value: Any) -> Any:
    if isinstance(value, str):
        return sys.intern(str(value)) if len(value) <= INTERNED_CHARS else value
    if isinstance(value, dict):
        return {sys.intern(str(key)): _intern(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_intern(item) for item in value]
    return value
