"""Names: of the operator, its resource, labels and annotations; the key of a run, and the names of Jobs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

GROUP: Final = "ingestrun.dev"
VERSION: Final = "v1alpha1"
KIND: Final = "IngestRun"
PLURAL: Final = "ingestruns"

OPERATOR_NAME: Final = "ingestrun-operator"
"""Name of the operator: its lease, its user agent and so its field manager, `managed-by` on its Jobs, and
`requestedBy` of a cancel that the operator decided by itself."""

LABEL_RUN: Final = f"{GROUP}/run"
"""The run's name if it fits a label's 63 characters. It is for people; code selects by the UID."""
LABEL_RUN_UID: Final = f"{GROUP}/run-uid"
LABEL_BATCH: Final = f"{GROUP}/batch"
LABEL_STAGE: Final = f"{GROUP}/stage"
LABEL_STEP: Final = f"{GROUP}/step"
"""The stage's place in the batch, from 0 (fetch), which distinguishes the hooks."""
LABEL_ATTEMPT: Final = f"{GROUP}/attempt"
LABEL_WORKER: Final = f"{GROUP}/worker"
"""On the Job of a pool's worker, in place of the batch: the worker's number."""

LABEL_MANAGED_BY: Final = "app.kubernetes.io/managed-by"

LABEL_CANCELLED: Final = f"{GROUP}/cancelled"
"""`true` on a run from its cancel until its Jobs have been listed for the last time. The fence selects by it."""

LABEL_QUEUE: Final = "kueue.x-k8s.io/queue-name"
"""On a run: the local queue of Kueue in which its Jobs wait for admission."""
QUEUE_LABELS: Final = (LABEL_QUEUE, "kueue.x-k8s.io/priority-class")
"""Kueue's labels that are passed on from a run to its Jobs."""

ANNOTATION_CHECKPOINT: Final = f"{GROUP}/checkpoint"
"""On a Job: the state of its batch when it was created (`status.Checkpoint`), because the Jobs before it may vanish."""
ANNOTATION_REQUESTED_BY: Final = f"{GROUP}/cancel-requested-by"
ANNOTATION_SAFE_TO_EVICT: Final = "cluster-autoscaler.kubernetes.io/safe-to-evict-local-volumes"

_HASH_CHARS: Final = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class RunKey:
    """Identity of a run: the key of the queue, of the stores and of the logs."""

    namespace: str
    name: str

    @classmethod
    def of(cls, body: Mapping[str, Any]) -> RunKey:
        """Return the key of a run, given its JSON."""
        meta = body["metadata"]
        return cls(namespace=meta["namespace"], name=meta["name"])

    def sibling(self, name: str) -> RunKey:
        """Return the key of the run of that name in the same namespace."""
        return RunKey(namespace=self.namespace, name=name)

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


def hook_job_part(step: int, hook: str) -> str:
    """Return a hook's part of its Job's name; the index distinguishes a hook named `publish` from the stage."""
    return f"h{step}-{hook}"


def job_name(*, run_name: str, run_uid: str, batch: int, step_name: str, attempt: int) -> str:
    """Return the only name that the Job of an attempt can have: the same after any restart, at most 63 characters.

    It has a hash of the run's UID, so that a run which is deleted and created again under its name shares no Job name
    with its predecessor.
    """
    tail = f"{batch}-{step_name}-{attempt}"
    digest = hashlib.sha256(f"{run_uid}/{tail}".encode()).hexdigest()[:_HASH_CHARS]
    room = 63 - len(digest) - len(tail) - 2
    if room < 8:
        tail = f"{batch}-{attempt}"
        room = 63 - len(digest) - len(tail) - 2
    head = run_name.replace(".", "-")[:room].strip("-")
    return f"{head}-{tail}-{digest}"
