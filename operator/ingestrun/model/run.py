"""The run as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from ingestrun.model.base import KubeModel
from ingestrun.model.names import ANNOTATION_REQUESTED_BY
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import IngestRunStatus


class Metadata(KubeModel):
    """The part of an object's metadata that the planner looks at."""

    name: str
    namespace: str
    uid: str
    resource_version: str
    generation: int = 1
    creation_timestamp: datetime
    deletion_timestamp: datetime | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    managed_fields: list[dict[str, Any]] = []

    @property
    def cancel_requested_by(self) -> str | None:
        """Who set `spec.cancel`: the user where admission has stamped one, else the field manager, said as such.

        Source: a field manager is what the client calls itself (kubectl-patch, argocd-controller), no identity.
        """
        stamped = self.annotations.get(ANNOTATION_REQUESTED_BY)
        if stamped:
            return stamped
        for entry in reversed(self.managed_fields):
            if "f:cancel" in entry.get("fieldsV1", {}).get("f:spec", {}):
                return f"field manager {entry.get('manager', 'unknown')}"
        return None


class IngestRun(KubeModel):
    """A run as the API server holds it."""

    metadata: Metadata
    spec: IngestRunSpec
    status: IngestRunStatus = IngestRunStatus()

    @property
    def origin_uid(self) -> str:
        """The UID that this run publishes under: its own, or that of the run whose batches it goes on with."""
        resumed = self.status.resumed_from
        return resumed.origin_uid if resumed is not None else self.metadata.uid

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> IngestRun:
        """Read a run's JSON.

        Raises:
            ValueError: the spec is one that the CRD of this version would have refused.
        """
        return cls.model_validate(body)
