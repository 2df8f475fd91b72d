"""The Job of one attempt of one stage of one batch: its manifest, and whether a Job found is that one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ingestrun.engine.decisions import Create, Spent
from ingestrun.engine.images import image_of
from ingestrun.engine.memory import with_limit
from ingestrun.model import contract as k
from ingestrun.model import names
from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.worker import ENV_HTTP_AUTHORIZATION

WORKER_RESOURCES: Final = {"requests": {"cpu": "100m", "memory": "192Mi"}, "limits": {"memory": "1Gi"}}
WORKER_USER: Final = 65532
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerImage:
    """Which image runs the built-in source, hooks and sink."""

    name: str
    pull_policy: str = "IfNotPresent"


@dataclass(frozen=True, slots=True, kw_only=True)
class CancellationCheck:
    """Where the Job's pod may ask whether its run is cancelled, and the token that lets it."""

    url: str
    token: str = field(repr=False)


CheckFor = Callable[[IngestRun, int], CancellationCheck | None]
"""What a Job of this run whose pod has this deadline (seconds) is told about the check; None: nothing."""


def job_manifest(
    run: IngestRun, create: Create, *, worker: WorkerImage, check: CancellationCheck | None = None
) -> dict[str, Any]:
    """The Job to create.

    `backoffLimit: 0` and `restartPolicy: Never`: retries are the planner's, so that none happens behind a
    cancel. Pods are restricted, without a service-account token, and owned by the run through their Job.
    The deadline is the pod's, so that waiting for room costs no attempt (docs/decisions/0007-deadline-on-the-pod.md).
    """
    start = create.start
    labels, queue = job_labels(run, create), queue_labels(run, create)
    template = run.spec.pod_template
    pod_spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": start.step.deadline_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": WORKER_USER,
            "runAsGroup": WORKER_USER,
            "fsGroup": WORKER_USER,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [_container(run, create, worker, check)],
        "volumes": [{"name": "tmp", "emptyDir": {}}, *_workspace_volume(run), *template.volumes],
    }
    for key, value in (
        ("serviceAccountName", template.service_account_name),
        ("nodeSelector", template.node_selector),
        ("tolerations", template.tolerations),
        ("imagePullSecrets", [ref.model_dump() for ref in template.image_pull_secrets]),
        ("priorityClassName", template.priority_class_name),
    ):
        if value:
            pod_spec[key] = value
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": job_name(run, create),
            "namespace": run.metadata.namespace,
            "labels": {**queue, **labels},
            "ownerReferences": [owner_reference(run)],
        },
        "spec": {
            **({"suspend": True} if names.LABEL_QUEUE in queue else {}),
            "backoffLimit": 0,
            "completions": 1,
            "parallelism": 1,
            "podReplacementPolicy": "Failed",
            "template": {
                "metadata": {
                    "labels": {**template.labels, **labels},
                    **({"annotations": template.annotations} if template.annotations else {}),
                },
                "spec": pod_spec,
            },
        },
    }


def job_name(run: IngestRun, create: Create) -> str:
    """The Job's one possible name."""
    start = create.start
    return names.job_name(
        run_name=run.metadata.name,
        run_uid=run.metadata.uid,
        batch=start.batch,
        step_name=start.step.job_part,
        attempt=start.attempt,
    )


def job_labels(run: IngestRun, create: Create) -> dict[str, str]:
    """The labels that say which attempt of what a Job is."""
    start = create.start
    labels = {
        names.LABEL_RUN_UID: run.metadata.uid,
        names.LABEL_BATCH: str(start.batch),
        names.LABEL_STAGE: start.step.stage.value,
        names.LABEL_STEP: str(start.step.index),
        names.LABEL_ATTEMPT: str(start.attempt),
        "app.kubernetes.io/managed-by": names.OPERATOR_NAME,
    }
    if _LABEL_VALUE.fullmatch(run.metadata.name):
        labels[names.LABEL_RUN] = run.metadata.name
    return labels


def spent_selector(run_uid: str, spent: Spent) -> str:
    """The label selector of the Jobs to delete."""
    terms = [f"{names.LABEL_RUN_UID}={run_uid}"]
    if not spent.clean_up:
        terms.append(f"{names.LABEL_STAGE}!={Stage.ON_CANCEL.value}")
    for operator, batches in (("in", spent.batches), ("notin", spent.kept)):
        if batches:
            terms.append(f"{names.LABEL_BATCH} {operator} ({','.join(map(str, batches))})")
    return ",".join(terms)


def queue_labels(run: IngestRun, create: Create) -> dict[str, str]:
    """Kueue's labels, as the run carries them: Kueue reads a Job's own, as with any workload. None on a clean-up.

    With a queue the Job is created suspended. Kueue's webhook would do that, and its controller would suspend a Job
    that escaped it; but where neither runs, a Job that asks for a queue must not start without being admitted.
    """
    if create.start.step.stage is Stage.ON_CANCEL or not run.metadata.labels.get(names.LABEL_QUEUE):
        return {}
    return {label: run.metadata.labels[label] for label in names.QUEUE_LABELS if run.metadata.labels.get(label)}


def owner_reference(run: IngestRun) -> dict[str, Any]:
    """The run as controlling owner: deleting it ends its Jobs, with the operator down too."""
    return {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "name": run.metadata.name,
        "uid": run.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def adoptable(run: IngestRun, create: Create, found: Mapping[str, Any]) -> bool:
    """Whether a Job found under the name is the one that was to be created: every label of ours and the owner agree."""
    meta = found["metadata"]
    labels = meta.get("labels") or {}
    ours = all(labels.get(key) == value for key, value in job_labels(run, create).items())
    owned = any(
        ref.get("uid") == run.metadata.uid and ref.get("controller") for ref in meta.get("ownerReferences") or ()
    )
    return ours and owned


def _container(run: IngestRun, create: Create, worker: WorkerImage, check: CancellationCheck | None) -> dict[str, Any]:
    step, own = create.start.step, create.start.step.container
    container: dict[str, Any] = {
        "name": step.stage.value,
        "image": image_of(run, step, worker=worker.name, worker_policy=worker.pull_policy),
        "env": _environment(run, create, check),
        "terminationMessagePath": k.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108  (the pod's own emptyDir)
            *([{"name": "workspace", "mountPath": k.WORKSPACE_MOUNT}] if run.spec.workspace else []),
            *run.spec.pod_template.volume_mounts,
        ],
    }
    resources = _resources(create)
    if resources:
        container["resources"] = resources
    if own is None:
        container["imagePullPolicy"] = worker.pull_policy
        return container
    for key, value in (
        ("imagePullPolicy", own.image_pull_policy),
        ("command", own.command),
        ("args", own.args),
        ("envFrom", [source.model_dump(by_alias=True, exclude_none=True) for source in own.env_from]),
    ):
        if value:
            container[key] = value
    return container


def _resources(create: Create) -> Mapping[str, Any]:
    step, memory = create.start.step, create.start.memory
    resources: Mapping[str, Any] = {}
    if step.resources is not None:
        resources = step.resources.model_dump(exclude_defaults=True)
    elif step.container is None:
        resources = WORKER_RESOURCES
    return with_limit(resources, memory.limit) if memory is not None else resources


def _environment(run: IngestRun, create: Create, check: CancellationCheck | None) -> list[dict[str, Any]]:
    start, step, meta = create.start, create.start.step, run.metadata
    told: dict[str, str | None] = {
        k.ENV_CONTRACT: k.VERSION,
        k.ENV_RUN_NAME: meta.name,
        k.ENV_RUN_NAMESPACE: meta.namespace,
        k.ENV_RUN_UID: meta.uid,
        k.ENV_BATCH: str(start.batch),
        k.ENV_STAGE: step.stage.value,
        k.ENV_HOOK: step.name if step.stage is Stage.HOOK else None,
        k.ENV_ATTEMPT: str(start.attempt),
        k.ENV_CURSOR: create.cursor,
        k.ENV_LIMIT: str(create.limit) if create.limit is not None else None,
        k.ENV_IDEMPOTENCY_KEY: f"{run.origin_uid}/{start.batch}",
        k.ENV_CONFIG: step.config,
    }
    # The clean-up runs because of the cancel: there is nothing for it to ask.
    if check is not None and step.stage is not Stage.ON_CANCEL:
        told |= {k.ENV_CANCELLATION_URL: check.url, k.ENV_CANCELLATION_TOKEN: check.token}
    if step.stage is Stage.ON_CANCEL:
        told |= _cancel_told(run)
    partitions = run.spec.batches.partitions
    if step.stage is Stage.FETCH and partitions is not None:
        told[k.ENV_PARTITIONS] = str(partitions.total)
        if partitions.file is not None:
            told[k.ENV_PARTITION_FILE] = f"{k.WORKSPACE_MOUNT}/{partitions.file}"
    if run.spec.workspace is not None:
        told[k.ENV_WORKSPACE] = k.WORKSPACE_MOUNT
        if start.input_attempt is not None:
            told[k.ENV_INPUT] = _directory(run, start.batch, step.index - 1, start.input_attempt)
        if step.stage in (Stage.FETCH, Stage.HOOK):
            told[k.ENV_OUTPUT] = _directory(run, start.batch, step.index, start.attempt)
        if step.stage is Stage.HOOK:
            told[k.ENV_REJECTS] = (
                f"{k.WORKSPACE_MOUNT}/rejects/{meta.name}/{meta.uid}/{start.batch}-{step.name}-{start.attempt}"
            )
    env: list[dict[str, Any]] = [
        {"name": name, "value": _literal(value)} for name, value in told.items() if value is not None
    ]
    if step.authorization is not None:
        env.append({"name": ENV_HTTP_AUTHORIZATION, "valueFrom": {"secretKeyRef": step.authorization.model_dump()}})
    if step.container is not None:
        env += [variable.model_dump(by_alias=True, exclude_none=True) for variable in step.container.env]
    return env


def _cancel_told(run: IngestRun) -> dict[str, str | None]:
    record = run.status.cancellation
    if record is None:
        return {}
    return {
        k.ENV_BATCH: None,
        k.ENV_IDEMPOTENCY_KEY: f"{run.metadata.uid}/on-cancel",
        k.ENV_CANCEL_REASON: record.reason or "",
        k.ENV_CANCEL_POLICY: (record.policy or CancellationPolicy.DRAIN).value,
        k.ENV_CANCEL_REQUESTED_BY: record.requested_by or "",
        k.ENV_PUBLISHED: str(run.status.batches.published | record.published),
    }


def _directory(run: IngestRun, batch: int, step: int, attempt: int) -> str:
    """Of one attempt alone, so that a pod thought dead that still writes can't spoil a later attempt's data."""
    return f"{k.WORKSPACE_MOUNT}/.ingestrun/{run.metadata.uid}/{batch}/{step}-{attempt}"


def _literal(value: str) -> str:
    """Kubernetes expands $(NAME) in a variable's value; a cursor is data and must arrive as it is."""
    return value.replace("$(", "$$(")


def _workspace_volume(run: IngestRun) -> list[dict[str, Any]]:
    if run.spec.workspace is None:
        return []
    claim = run.spec.workspace.persistent_volume_claim.claim_name
    return [{"name": "workspace", "persistentVolumeClaim": {"claimName": claim}}]
