"""Events (events.k8s.io/v1) about a run: for people; nothing depends on one."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Final

from ingestrun.engine.announce import Announcement
from ingestrun.model import names
from ingestrun.model.run import IngestRun

REPORTER: Final = f"{names.GROUP}/operator"


def event_body(run: IngestRun, told: Announcement, *, now: datetime, instance: str) -> dict[str, Any]:
    """The Event's JSON. Its name is left to the server: an Event repeated after a restart is a second Event."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.metadata.name[:200]}-", "namespace": run.metadata.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": REPORTER,
        "reportingInstance": instance[:128],
        "action": told.action,
        "reason": told.reason,
        "note": told.note,
        "type": told.type,
        "regarding": {
            "apiVersion": f"{names.GROUP}/{names.VERSION}",
            "kind": names.KIND,
            "name": run.metadata.name,
            "namespace": run.metadata.namespace,
            "uid": run.metadata.uid,
            "resourceVersion": run.metadata.resource_version,
        },
    }
