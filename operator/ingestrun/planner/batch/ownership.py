"""The ownership of Jobs and pods: which of those that carry a run's labels are the run's own.

Labels can be copied, as can a whole Job (`kubectl get job -o json`, edited and created under another name). So a Job is
a run's own only if the run is its controlling owner, by UID, **and** it has the one name that the Job of this attempt
can have. A pod is a run's own only if the Job that controls it has that name. Everything else is ignored, whatever
labels it carries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ingestrun.model import contract as k
from ingestrun.model import names
from ingestrun.model.contract import Stage

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class OrphanedJob:
    """A Job that the operator has created, and that has lost its owner (`kubectl delete --cascade=orphan`)."""

    run: names.RunKey
    run_uid: str
    name: str
    uid: str


def foreign_job_reason(job: Object) -> str | None:
    """Return why a Job is not the own Job of the run that its label names, as a sentence; None if it is."""
    meta = job["metadata"]
    owner = _controller(meta, kind=names.KIND)
    if owner is None or owner.get("uid") != (meta.get("labels") or {}).get(names.LABEL_RUN_UID):
        return "the run that its labels name is not its controlling owner"
    expected = _job_name(meta, _template_spec(job), run_name=str(owner.get("name")))
    if meta["name"] != expected:
        return f"it has the labels of {expected or 'no attempt'}, and another name"
    return None


def foreign_pod_reason(pod: Object) -> str | None:
    """Return why a pod does not belong to the run that its label names, as a sentence; None if it does.

    Its Job may be gone, so the Job's name decides, and the caller leaves out the pods of Jobs known to be foreign.
    """
    meta, spec = pod["metadata"], pod.get("spec") or {}
    owner = _controller(meta, kind="Job")
    if owner is None:
        return "no Job is its controlling owner"
    if owner.get("name") != _job_name(meta, spec, run_name=_variable(spec, k.ENV_RUN_NAME) or ""):
        return f"it is of Job {owner.get('name')}, which is none of the run's"
    return None


def orphaned_job(job: Object) -> OrphanedJob | None:
    """Return a Job as an orphan, if all of it shows that the operator created it, and it has no controlling owner.

    The server's own record of the fields' managers says who created it; a copy made by a user has another manager, and
    a copy in another namespace has the original's namespace in its environment. Whether its run is gone is not decided
    here: that takes a look at the API server.
    """
    meta, spec = job["metadata"], _template_spec(job)
    labels = meta.get("labels") or {}
    run_name, run_uid = _variable(spec, k.ENV_RUN_NAME), labels.get(names.LABEL_RUN_UID)
    ours = (
        labels.get(names.LABEL_MANAGED_BY) == names.OPERATOR_NAME
        and any(entry.get("manager") == names.OPERATOR_NAME for entry in meta.get("managedFields") or ())
        and not any(reference.get("controller") for reference in meta.get("ownerReferences") or ())
        and _variable(spec, k.ENV_RUN_NAMESPACE) == meta["namespace"]
        and _variable(spec, k.ENV_RUN_UID) == run_uid
    )
    if not ours or run_name is None or run_uid is None or meta["name"] != _job_name(meta, spec, run_name=run_name):
        return None
    run = names.RunKey(namespace=meta["namespace"], name=run_name)
    return OrphanedJob(run=run, run_uid=run_uid, name=meta["name"], uid=meta["uid"])


def _controller(meta: Object, *, kind: str) -> Object | None:
    references = meta.get("ownerReferences") or ()
    return next((ref for ref in references if ref.get("controller") and ref.get("kind") == kind), None)


def _job_name(meta: Object, pod_spec: Object, *, run_name: str) -> str | None:
    """Return the one name that the Job with these labels and containers can have; None if the labels are incomplete."""
    labels = meta.get("labels") or {}
    try:
        run_uid, stage = labels[names.LABEL_RUN_UID], labels[names.LABEL_STAGE]
        subject = names.LABEL_WORKER if stage == Stage.WORKER.value else names.LABEL_BATCH
        batch, step, attempt = (int(labels[label]) for label in (subject, names.LABEL_STEP, names.LABEL_ATTEMPT))
    except (KeyError, ValueError):
        return None
    part = stage if stage != Stage.HOOK.value else names.hook_job_part(step, _variable(pod_spec, k.ENV_HOOK) or "")
    return names.job_name(run_name=run_name, run_uid=run_uid, batch=batch, step_name=part, attempt=attempt)


def _template_spec(job: Object) -> Object:
    spec: Object = ((job.get("spec") or {}).get("template") or {}).get("spec") or {}
    return spec


def _variable(pod_spec: Object, name: str) -> str | None:
    """Return the value of a variable of the contract, from whichever container has it."""
    return next(_values(pod_spec, name), None)


def _values(pod_spec: Object, name: str) -> Iterator[str]:
    for container in pod_spec.get("containers") or ():
        for variable in container.get("env") or ():
            if variable.get("name") == name and "value" in variable:
                yield str(variable["value"]).replace("$$(", "$(")
