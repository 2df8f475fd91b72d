"""An IngestRun as a whole: metadata, spec and status."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

from pydantic.json_schema import SkipJsonSchema

from ingestrun.model.base import KubeModel
from ingestrun.model.foreign import read_spec, read_status
from ingestrun.model.names import ANNOTATION_REQUESTED_BY, LABEL_CANCELLED, OPERATOR_NAME, RunKey
from ingestrun.model.spec import IngestRunSpec
from ingestrun.model.status import IngestRunStatus, is_final


def has_ended(body: Mapping[str, Any]) -> bool:
    """Tell whether a run, as JSON, is in a final phase; see `model.status.is_final`."""
    return is_final((body.get("status") or {}).get("phase"))


def cancel_requested(body: Mapping[str, Any]) -> bool:
    """Tell whether a run, as JSON, asks to be cancelled; see `IngestRun.cancel_requested`."""
    meta = body["metadata"]
    spec_asks = bool((body.get("spec") or {}).get("cancel"))
    return spec_asks or _latched(meta.get("labels") or {}, meta.get("managedFields") or ())


def _latched(labels: Mapping[str, str], managed_fields: Iterable[Mapping[str, Any]]) -> bool:
    """Tell whether the label of a cancel was set by the API server's admission policy, or by the operator.

    A field that admission sets has no field manager. A label that a client has sent has one. It may be copied from a
    cancelled run, so it does not count as a request.
    """
    if labels.get(LABEL_CANCELLED) != "true":
        return False
    owners = {
        entry.get("manager")
        for entry in managed_fields
        if f"f:{LABEL_CANCELLED}" in entry.get("fieldsV1", {}).get("f:metadata", {}).get("f:labels", {})
    }
    # The field manager of the operator's own writes is its user agent up to the slash.
    return owners <= {OPERATOR_NAME}


class Metadata(KubeModel):
    """The part of an object's metadata that the planner uses."""

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
    def key(self) -> RunKey:
        """The key of the run that has this metadata."""
        return RunKey(namespace=self.namespace, name=self.name)

    @property
    def cancel_requested_by(self) -> str | None:
        """Return the requester of the cancel: the user if admission recorded one, else "field manager" and its name.

        A field manager is the name that a client gives itself (kubectl-patch, argocd-controller), and no identity.
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
    unreadable: SkipJsonSchema[tuple[str, ...]] = ()
    """The parts of spec and status that this version does not understand, one sentence each. If there is any, `spec`
    and `status` have the rest, and the run is held."""
    stored_status: SkipJsonSchema[Mapping[str, Any]] = {}
    """The status as it is stored, if it has parts that are not understood."""

    @property
    def cancel_requested(self) -> bool:
        """Tell whether the run asks to be cancelled: by its spec, or by a label that stays if `cancel` is taken back.

        The API server puts the label on the run together with the request (docs/admission.md). Therefore a request
        holds even if a GitOps tool reverts it before the operator has seen it.
        """
        return self.spec.cancel or _latched(self.metadata.labels, self.metadata.managed_fields)

    @property
    def origin_uid(self) -> str:
        """Return the UID under which this run publishes: its own, or that of the first run in its chain of resumes."""
        resumed = self.status.resumed_from
        return resumed.origin_uid if resumed is not None else self.metadata.uid

    @classmethod
    def read(cls, body: Mapping[str, Any]) -> IngestRun:
        """Parse a run's JSON, as far as this version understands it.

        Raises:
            ValueError: it is no object of the API server.
        """
        metadata = Metadata.model_validate(body["metadata"])
        (spec, of_spec), (status, of_status) = read_spec(body.get("spec") or {}), read_status(body.get("status") or {})
        run = cls.model_construct(metadata=metadata, spec=spec, status=status)
        for problem in (*of_spec, *of_status):
            run = run.held(body, problem)
        return run

    def held(self, body: Mapping[str, Any], why: str) -> IngestRun:
        """Return the same run, of which `why` is not understood; `body` is its JSON."""
        return self.replace(unreadable=(*self.unreadable, why), stored_status=body.get("status") or {})
