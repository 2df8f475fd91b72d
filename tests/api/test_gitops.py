"""Cancelling under Flux and Argo CD: their own API calls, against a real API server with an operator at work.

Neither tool is installed. Flux's apply is three calls, written down here as its kustomize-controller makes them
(fluxcd/pkg, ssa/manager_apply.go and ssa/patch.go at e2cfd1a2d181). Argo CD's is kubectl's own code: kubectl plays it.
"""

from __future__ import annotations

import copy
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from kubernetes import client

from ingestrun.model import names
from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_fence import ANNOTATION, COMPONENT, LABEL, component, installed, labelled_namespace, operating
from tests.api.test_runs import (
    Audit,
    assert_nothing_started_after_cancelled,
    created_jobs,
    drained,
    in_phase,
    spec,
)

RUNS: Final = (names.GROUP, names.VERSION)
FLUX: Final = "kustomize-controller"
ARGO: Final = "argocd-controller"
MERGE: Final = {"kustomize.toolkit.fluxcd.io/ssa": "Merge"}
UNDONE: Final = (("kubectl", "Apply"), ("kubectl", "Update"), ("before-first-apply", "Update"), (FLUX, "Update"))
"""Whose changes Flux undoes: managers by their prefix."""


@pytest.fixture(scope="module")
def labels(cluster: Cluster, crd: Json) -> Iterator[dict[str, str]]:
    """The admission policies: what a tool sends must pass them too."""
    assert crd
    with installed(cluster, component(COMPONENT)) as found:
        yield found


@pytest.fixture
def policies() -> bool:
    """Whether the admission policies hold in the test's namespace."""
    return True


@pytest.fixture
def namespace(cluster: Cluster, labels: dict[str, str], policies: bool) -> Iterator[str]:
    """A namespace of the test's own."""
    name = labelled_namespace(cluster, labels if policies else {})
    yield name
    cluster.core.delete_namespace(name)


@pytest.fixture
def operator(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    with operating(cluster, namespace, tmp_path) as process:
        yield process


# ------------------------------------------------------------------------------------------------------- Flux


class Flux:
    """kustomize-controller, for one object."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster, self.namespace = cluster, namespace

    def __call__(self, manifest: Json) -> str:
        """GET, apply by dry run, give the changes of kubectl to itself, and apply if anything is different."""
        name = manifest["metadata"]["name"]
        live = self._live(name)
        wanted = self._apply(manifest, dry_run="All")
        cleaned = live is not None and self._clean_up(manifest, live)
        if not cleaned and live is not None and not drifted(live, wanted):
            return "unchanged"
        self._apply(manifest)
        return "created" if live is None else "configured"

    def prune(self, name: str) -> None:
        self.cluster.custom.delete_namespaced_custom_object(
            *RUNS, self.namespace, names.PLURAL, name, propagation_policy="Background"
        )

    def _live(self, name: str) -> Json | None:
        try:
            return self.cluster.run(self.namespace, name)
        except client.ApiException as error:
            if error.status != 404:
                raise
            return None

    def _apply(self, manifest: Json, **options: str) -> Json:
        applied: Json = self.cluster.custom.patch_namespaced_custom_object(
            *RUNS,
            self.namespace,
            names.PLURAL,
            manifest["metadata"]["name"],
            manifest,
            field_manager=FLUX,
            force=True,
            _content_type="application/apply-patch+yaml",
            **options,
        )
        return applied

    def _clean_up(self, manifest: Json, live: Json) -> bool:
        """Take the fields of the managers that it undoes for its own: its apply then removes what Git lacks."""
        if MERGE.items() & {**live["metadata"].get("annotations", {}), **annotations_of(manifest)}.items():
            return False
        entries = live["metadata"]["managedFields"]
        own = next((entry for entry in entries if (entry["manager"], entry["operation"]) == (FLUX, "Apply")), None)
        kept, merged = [], copy.deepcopy(own)
        for entry in entries:
            if entry is own:
                continue
            undone = not entry.get("subresource") and any(
                entry["manager"].startswith(prefix) and entry["operation"] == operation for prefix, operation in UNDONE
            )
            if not undone:
                kept.append(entry)
            elif merged is None:
                merged = {**entry, "manager": FLUX, "operation": "Apply"}
            else:
                merged["fieldsV1"] = union(merged["fieldsV1"], entry["fieldsV1"])
        patches: list[Json] = []
        if "kubectl.kubernetes.io/last-applied-configuration" in live["metadata"].get("annotations", {}):
            path = "/metadata/annotations/kubectl.kubernetes.io~1last-applied-configuration"
            patches.append({"op": "remove", "path": path})
        if len(kept) < len(entries) - (own is not None):
            patches.append({"op": "replace", "path": "/metadata/managedFields", "value": [*kept, merged]})
        if patches:
            self.cluster.custom.patch_namespaced_custom_object(
                *RUNS,
                self.namespace,
                names.PLURAL,
                live["metadata"]["name"],
                patches,
                field_manager=FLUX,
                _content_type="application/json-patch+json",
            )
        return bool(patches)


def annotations_of(body: Json) -> dict[str, str]:
    found: dict[str, str] = body["metadata"].get("annotations", {})
    return found


def union(one: Json, other: Json) -> Json:
    return {key: union(one.get(key, {}), other.get(key, {})) for key in {**one, **other}}


def drifted(live: Json, wanted: Json) -> bool:
    """Labels, annotations, and everything but metadata and status."""
    for part in ("labels", "annotations"):
        if live["metadata"].get(part, {}) != wanted["metadata"].get(part, {}):
            return True
    return bool(live["spec"] != wanted["spec"])


# ---------------------------------------------------------------------------------------------------- Argo CD


class Argo:
    """The application controller, for one object. By default it applies as kubectl does, on the client's side."""

    def __init__(self, cluster: Cluster, namespace: str, mode: str = "client-side") -> None:
        self.cluster, self.namespace, self.mode = cluster, namespace, mode

    def __call__(self, manifest: Json) -> str:
        if self.mode == "replace":
            try:
                self.cluster.run(self.namespace, manifest["metadata"]["name"])
            except client.ApiException:
                return self._kubectl("create", "-f", "-", given=manifest)
            # Read and PUT: where the operator has written in between it is a conflict, and Argo CD tries again.
            return self._kubectl("replace", "-f", "-", given=manifest, again_on="the object has been modified")
        options = ["--field-manager", ARGO, "-f", "-"]
        if self.mode == "server-side":
            options += ["--server-side", "--force-conflicts"]
        return self._kubectl("apply", *options, given=manifest)

    def prune(self, name: str) -> None:
        self._kubectl("delete", "ingestrun", name, "--cascade=foreground", "--wait=false")

    def _kubectl(self, *arguments: str, given: Json | None = None, again_on: str | None = None) -> str:
        options = ["--kubeconfig", str(self.cluster.kubeconfig), "--context", self.cluster.context]
        for _ in range(5):
            done = subprocess.run(
                ["kubectl", *options, "-n", self.namespace, *arguments],
                input=json.dumps(given) if given is not None else None,
                capture_output=True,
                text=True,
                check=False,
            )
            if again_on is None or again_on not in done.stderr:
                break
        assert done.returncode == 0, f"the sync fails: {done.stderr}"
        return done.stdout.strip().rpartition(" ")[2]


TOOLS: Final[dict[str, Callable[[Cluster, str], Flux | Argo]]] = {
    "Flux": Flux,
    "Argo CD": Argo,
    "Argo CD, server-side": lambda cluster, namespace: Argo(cluster, namespace, "server-side"),
    "Argo CD, replace": lambda cluster, namespace: Argo(cluster, namespace, "replace"),
}


@pytest.fixture(params=list(TOOLS))
def tool(request: pytest.FixtureRequest, cluster: Cluster, namespace: str) -> Flux | Argo:
    return TOOLS[request.param](cluster, namespace)


def manifest(namespace: str, simulate: dict[str, str] | None = None, **changes: Any) -> Json:
    """What is in Git."""
    return {
        "apiVersion": f"{names.GROUP}/{names.VERSION}",
        "kind": names.KIND,
        "metadata": {"name": "run", "namespace": namespace, "labels": {"team": "geo"}},
        "spec": spec(simulate, **changes),
    }


def kubectl_patch(cluster: Cluster, namespace: str, **fields: Any) -> None:
    """`kubectl patch --type merge`, with kubectl's own field manager."""
    cluster.custom.patch_namespaced_custom_object(
        *RUNS,
        namespace,
        names.PLURAL,
        "run",
        {"spec": fields},
        field_manager="kubectl-patch",
        _content_type="application/merge-patch+json",
    )


def asked(cluster: Cluster, namespace: str) -> bool | None:
    found: bool | None = cluster.run(namespace, "run")["spec"].get("cancel")
    return found


def fenced(cluster: Cluster, namespace: str) -> Json:
    """The run, once it carries the label that the fence selects by; empty before."""
    run = cluster.run(namespace, "run")
    return run if run["metadata"]["labels"].get(LABEL) == "true" else {}


def warned(cluster: Cluster, namespace: str) -> list[str]:
    events = cluster.core.list_namespaced_event(namespace, field_selector="reason=CancelCleared").items
    return [f"{event.type}: {event.message}" for event in events]


def held(cluster: Cluster, namespace: str, tool: Flux | Argo, wait_for: WaitFor, **changes: Any) -> Json:
    """A run from Git with two batches in flight and more to come; gives its manifest."""
    body = manifest(namespace, {"hold": "true"}, batches={"partitions": {"count": 9}}, parallelism=2, **changes)
    tool(body)
    wait_for(lambda: len(cluster.jobs(namespace)) == 2, 60, "two Jobs")
    return body


def release(cluster: Cluster, namespace: str) -> None:
    for pod in cluster.pods(namespace):
        free = {"metadata": {"annotations": {"simulate.ingestrun.dev/hold": None}}}
        cluster.core.patch_namespaced_pod(pod.metadata.name, namespace, free)


# ------------------------------------------------------------------------------- cancelled by hand, not in Git


@pytest.mark.parametrize("policies", [True, False], ids=["with the policies", "without"])
def test_patch_survives_the_tools_next_syncs(
    policies: bool,
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    tool: Flux | Argo,
    wait_for: WaitFor,
    audit: Audit,
) -> None:
    """Flux and a replace take `spec.cancel` back, an apply of Argo CD does not. Either way the run stays Cancelled,
    nothing is started, and no sync fails, nor finds anything to do a second time."""
    body = held(cluster, namespace, tool, wait_for)
    kubectl_patch(cluster, namespace, cancel=True)
    cancelled = wait_for(in_phase(cluster, namespace, "run", "Cancelled"), 30, "Cancelled")
    record = {key: cancelled["status"]["cancellation"][key] for key in ("requestedBy", "acceptedAt", "activeBatches")}

    tool(body)
    reverts = isinstance(tool, Flux) or tool.mode == "replace"
    assert asked(cluster, namespace) is (None if reverts else True)
    if reverts:
        assert wait_for(lambda: warned(cluster, namespace), 20, "the Warning") == [
            "Warning: spec.cancel was cleared, which changes nothing: a cancel is final. "
            "To go on, create a new run with resumeFrom: {name: run}"
        ]
    release(cluster, namespace)
    wait_for(drained(cluster, namespace, "run"), 60, "Drained")
    # The fence's label comes with the first look after the cancel, which may be the one that says Drained, just after
    # it. Then the operator is done with the run until its last sweep, a minute after the cancel.
    run = wait_for(lambda: fenced(cluster, namespace), 30, "the fence's label")
    assert run["status"]["phase"] == "Cancelled"
    assert record.items() <= run["status"]["cancellation"].items()
    assert_nothing_started_after_cancelled(audit, namespace, "run")

    version = run["metadata"]["resourceVersion"]
    again = tool(body)
    if isinstance(tool, Flux) or tool.mode != "replace":
        assert again in ("unchanged", "serverside-applied")
        assert cluster.run(namespace, "run")["metadata"]["resourceVersion"] == version, "no tug-of-war"
    assert len(warned(cluster, namespace)) == (1 if reverts else 0), "said once, not at every sync"


def test_flux_leaves_a_patch_alone_where_the_run_says_merge(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    flux = Flux(cluster, namespace)
    body = manifest(namespace, {"hold": "true"})
    body["metadata"]["annotations"] = dict(MERGE)
    flux(body)
    kubectl_patch(cluster, namespace, cancel=True)
    wait_for(in_phase(cluster, namespace, "run", "Cancelled"), 30, "Cancelled")
    assert flux(body) == "unchanged"
    assert asked(cluster, namespace) is True
    assert warned(cluster, namespace) == []


@pytest.mark.waits
def test_late_revert_is_answered_too(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """Flux comes by every few minutes: when it reverts, the operator has long been done with the run."""
    flux = Flux(cluster, namespace)
    body = manifest(namespace, {"pending": "true"})
    flux(body)
    wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    kubectl_patch(cluster, namespace, cancel=True)
    wait_for(lambda: LABEL in cluster.run(namespace, "run")["metadata"]["labels"], 30, "the label")
    wait_for(lambda: LABEL not in cluster.run(namespace, "run")["metadata"]["labels"], 90, "the last sweep")
    assert flux(body) == "configured"
    assert asked(cluster, namespace) is None

    def observed() -> bool:
        run = cluster.run(namespace, "run")
        seen: bool = run["status"]["observedGeneration"] == run["metadata"]["generation"]
        return seen

    wait_for(observed, 20, "the revert to be observed: until then it is unhealthy to Flux")
    assert wait_for(lambda: warned(cluster, namespace), 20, "the Warning")
    assert cluster.run(namespace, "run")["status"]["phase"] == "Cancelled"
    assert LABEL not in cluster.run(namespace, "run")["metadata"]["labels"]
    assert_nothing_started_after_cancelled(audit, namespace, "run")


@pytest.mark.parametrize("reverting", ["Flux", "Argo CD, replace"])
@pytest.mark.parametrize("policies", [True, False], ids=["with the policies", "without"])
def test_patch_that_a_tool_takes_back_while_the_operator_is_down(
    policies: bool,
    reverting: str,
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    wait_for: WaitFor,
    audit: Audit,
) -> None:
    """With the policies the request has left its mark, and is applied on the operator's return, before anything is
    started; without them nothing tells of it any more, and the run goes on."""
    tool = TOOLS[reverting](cluster, namespace)
    body = held(cluster, namespace, tool, wait_for)
    operator.kill()
    kubectl_patch(cluster, namespace, cancel=True, cancellation={"reason": "storm"})
    tool(body)
    assert asked(cluster, namespace) is None
    release(cluster, namespace)
    before = created_jobs(audit(namespace))
    operator.start()
    if not policies:
        wait_for(lambda: len(cluster.jobs(namespace)) > 2, 60, "another Job: the cancel is lost")
        assert warned(cluster, namespace) == []
        return
    run = wait_for(drained(cluster, namespace, "run"), 60, "Drained")
    assert run["status"]["phase"] == "Cancelled"
    assert created_jobs(audit(namespace)) == before
    record = run["status"]["cancellation"]
    assert record["requestedBy"] == cluster.run(namespace, "run")["metadata"]["annotations"][ANNOTATION]
    assert "reason" not in record, "it went with the revert"
    (warning,) = wait_for(lambda: warned(cluster, namespace), 20, "the Warning")
    assert warning.startswith("Warning: spec.cancel was cleared, which changes nothing")
    assert tool(body), "the next sync has nothing to trip over"
    assert cluster.run(namespace, "run")["status"]["phase"] == "Cancelled"


@pytest.mark.parametrize("written", [False, True], ids=["taken out of Git again", "cancel: false in Git"])
def test_cancel_cleared_in_git_is_accepted_and_changes_nothing(
    written: bool,
    cluster: Cluster,
    namespace: str,
    operator: OperatorProcess,
    tool: Flux | Argo,
    wait_for: WaitFor,
    audit: Audit,
) -> None:
    body = held(cluster, namespace, tool, wait_for, **({"cancel": False} if written else {}))
    if written:
        kubectl_patch(cluster, namespace, cancel=True)
    else:
        tool({**body, "spec": {**body["spec"], "cancel": True}})
    wait_for(in_phase(cluster, namespace, "run", "Cancelled"), 30, "Cancelled")
    tool(body)
    assert not asked(cluster, namespace)
    assert wait_for(lambda: warned(cluster, namespace), 20, "the Warning")
    release(cluster, namespace)
    assert wait_for(drained(cluster, namespace, "run"), 60, "Drained")["status"]["phase"] == "Cancelled"
    assert_nothing_started_after_cancelled(audit, namespace, "run")


# ----------------------------------------------------------------------------------------- cancelled in Git


def test_cancel_in_git_cancels_a_running_run(
    cluster: Cluster, namespace: str, operator: OperatorProcess, tool: Flux | Argo, wait_for: WaitFor, audit: Audit
) -> None:
    body = held(cluster, namespace, tool, wait_for)
    body["spec"] |= {"cancel": True, "cancellation": {"reason": "the archive moves first"}}
    tool(body)
    run = wait_for(in_phase(cluster, namespace, "run", "Cancelled"), 30, "Cancelled")
    assert run["status"]["cancellation"]["reason"] == "the archive moves first"
    release(cluster, namespace)
    wait_for(drained(cluster, namespace, "run"), 60, "Drained")
    assert_nothing_started_after_cancelled(audit, namespace, "run")
    tool(body)
    assert asked(cluster, namespace) is True
    assert warned(cluster, namespace) == []


def test_cancel_in_git_at_creation_starts_nothing(
    cluster: Cluster, namespace: str, operator: OperatorProcess, tool: Flux | Argo, wait_for: WaitFor, audit: Audit
) -> None:
    body = manifest(namespace, cancel=True)
    tool(body)
    wait_for(drained(cluster, namespace, "run"), 30, "Drained")
    assert cluster.run(namespace, "run")["status"]["phase"] == "Cancelled"
    tool(body)
    assert created_jobs(audit(namespace)) == []


@pytest.mark.parametrize("policies", [True, False], ids=["with the policies", "without"])
def test_manifest_that_carries_the_marks_of_an_old_run_is_accepted(
    policies: bool, cluster: Cluster, namespace: str, operator: OperatorProcess, tool: Flux | Argo, wait_for: WaitFor
) -> None:
    """`kubectl get -o yaml` into Git: with the policies they are dropped, and without they mean nothing."""
    body = manifest(namespace)
    body["metadata"] |= {"labels": {LABEL: "true"}, "annotations": {ANNOTATION: "mallory"}}
    tool(body)
    wait_for(lambda: cluster.jobs(namespace), 60, "a Job: it is not cancelled")
    tool(body)


# ------------------------------------------------------------------------------------------------------ prune


def test_prune_takes_the_run_and_its_jobs_and_a_new_one_starts_anew(
    cluster: Cluster, namespace: str, operator: OperatorProcess, tool: Flux | Argo, wait_for: WaitFor, audit: Audit
) -> None:
    held(cluster, namespace, tool, wait_for)
    first = cluster.run(namespace, "run")["metadata"]["uid"]
    tool.prune("run")
    wait_for(lambda: not cluster.runs(namespace) and not cluster.jobs(namespace), 60, "the run and its Jobs to go")
    wait_for(lambda: not cluster.pods(namespace), 60, "the pods to go")
    before = len(created_jobs(audit(namespace)))
    assert before == 2

    held(cluster, namespace, tool, wait_for)
    run = cluster.run(namespace, "run")
    assert run["metadata"]["uid"] != first
    assert run["status"]["batches"]["claimed"] == "0-1"
    assert {job.metadata.labels[names.LABEL_RUN_UID] for job in cluster.jobs(namespace)} == {run["metadata"]["uid"]}
    fresh = created_jobs(audit(namespace))[before:]
    assert len(fresh) == 2
    assert not set(fresh) & set(created_jobs(audit(namespace))[:before]), "no name is shared with the run before"


def test_cancelled_run_pruned_and_created_again_is_a_new_run(
    cluster: Cluster, namespace: str, operator: OperatorProcess, tool: Flux | Argo, wait_for: WaitFor
) -> None:
    """The old cancel, its fence and its name hold for the old UID alone."""
    body = held(cluster, namespace, tool, wait_for)
    kubectl_patch(cluster, namespace, cancel=True)
    wait_for(in_phase(cluster, namespace, "run", "Cancelled"), 30, "Cancelled")
    tool.prune("run")
    wait_for(lambda: not cluster.runs(namespace) and not cluster.jobs(namespace), 60, "the run and its Jobs to go")
    tool(body)
    wait_for(lambda: len(cluster.jobs(namespace)) == 2, 60, "two Jobs")
    run = cluster.run(namespace, "run")
    assert run["status"]["phase"] == "Running"
    assert "cancellation" not in run["status"]
    assert LABEL not in run["metadata"]["labels"]
