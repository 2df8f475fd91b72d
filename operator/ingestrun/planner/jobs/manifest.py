"""The Job of an attempt: its manifest, and the check that a Job found under its name is this Job."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from ingestrun.model import contract as k
from ingestrun.model import names, pool
from ingestrun.model.contract import Stage
from ingestrun.model.run import IngestRun
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import Checkpoint
from ingestrun.model.worker import ENV_HTTP_AUTHORIZATION
from ingestrun.planner.actions import CreateJob, DeleteJobs
from ingestrun.planner.batch.containers import own_container_name
from ingestrun.planner.batch.pipeline import WORKER_SECONDS, Step, steps_of
from ingestrun.planner.batch.retry import with_memory_limit
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.image_pins import image_of

WORKER_RESOURCES: Final = {"requests": {"cpu": "100m", "memory": "192Mi"}, "limits": {"memory": "1Gi"}}
POD_USER: Final = 65532
"""User and group of the pods, where neither the run nor the operator's settings say otherwise; that of our images."""
SCRATCH: Final = "/tmp"  # noqa: S108  (a path in the container)
_RESTART_POLICY: Final = ("template", "spec", "restartPolicy")
_LABEL_VALUE: Final = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerImage:
    """The image that runs the built-in source, hooks and sink."""

    name: str
    pull_policy: str = "IfNotPresent"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckEndpoint:
    """Endpoint at which the Job's pod may ask whether its run is cancelled, and the token for it."""

    url: str
    token: str = field(repr=False)
    ca: str = field(default="", repr=False)
    """The CA of the endpoint's certificate, in PEM; empty: one that the image knows, or plain HTTP."""
    pool_url: str | None = None
    """Base URL of the pool, with its token, for a worker."""
    pool_token: str | None = field(default=None, repr=False)


CheckEndpointFor = Callable[[IngestRun, CreateJob], CheckEndpoint | None]
"""Function that returns the endpoint for a Job that is to be created; None: there is none."""


def job_manifest(
    run: IngestRun,
    create: CreateJob,
    *,
    worker: WorkerImage,
    check: CheckEndpoint | None = None,
    user: int | None = POD_USER,
) -> dict[str, Any]:
    """Return the Job to create; `user`: the pod's user and group if the run sets none, None leaves them out.

    `backoffLimit: 0` and `restartPolicy: Never`, because the planner alone retries, so that no retry follows a
    cancel. Pods are restricted, without a service-account token, and owned by the run through their Job.
    The deadline is the pod's, so that waiting for room costs no attempt (docs/decisions/0007-deadline-on-the-pod.md).
    """
    attempt = create.attempt
    labels, queue = job_labels(run, create), queue_labels(run, create)
    template = run.spec.pod_template
    pod_spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": attempt.step.deadline_seconds,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": _security_context(run, user),
        "containers": [_container(run, create, worker, check)],
    }
    if volumes := [*_workspace_volume(run), *template.volumes]:
        pod_spec["volumes"] = volumes
    annotations = {**_evictable(template.volumes), **template.annotations}
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
            **({"annotations": {names.ANNOTATION_CHECKPOINT: _json(attempt.checkpoint)}} if attempt.checkpoint else {}),
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
                    **({"annotations": annotations} if annotations else {}),
                },
                "spec": pod_spec,
            },
        },
    }


def job_name(run: IngestRun, create: CreateJob) -> str:
    """Return the Job's one possible name."""
    attempt = create.attempt
    return names.job_name(
        run_name=run.metadata.name,
        run_uid=run.metadata.uid,
        batch=attempt.batch,
        step_name=attempt.step.job_part,
        attempt=attempt.number,
    )


def job_labels(run: IngestRun, create: CreateJob) -> dict[str, str]:
    """Return the labels that identify the attempt of a Job."""
    attempt = create.attempt
    labels = {
        names.LABEL_RUN_UID: run.metadata.uid,
        # Without the label of a batch, so that no deletion of a batch's Jobs finds a worker.
        names.LABEL_WORKER if create.worker else names.LABEL_BATCH: str(attempt.batch),
        names.LABEL_STAGE: attempt.step.stage.value,
        names.LABEL_STEP: str(attempt.step.index),
        names.LABEL_ATTEMPT: str(attempt.number),
        names.LABEL_MANAGED_BY: names.OPERATOR_NAME,
    }
    if _LABEL_VALUE.fullmatch(run.metadata.name):
        labels[names.LABEL_RUN] = run.metadata.name
    return labels


def delete_selector(run_uid: str, spent: DeleteJobs) -> str:
    """Return the label selector of the Jobs to delete."""
    terms = [f"{names.LABEL_RUN_UID}={run_uid}"]
    if not spent.clean_up:
        terms.append(f"{names.LABEL_STAGE}!={Stage.ON_CANCEL.value}")
    for operator, batches in (("in", spent.batches), ("notin", spent.kept)):
        if batches:
            terms.append(f"{names.LABEL_BATCH} {operator} ({','.join(map(str, batches))})")
    return ",".join(terms)


def queue_labels(run: IngestRun, create: CreateJob) -> dict[str, str]:
    """Return Kueue's labels as the run carries them, because Kueue reads a Job's own. A clean-up has none.

    With a queue the Job is created suspended. Kueue's webhook would suspend it, and Kueue's controller would suspend a
    Job that escaped the webhook; but if neither runs, a Job with a queue must not start without being admitted.
    """
    if create.attempt.step.stage is Stage.ON_CANCEL or not run.metadata.labels.get(names.LABEL_QUEUE):
        return {}
    return {label: run.metadata.labels[label] for label in names.QUEUE_LABELS if run.metadata.labels.get(label)}


def owner_reference(run: IngestRun) -> dict[str, Any]:
    """Return the run as controlling owner: deleting it ends its Jobs, with the operator down too."""
    return {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "name": run.metadata.name,
        "uid": run.metadata.uid,
        "controller": True,
        "blockOwnerDeletion": False,
    }


def adoptable(run: IngestRun, create: CreateJob, found: Mapping[str, Any]) -> bool:
    """Tell whether a Job found under the name is the one to create: every label of the operator and the owner agree."""
    meta = found["metadata"]
    labels = meta.get("labels") or {}
    ours = all(labels.get(key) == value for key, value in job_labels(run, create).items())
    owned = any(
        ref.get("uid") == run.metadata.uid and ref.get("controller") for ref in meta.get("ownerReferences") or ()
    )
    return ours and owned


def _json(checkpoint: Checkpoint) -> str:
    return checkpoint.model_dump_json(by_alias=True, exclude_none=True)


def _security_context(run: IngestRun, user: int | None) -> dict[str, Any]:
    """Return the pod's security context: the run's own in place of the default, and what pod security insists on."""
    own = run.spec.pod_template.security_context
    if own is not None:
        chosen = own.model_dump(by_alias=True, exclude_unset=True)
    elif user is not None:
        chosen = {"runAsUser": user, "runAsGroup": user, "fsGroup": user}
    else:
        chosen = {}
    return {
        "fsGroupChangePolicy": "OnRootMismatch",
        **chosen,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def changed_at_creation(sent: Mapping[str, Any], stored: Mapping[str, Any]) -> str | None:
    """Return which change of a Job at its creation would have its pod run another number of times; None without one.

    An admission policy or webhook changes what it likes. The planner alone retries, and it counts one pod for a Job.
    """
    for path in (("backoffLimit",), ("completions",), ("parallelism",), ("managedBy",), _RESTART_POLICY):
        before, after = _at(sent["spec"], path), _at(stored["spec"], path)
        if before != after:
            was = f"from {before} " if before is not None else ""
            return f"spec.{'.'.join(path)} {was}to {after}"
    return None


def _at(spec: Mapping[str, Any], path: Sequence[str]) -> Any:
    found: Any = spec
    for name in path:
        found = found.get(name) if found is not None else None
    return found


def _container(run: IngestRun, create: CreateJob, worker: WorkerImage, check: CheckEndpoint | None) -> dict[str, Any]:
    """Return the stage's container.

    It brings no volume for `/tmp`, because `kubectl drain` stops at any pod with an `emptyDir`. The built-in worker
    writes into the workspace alone. A container of the user may need one, so its root file system is read-only only
    where the run mounts a volume there.
    """
    step, own = create.attempt.step, create.attempt.step.container
    mounts: list[dict[str, Any]] = [
        *([{"name": "workspace", "mountPath": k.WORKSPACE_MOUNT}] if run.spec.workspace else []),
        *run.spec.pod_template.volume_mounts,
    ]
    container: dict[str, Any] = {
        "name": own_container_name(job_labels(run, create)),
        "image": image_of(run, step, worker=worker.name, worker_policy=worker.pull_policy),
        "env": _environment(run, create, check),
        "terminationMessagePath": k.TERMINATION_LOG,
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": own is None or any(mount["mountPath"] == SCRATCH for mount in mounts),
            "capabilities": {"drop": ["ALL"]},
        },
    }
    if mounts:
        container["volumeMounts"] = mounts
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


def _evictable(volumes: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the annotation that lets the cluster autoscaler evict a pod with an `emptyDir`: its attempt runs again."""
    local = [volume["name"] for volume in volumes if "emptyDir" in volume]
    return {names.ANNOTATION_SAFE_TO_EVICT: ",".join(local)} if local else {}


def _resources(create: CreateJob) -> Mapping[str, Any]:
    step, memory = create.attempt.step, create.attempt.memory
    resources: Mapping[str, Any] = {}
    if step.resources is not None:
        resources = step.resources.model_dump(exclude_defaults=True)
    elif step.container is None:
        resources = WORKER_RESOURCES
    return with_memory_limit(resources, memory.limit) if memory is not None else resources


def _environment(run: IngestRun, create: CreateJob, check: CheckEndpoint | None) -> list[dict[str, Any]]:
    """Return the variables of the container contract (docs/contract.md), then the user's own."""
    attempt, step, meta = create.attempt, create.attempt.step, run.metadata
    if create.worker:
        return _worker_environment(run, create, check)
    values: dict[str, str | None] = {
        k.ENV_CONTRACT: k.VERSION,
        k.ENV_RUN_NAME: meta.name,
        k.ENV_RUN_NAMESPACE: meta.namespace,
        k.ENV_RUN_UID: meta.uid,
        k.ENV_BATCH: str(attempt.batch),
        k.ENV_STAGE: step.stage.value,
        k.ENV_HOOK: step.name if step.stage is Stage.HOOK else None,
        k.ENV_ATTEMPT: str(attempt.number),
        k.ENV_CURSOR: create.cursor,
        k.ENV_LIMIT: str(create.limit) if create.limit is not None else None,
        k.ENV_SOURCE_DIGEST: create.source_digest,
        k.ENV_STATE: create.state,
        k.ENV_IDEMPOTENCY_KEY: f"{run.origin_uid}/{attempt.batch}",
        k.ENV_CONFIG: step.config,
    }
    if step.stage is Stage.ON_CANCEL:
        values |= _cancellation_environment(run)
    elif check is not None:
        values |= _check_environment(check)
    values |= _partition_environment(run, step) | _workspace_environment(run, attempt)
    env = _variables(values, step)
    if step.container is not None:
        env += [variable.model_dump(by_alias=True, exclude_none=True) for variable in step.container.env]
    return env


def _check_environment(check: CheckEndpoint) -> dict[str, str | None]:
    return {
        k.ENV_CANCELLATION_URL: check.url,
        k.ENV_CANCELLATION_TOKEN: check.token,
        k.ENV_CANCELLATION_CA: check.ca or None,
    }


def _worker_environment(run: IngestRun, create: CreateJob, check: CheckEndpoint | None) -> list[dict[str, Any]]:
    """Return the variables of a pool's worker (docs/contract.md, "The pool")."""
    step, meta, steps = create.attempt.step, run.metadata, steps_of(run.spec)
    stages = tuple(
        pool.WorkerStage(stage=each.stage, name=each.name, deadline_seconds=each.deadline_seconds) for each in steps
    )
    limit = run.spec.execution.max_batches_per_worker
    values: dict[str, str | None] = {
        k.ENV_CONTRACT: k.VERSION,
        k.ENV_RUN_NAME: meta.name,
        k.ENV_RUN_NAMESPACE: meta.namespace,
        k.ENV_RUN_UID: meta.uid,
        pool.ENV_WORKER: str(create.attempt.batch),
        pool.ENV_MAX_BATCHES: str(limit) if limit is not None else None,
        pool.ENV_MAX_SECONDS: str(WORKER_SECONDS),
        pool.ENV_STAGES: pool.render_stages(stages),
        **{pool.config_variable(each.index): each.config for each in steps},
        k.ENV_WORKSPACE: k.WORKSPACE_MOUNT if run.spec.workspace is not None else None,
        k.ENV_REJECTS: _rejects_directory(run) if run.spec.workspace is not None else None,
    }
    if check is not None:
        values |= _check_environment(check)
        values |= {
            pool.ENV_POOL_URL: check.pool_url,
            pool.ENV_POOL_TOKEN: check.pool_token,
            pool.ENV_POOL_CA: check.ca or None,
        }
    values |= _partition_environment(run, steps[0])
    return _variables(values, step)


def _variables(values: Mapping[str, str | None], step: Step) -> list[dict[str, Any]]:
    """Return variables of a container; those without a value are left out."""
    env: list[dict[str, Any]] = [
        {"name": name, "value": _literal(value)} for name, value in values.items() if value is not None
    ]
    if step.authorization is not None:
        env.append({"name": ENV_HTTP_AUTHORIZATION, "valueFrom": {"secretKeyRef": step.authorization.model_dump()}})
    return env


def _partition_environment(run: IngestRun, step: Step) -> dict[str, str | None]:
    partitions = run.spec.batches.partitions
    if step.stage is not Stage.FETCH or partitions is None:
        return {}
    file = f"{k.WORKSPACE_MOUNT}/{partitions.file}" if partitions.file is not None else None
    return {k.ENV_PARTITIONS: str(partitions.total), k.ENV_PARTITION_FILE: file}


def _workspace_environment(run: IngestRun, attempt: NextAttempt) -> dict[str, str | None]:
    """Return the variables of the stage's input and output directories; none without a workspace."""
    if run.spec.workspace is None:
        return {}
    step, number = attempt.step, attempt.number
    values: dict[str, str | None] = {k.ENV_WORKSPACE: k.WORKSPACE_MOUNT}
    if attempt.input_attempt is not None:
        values[k.ENV_INPUT] = _directory(run, attempt.batch, step.index - 1, attempt.input_attempt)
    if step.stage in (Stage.FETCH, Stage.HOOK):
        values[k.ENV_OUTPUT] = _directory(run, attempt.batch, step.index, number)
    if step.stage is Stage.HOOK:
        values[k.ENV_REJECTS] = f"{_rejects_directory(run)}/{attempt.batch}-{step.name}-{number}"
    return values


def _rejects_directory(run: IngestRun) -> str:
    return f"{k.WORKSPACE_MOUNT}/rejects/{run.metadata.name}/{run.metadata.uid}"


def _cancellation_environment(run: IngestRun) -> dict[str, str | None]:
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
    """Return a directory of one attempt alone, so that a lost pod that still writes cannot spoil a later one."""
    return f"{k.WORKSPACE_MOUNT}/{k.RUNS_DIRECTORY}/{run.metadata.uid}/{batch}/{step}-{attempt}"


def _literal(value: str) -> str:
    """Return a variable's value so that it arrives as it is, though Kubernetes expands $(NAME) and halves each $$.

    Only a NUL is left out, because no process can be given one.
    """
    return value.replace("\0", "").replace("$", "$$")


def _workspace_volume(run: IngestRun) -> list[dict[str, Any]]:
    if run.spec.workspace is None:
        return []
    claim = run.spec.workspace.persistent_volume_claim.claim_name
    return [{"name": "workspace", "persistentVolumeClaim": {"claimName": claim}}]
