"""The fence: no Job of a Cancelled run is stored any more, however late it arrives. And how the policies are installed.

They are installed as the component has them but for two things: under names of this session's own, and bound to the
namespaces of this session alone. So they neither disturb who else uses the cluster, nor what is installed there.
"""

from __future__ import annotations

import copy
import os
import subprocess
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from kubernetes import client, config

from ingestrun.kube.errors import Denied, error_for
from ingestrun.model import names
from ingestrun.model.run import IngestRun
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.batch.pipeline import steps_of
from ingestrun.planner.batch.state import NextAttempt
from ingestrun.planner.jobs.manifest import WorkerImage, job_manifest
from tests.api.conftest import REPOSITORY, Cluster, Json, WaitFor, _wait_for, refusal
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import (
    Audit,
    assert_nothing_started_after_cancelled,
    created_jobs,
    drained,
    in_phase,
    spec,
)

COMPONENT: Final = REPOSITORY / "manifests" / "components" / "admission"
VALIDATING: Final = COMPONENT / "validating"
BASE: Final = REPOSITORY / "manifests" / "base"
ADMISSION: Final = ("admissionregistration.k8s.io", "v1")
PLURALS: Final = {
    "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
    "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
    "MutatingAdmissionPolicy": "mutatingadmissionpolicies",
    "MutatingAdmissionPolicyBinding": "mutatingadmissionpolicybindings",
}
SESSION_LABEL: Final = "ingestrun.dev/test-admission"
LABEL: Final = "ingestrun.dev/cancelled"
ANNOTATION: Final = names.ANNOTATION_REQUESTED_BY
OPERATOR_NAMESPACE: Final = "ingestrun-system"
OPERATOR_ACCOUNT: Final = "ingestrun-operator"
OPERATOR_USER: Final = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{OPERATOR_ACCOUNT}"
SENTENCE: Final = "the run {} is Cancelled, no Job is created for it any more"


# ------------------------------------------------------------------------------------- installing the policies


def component(folder: Path) -> list[Json]:
    """The objects of a component, of those that it includes too."""
    listed = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = [body for other in listed.get("components", ()) for body in component(folder / other)]
    for name in listed.get("resources", ()):
        found += [body for body in yaml.safe_load_all((folder / name).read_text()) if body]
    return found


def labelled_namespace(cluster: Cluster, labels: Mapping[str, str]) -> str:
    name = f"ir-test-{uuid.uuid4().hex[:10]}"
    meta = client.V1ObjectMeta(name=name, labels={"ingestrun.dev/test": "true", **labels})
    cluster.core.create_namespace(client.V1Namespace(metadata=meta))
    return name


@contextmanager
def installed(cluster: Cluster, policies: Sequence[Json]) -> Iterator[dict[str, str]]:
    """The policies with their bindings, effective; gives the labels of a namespace that they hold for."""
    suffix = uuid.uuid4().hex[:8]
    labels = {SESSION_LABEL: suffix}
    bodies = list(policies)
    # The bindings last: they name the policies. What mutates comes after the lock, which could not be seen behind it.
    bodies.sort(key=lambda body: (body["kind"].startswith("Mutating"), body["kind"].endswith("Binding")))
    made: list[tuple[str, str]] = []
    probe = labelled_namespace(cluster, labels)
    try:
        for body in bodies:
            renamed = copy.deepcopy(body)
            renamed["metadata"]["name"] += f"-{suffix}"
            if "policyName" in renamed["spec"]:
                renamed["spec"]["policyName"] += f"-{suffix}"
                renamed["spec"]["matchResources"] = {"namespaceSelector": {"matchLabels": labels}}
            plural = PLURALS[body["kind"]]
            cluster.custom.create_cluster_custom_object(*ADMISSION, plural, renamed, field_validation="Strict")
            made.append((plural, renamed["metadata"]["name"]))
            if body["kind"] == "ValidatingAdmissionPolicyBinding":
                _await_effect(cluster, probe, body["metadata"]["name"])
        if any(kind == "mutatingadmissionpolicies" for kind, _ in made):
            _await_effect(cluster, probe, "ingestrun-requested-by")
        yield labels
    finally:
        for plural, name in reversed(made):
            cluster.custom.delete_cluster_custom_object(*ADMISSION, plural, name)
        cluster.core.delete_namespace(probe)


def _await_effect(cluster: Cluster, namespace: str, policy: str) -> None:
    """Nothing tells when a policy holds: ask with requests that it answers for, by dry run."""
    minimal = spec()

    def marks() -> bool:
        try:
            cluster.create_run(namespace, minimal, metadata={"annotations": {ANNOTATION: "probe"}}, dry_run=True)
        except client.ApiException as error:
            return int(error.status or 0) == 403
        return False

    def stamped() -> bool:
        made = cluster.create_run(namespace, {**minimal, "cancel": True}, dry_run=True)
        return ANNOTATION in made["metadata"].get("annotations", {})

    def fenced() -> bool:
        if not cluster.runs(namespace):
            cluster.create_run(namespace, {**minimal, "cancel": True}, name="p", metadata={"labels": {LABEL: "true"}})
            cluster.patch_status(namespace, "p", {"phase": "Cancelled"})
        run = cluster.run(namespace, "p")
        return post_late(cluster, render(run)) is not None

    def kept_to_cancel() -> bool:
        if not cluster.runs(namespace):
            cluster.create_run(namespace, {**minimal, "suspend": True}, name="p")
            let(cluster, namespace, "prober", verbs=["list", "patch"])
        try:
            as_user(cluster, "prober").patch_run(namespace, "p", {"metadata": {"labels": {"try": uuid.uuid4().hex}}})
        except client.ApiException as error:
            return int(error.status or 0) == 403
        return False

    checks: dict[str, Callable[[], bool]] = {
        "ingestrun-canceller": kept_to_cancel,
        "ingestrun-cancel-marks": marks,
        "ingestrun-requested-by": stamped,
        "ingestrun-cancelled-fence": fenced,
    }
    _wait_for(checks[policy], 30, f"{policy} to hold")


@pytest.fixture(scope="module")
def labels(cluster: Cluster, crd: Json) -> Iterator[dict[str, str]]:
    """Both policies and the stamp, installed."""
    assert crd
    with installed(cluster, component(COMPONENT)) as found:
        yield found


@pytest.fixture
def namespace(cluster: Cluster, labels: dict[str, str]) -> Iterator[str]:
    """A namespace of the test's own, in which the policies hold."""
    name = labelled_namespace(cluster, labels)
    yield name
    cluster.core.delete_namespace(name)


# --------------------------------------------------------------------------------------------- who is asking


def as_user(cluster: Cluster, user: str) -> Cluster:
    """The API server as that user sees it, by impersonation."""
    api = config.new_client_from_config(  # type: ignore[no-untyped-call]
        config_file=str(cluster.kubeconfig), context=cluster.context, persist_config=False
    )
    api.set_default_header("Impersonate-User", user)
    return replace(cluster, api=api)


ENGINEER: Final = ("create", "get", "list", "patch", "update", "delete")


def let(cluster: Cluster, namespace: str, *users: str, verbs: Sequence[str] = ENGINEER) -> None:
    """Let the users do with the namespace's runs what a data engineer may: not write their status."""
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    rules = [{"apiGroups": [names.GROUP], "resources": [names.PLURAL], "verbs": list(verbs)}]
    rbac.create_namespaced_role(namespace, {"metadata": {"name": "engineer"}, "rules": rules})
    subjects = [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"} for user in users]
    reference = {"kind": "Role", "name": "engineer", "apiGroup": "rbac.authorization.k8s.io"}
    rbac.create_namespaced_role_binding(
        namespace, {"metadata": {"name": "engineer"}, "roleRef": reference, "subjects": subjects}
    )
    for user in users:
        _wait_for(partial(may_list, as_user(cluster, user), namespace), 10, f"the rights of {user}")


def may_list(cluster: Cluster, namespace: str) -> bool:
    return cluster.runs(namespace) is not None


@contextmanager
def existing() -> Iterator[None]:
    """What is there already need not be created."""
    try:
        yield
    except client.ApiException as error:
        if error.status != 409:
            raise


@contextmanager
def operators_account(cluster: Cluster, folder: Path) -> Iterator[Path]:
    """A kubeconfig of the operator's own service account, with the rights that manifests/base gives it."""
    (role,) = [
        body
        for body in yaml.safe_load_all((BASE / "rbac.yaml").read_text())
        if body["kind"] == "ClusterRole" and body["metadata"]["name"] == OPERATOR_ACCOUNT
    ]
    core: Any = cluster.core
    with existing():
        core.create_namespace({"metadata": {"name": OPERATOR_NAMESPACE}})
    with existing():
        core.create_namespaced_service_account(OPERATOR_NAMESPACE, {"metadata": {"name": OPERATOR_ACCOUNT}})
    rbac: Any = client.RbacAuthorizationV1Api(cluster.api)
    name = f"ir-test-{uuid.uuid4().hex[:10]}"
    rbac.create_cluster_role({"metadata": {"name": name}, "rules": role["rules"]})
    account = {"kind": "ServiceAccount", "name": OPERATOR_ACCOUNT, "namespace": OPERATOR_NAMESPACE}
    reference = {"kind": "ClusterRole", "name": name, "apiGroup": "rbac.authorization.k8s.io"}
    rbac.create_cluster_role_binding({"metadata": {"name": name}, "roleRef": reference, "subjects": [account]})
    try:
        token = core.create_namespaced_service_account_token(
            OPERATOR_ACCOUNT, OPERATOR_NAMESPACE, {"spec": {"expirationSeconds": 3600}}
        )
        kubeconfig = yaml.safe_load(cluster.kubeconfig.read_text())
        for context in kubeconfig["contexts"]:
            context["context"]["user"] = OPERATOR_ACCOUNT
        kubeconfig["users"] = [{"name": OPERATOR_ACCOUNT, "user": {"token": token.status.token}}]
        path = folder / "operator.kubeconfig"
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(kubeconfig))
        yield path
    finally:
        rbac.delete_cluster_role_binding(name)
        rbac.delete_cluster_role(name)


@contextmanager
def operating(cluster: Cluster, namespace: str, folder: Path) -> Iterator[OperatorProcess]:
    """The operator of this checkout, under the account that the policies know it by."""
    with operators_account(cluster, folder) as kubeconfig:
        process = OperatorProcess(
            kubeconfig=kubeconfig, context=cluster.context, namespace=namespace, log=folder / "operator.log"
        )
        process.start()
        try:
            yield process
        finally:
            process.stop()


@pytest.fixture
def operator(cluster: Cluster, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    with operating(cluster, namespace, tmp_path) as process:
        yield process


# ------------------------------------------------------------------------------------------------- the late Job


def render(body: Json, batch: int = 1) -> Json:
    """The Job of a fetch, as the operator makes it."""
    run = IngestRun.read(body)
    create = CreateJob(
        attempt=NextAttempt(batch=batch, step=steps_of(run.spec)[0], number=0, input_attempt=None), cursor="x"
    )
    return job_manifest(run, create, worker=WorkerImage(name="example/worker:1"))


def post_late(cluster: Cluster, job: Json) -> client.ApiException | None:
    """POST it as the operator's client does, by dry run: admission is the same. The refusal; None where it passed."""
    batch: Any = cluster.batch
    try:
        batch.create_namespaced_job(job["metadata"]["namespace"], job, dry_run="All", field_validation="Strict")
    except client.ApiException as error:
        return error
    return None


def relabelled(job: Json, **labels: str | None) -> Json:
    changed = copy.deepcopy(job)
    for key, value in labels.items():
        changed["metadata"]["labels"].pop(f"ingestrun.dev/{key.replace('_', '-')}")
        if value is not None:
            changed["metadata"]["labels"][f"ingestrun.dev/{key.replace('_', '-')}"] = value
    return changed


def test_create_that_is_delayed_past_the_cancel_is_refused(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """The request was on its way when the run was cancelled; it is answered with a sentence, and nothing starts."""
    cluster.create_run(
        namespace, spec({"hold": "true"}, batches={"partitions": {"count": 9}}, parallelism=2), name="held"
    )
    wait_for(lambda: len(cluster.jobs(namespace)) == 2, 60, "two Jobs")
    late = render(cluster.run(namespace, "held"), batch=2)
    assert post_late(cluster, late) is None, "before the cancel it passes"

    cluster.cancel(namespace, "held")
    wait_for(in_phase(cluster, namespace, "held", "Cancelled"), 30, "Cancelled")
    wait_for(lambda: post_late(cluster, late), 5, "the fence to have seen it")
    before = len(created_jobs(audit(namespace)))
    batch: Any = cluster.batch
    with pytest.raises(client.ApiException) as caught:
        batch.create_namespaced_job(namespace, late)
    assert caught.value.status == 403
    assert SENTENCE.format("held") in refusal(caught.value)
    told = error_for(403, (caught.value.body or "").encode(), method="POST")
    assert type(told) is Denied, "the operator's client takes it for what it is"

    assert_nothing_started_after_cancelled(audit, namespace, "held")
    assert len(created_jobs(audit(namespace))) == before
    assert post_late(cluster, relabelled(late, stage="on-cancel")) is None, "the clean-up passes"


@pytest.mark.waits
def test_label_goes_with_the_last_sweep(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """So that cancelled runs of the past cost no create anything. It is there until then: also after Drained."""
    cluster.create_run(namespace, spec({"pending": "true"}), name="swept")
    wait_for(lambda: cluster.jobs(namespace), 60, "a Job")
    answer = cluster.cancel(namespace, "swept")
    assert answer["metadata"]["labels"] == {LABEL: "true"}
    run = wait_for(drained(cluster, namespace, "swept"), 30, "Drained")
    assert run["metadata"]["labels"] == {LABEL: "true"}

    def disarmed() -> bool:
        return LABEL not in cluster.run(namespace, "swept")["metadata"].get("labels", {})

    wait_for(disarmed, 90, "the label to go")
    assert cluster.run(namespace, "swept")["metadata"]["annotations"][ANNOTATION] != ""


def test_armed_by_the_request_itself(cluster: Cluster, namespace: str, wait_for: WaitFor) -> None:
    """No operator is at work: from the write of phase=Cancelled on, whoever writes it, the fence holds."""
    cluster.create_run(namespace, spec(), name="armed")
    cluster.patch_status(namespace, "armed", {"phase": "Running"})
    assert cluster.cancel(namespace, "armed")["metadata"]["labels"][LABEL] == "true"
    late = render(cluster.run(namespace, "armed"))
    assert post_late(cluster, late) is None, "asked for, but not Cancelled yet"
    cluster.patch_status(namespace, "armed", {"phase": "Cancelled"})
    wait_for(lambda: post_late(cluster, late), 5, "the fence to have seen it")


def test_only_jobs_of_that_very_run_are_kept_out(cluster: Cluster, namespace: str, wait_for: WaitFor) -> None:
    for name in ("cancelled", "running"):
        cluster.create_run(namespace, spec(), name=name)
    cluster.cancel(namespace, "cancelled")
    cluster.patch_status(namespace, "cancelled", {"phase": "Cancelled"})
    late = render(cluster.run(namespace, "cancelled"))
    wait_for(lambda: post_late(cluster, late), 5, "the fence to hold")
    assert post_late(cluster, render(cluster.run(namespace, "running"))) is None
    assert post_late(cluster, relabelled(late, run_uid=str(uuid.uuid4()))) is None, "a new run of the same name"
    assert post_late(cluster, relabelled(late, run_uid=None)) is None, "no Job of ours"
    # A stage is not what lets it pass, but that it is the clean-up.
    assert post_late(cluster, relabelled(late, stage="publish")) is not None
    assert post_late(cluster, relabelled(late, stage=None)) is not None


def test_operator_alone_takes_the_fence_away(cluster: Cluster, namespace: str, wait_for: WaitFor) -> None:
    let(cluster, namespace, "bob", OPERATOR_USER)
    cluster.create_run(namespace, spec(), name="armed")
    cluster.cancel(namespace, "armed")
    cluster.patch_status(namespace, "armed", {"phase": "Cancelled"})
    late = render(cluster.run(namespace, "armed"))
    disarm = {"metadata": {"labels": {LABEL: None}}}
    for client_of_bob in (as_user(cluster, "bob"), cluster):
        client_of_bob.patch_run(namespace, "armed", disarm)
        assert cluster.run(namespace, "armed")["metadata"]["labels"] == {LABEL: "true"}
    wait_for(lambda: post_late(cluster, late), 5, "the fence to hold")
    as_user(cluster, OPERATOR_USER).patch_run(namespace, "armed", disarm)
    assert LABEL not in cluster.run(namespace, "armed")["metadata"].get("labels", {})
    wait_for(lambda: post_late(cluster, late) is None, 5, "the fence to be gone")


# ------------------------------------------------------------------------------------------------ the manifests


def built(folder: Path, part: Path) -> list[Json]:
    """An overlay on the base with that component, by kubectl, as a user applies it."""
    overlay = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [os.path.relpath(BASE, folder)],
        "components": [os.path.relpath(part, folder)],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(overlay))
    done = subprocess.run(["kubectl", "kustomize", str(folder)], check=True, capture_output=True, text=True)
    return [body for body in yaml.safe_load_all(done.stdout) if body]


IN_BASE = {"ingestrun-canceller"}


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (COMPONENT, {*IN_BASE, "ingestrun-cancelled-fence", "ingestrun-cancel-marks", "ingestrun-requested-by"}),
        (VALIDATING, {*IN_BASE, "ingestrun-cancelled-fence", "ingestrun-cancel-marks"}),
    ],
    ids=["1.36", "1.30"],
)
def test_overlay_holds_the_base_and_the_policies(part: Path, expected: set[str], tmp_path: Path) -> None:
    bodies = built(tmp_path, part)
    policies = [body for body in bodies if body["kind"] in PLURALS]
    assert {body["metadata"]["name"] for body in policies} == expected
    assert len(policies) == 2 * len(expected), "each with its binding"
    assert [body for body in bodies if body["kind"] == "Deployment"]


def test_policies_know_the_account_that_the_base_gives_the_operator() -> None:
    (account,) = [
        body["metadata"]
        for body in yaml.safe_load_all((BASE / "rbac.yaml").read_text())
        if body["kind"] == "ServiceAccount"
    ]
    user = f"system:serviceaccount:{account['namespace']}:{account['name']}"
    assert user == OPERATOR_USER
    policies = [body for body in component(COMPONENT) if "variables" in body["spec"]]
    assert len(policies) == 2
    for policy in policies:
        # The first, which is where docs/admission.md patches it.
        known = policy["spec"]["variables"][0]
        assert known["name"] == "operator"
        assert known["expression"] == f"request.userInfo.username == '{user}'"
