"""What Flux and Argo CD say of runs in each phase: their own libraries, over objects of a real API server.

`dev/health` has the libraries: kstatus and the evaluation of `healthCheckExprs` are Flux's, the Lua is Argo CD's. The
files for Argo CD have its own layout, so they can be proposed there as they are: its `health_test.yaml` names objects
in `testdata/`. To write those anew, from the objects of this test: UPDATE_TESTDATA=yes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import pytest
import yaml
from dev.health.tools import Health, ask

from ingestrun.model import names
from tests.api.conftest import REPOSITORY, Cluster, Json, WaitFor, _wait_for
from tests.api.operator_process import OperatorProcess
from tests.api.test_gitops import RUNS
from tests.api.test_lifecycle import HELD, ONE, release, running_pods
from tests.api.test_runs import condition, drained, in_phase, spec
from tests.docs.blocks import Block, blocks

ARGO: Final = REPOSITORY / "manifests" / "argocd" / "resource_customizations" / "ingestrun.dev" / "IngestRun"
PAGE: Final = REPOSITORY / "docs" / "gitops.md"
FAILING: Final = {"fail-attempts": "9", "fail-stage": "publish", "fail-batch": "0"}


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is right for a run."""

    kstatus: str
    argo: str
    message: str
    """What Argo CD shows."""


WAITS: Final = "waiting for the operator"
EXPECTED: Final[Mapping[str, Expected]] = {
    "created": Expected(kstatus="InProgress", argo="Progressing", message=WAITS),
    "pending": Expected(
        kstatus="InProgress",
        argo="Progressing",
        message="run running, which this one resumes, has not ended",
    ),
    "running": Expected(kstatus="InProgress", argo="Progressing", message="Running"),
    "changed": Expected(kstatus="InProgress", argo="Progressing", message=WAITS),
    "suspended": Expected(kstatus="InProgress", argo="Suspended", message="nothing new is started"),
    "backpressured": Expected(kstatus="InProgress", argo="Progressing", message="no node for the nodeSelector"),
    "succeeded": Expected(kstatus="Current", argo="Healthy", message="10 records published in 1 batch"),
    "succeeded-with-failed-batches": Expected(
        kstatus="Current", argo="Healthy", message="10 records published in 1 batch; 1 batch failed (0)"
    ),
    "failed-draining": Expected(kstatus="Failed", argo="Degraded", message="the run took longer than its"),
    "failed": Expected(kstatus="Failed", argo="Degraded", message="batch 0, publish, attempt 1: Error: exit code 1"),
    "cancelled-draining": Expected(kstatus="Failed", argo="Degraded", message="cancelled by field manager"),
    "cancelled-and-changed": Expected(kstatus="InProgress", argo="Degraded", message="cancelled by field manager"),
    "cancelled": Expected(kstatus="Failed", argo="Degraded", message="cancelled by field manager"),
    "cancelled-before-it-began": Expected(kstatus="Failed", argo="Degraded", message="cancelled"),
    "terminating": Expected(kstatus="Terminating", argo="Progressing", message="Pending deletion"),
    "stale": Expected(
        kstatus="Failed", argo="Degraded", message="cancelled by ingestrun-operator: no progress for 2 s"
    ),
}
"""By state. A Cancelled run whose spec has just been changed is InProgress to kstatus as any object is until its change
has been observed, some milliseconds later."""


@pytest.fixture(scope="module")
def runs(cluster: Cluster, crd: Json, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Json]]:
    """An object of each state, as the API server had it."""
    assert crd
    namespace = f"ir-test-health-{os.getpid()}"
    cluster.core.create_namespace({"metadata": {"name": namespace, "labels": {"ingestrun.dev/test": "true"}}})  # type: ignore[arg-type]
    operator = OperatorProcess(
        kubeconfig=cluster.kubeconfig,
        context=cluster.context,
        namespace=namespace,
        log=tmp_path_factory.mktemp("operator") / "operator.log",
    )
    try:
        yield _each_state(cluster, namespace, operator)
    finally:
        operator.stop()
        cluster.core.delete_namespace(namespace)


def _each_state(cluster: Cluster, namespace: str, operator: OperatorProcess) -> dict[str, Json]:
    found: dict[str, Json] = {}
    at = "cancelled-before-it-began"
    for name, made in {
        "running": spec(HELD, batches=ONE),
        "pending": spec(HELD, batches=ONE, resumeFrom={"name": "running"}),
        "suspended": spec(HELD, batches=ONE, suspend=True),
        "backpressured": spec(HELD, batches=ONE, podTemplate={"nodeSelector": {"disk": "none"}}),
        "succeeded": spec(batches=ONE),
        "succeeded-with-failed-batches": spec(
            FAILING, batches={"partitions": {"count": 2}}, retries=0, onBatchFailure="Continue"
        ),
        "failed-draining": spec(HELD, batches=ONE, activeDeadlineSeconds=3600),
        "failed": spec(FAILING, batches=ONE, retries=0),
        "cancelled": spec(HELD, batches=ONE),
        at: spec(batches=ONE, cancel=True),
        "stale": spec(HELD, batches=ONE, staleAfterSeconds=3600),
    }.items():
        cluster.create_run(namespace, made, name=name)
    found["created"] = cluster.run(namespace, "running")
    operator.start()

    def waited(name: str, phase: str) -> Json:
        return _wait_for(in_phase(cluster, namespace, name, phase), 120, f"{name} to be {phase}")

    for name in ("running", "failed-draining", "cancelled", "stale"):
        _wait_for(lambda name=name: running_pods(cluster, namespace, name), 120, f"{name}'s pod")  # type: ignore[misc]
    cluster.patch_spec(namespace, "failed-draining", activeDeadlineSeconds=1)
    cluster.patch_spec(namespace, "stale", staleAfterSeconds=2)
    cluster.cancel(namespace, "cancelled", "wrong source")
    found["failed-draining"] = waited("failed-draining", "Failed")
    found["cancelled-draining"] = waited("cancelled", "Cancelled")
    found["stale"] = waited("stale", "Cancelled")
    for name, phase in (("running", "Running"), ("pending", "Pending"), ("suspended", "Suspended")):
        found[name] = waited(name, phase)
    for name in ("succeeded", "succeeded-with-failed-batches"):
        found[name] = waited(name, "Succeeded")
    for name in ("failed", at):
        waited(name, "Failed" if name == "failed" else "Cancelled")
        found[name] = _wait_for(drained(cluster, namespace, name), 60, f"{name} to be drained")

    def held_back() -> Json:
        run = cluster.run(namespace, "backpressured")
        assert condition(run, "Backpressured").get("status") == "True"
        return run

    found["backpressured"] = _wait_for(held_back, 60, "Backpressured")
    release(cluster, namespace, "cancelled")
    found["cancelled"] = _wait_for(drained(cluster, namespace, "cancelled"), 60, "Drained")
    delete = cluster.custom.delete_namespaced_custom_object
    found["terminating"] = delete(*RUNS, namespace, names.PLURAL, "failed-draining", propagation_policy="Foreground")
    operator.kill()
    # What a GitOps tool changes while the operator is away: nothing that has ended is in progress again.
    found["changed"] = cluster.patch_spec(namespace, "running", suspend=True)
    found["cancelled-and-changed"] = cluster.patch_spec(namespace, "cancelled", cancel=None)
    return found


def judged(tool: str, runs: Mapping[str, Json], *files: Path) -> dict[str, Health]:
    """What a tool says of each."""
    return dict(zip(runs, ask(tool, list(runs.values()), *files), strict=True))


def block_with(words: str) -> Block:
    """The one block of the page about GitOps that has these words."""
    (found,) = [block for block in blocks(PAGE) if block.language == "yaml" and words in block.text]
    return found


def test_kstatus(runs: dict[str, Json]) -> None:
    """Flux' `wait: true` without more, and everything else that reads conditions as Kubernetes' own tools do."""
    assert {state: said.status for state, said in judged("kstatus", runs).items()} == {
        state: right.kstatus for state, right in EXPECTED.items()
    }


def test_kstatus_shows_why_a_run_has_failed_or_was_cancelled(runs: dict[str, Json]) -> None:
    said = judged("kstatus", runs)
    assert said["failed"].message.startswith("batch 0, publish, attempt 1: Error: exit code 1")
    assert said["cancelled"].message == "cancelled by field manager OpenAPI-Generator: wrong source"


def test_flux_expressions(runs: dict[str, Json], tmp_path: Path) -> None:
    """The expressions of the docs say what kstatus says; with expressions, Flux asks nothing about a deletion."""
    checks = tmp_path / "checks.yaml"
    checks.write_text(block_with("healthCheckExprs").text)
    said = {state: health.status for state, health in judged("flux", runs, checks).items()}
    assert said.pop("terminating") == "InProgress"
    assert said == {state: right.kstatus for state, right in EXPECTED.items() if state != "terminating"}


def test_argo_cd(runs: dict[str, Json]) -> None:
    said = judged("argocd", runs, ARGO / "health.lua")
    assert {state: health.status for state, health in said.items()} == {
        state: right.argo for state, right in EXPECTED.items()
    }
    wrong = {
        state: said[state].message for state, right in EXPECTED.items() if right.message not in said[state].message
    }
    assert wrong == {}


def test_cancelled_is_never_progressing_nor_suspended(runs: dict[str, Json]) -> None:
    cancelled = {state: run for state, run in runs.items() if run["status"].get("phase") == "Cancelled"}
    assert len(cancelled) == 5
    assert {said.status for said in judged("argocd", cancelled, ARGO / "health.lua").values()} == {"Degraded"}
    observed = {state: run for state, run in cancelled.items() if state != "cancelled-and-changed"}
    assert {said.status for said in judged("kstatus", observed).values()} == {"Failed"}


def test_the_files_for_argo_cd_are_in_its_layout_and_of_these_runs(runs: dict[str, Json], wait_for: WaitFor) -> None:
    """`health_test.yaml` as Argo CD's own test reads it. The objects that it names are like those of this test."""
    if os.environ.get("UPDATE_TESTDATA"):
        write_testdata(runs)
    tests = yaml.safe_load((ARGO / "health_test.yaml").read_text())["tests"]
    stored = {Path(test["inputPath"]).stem: yaml.safe_load((ARGO / test["inputPath"]).read_text()) for test in tests}
    assert stored.keys() == EXPECTED.keys() == runs.keys()
    assert {path.name for path in (ARGO / "testdata").iterdir()} == {f"{state}.yaml" for state in stored}
    said = judged("argocd", stored, ARGO / "health.lua")
    assert [vars(said[Path(test["inputPath"]).stem]) for test in tests] == [test["healthStatus"] for test in tests]
    for state, run in runs.items():
        assert shape(stored[state]) == shape(run), f"{state}: run this test with UPDATE_TESTDATA=yes"


def shape(run: Json) -> object:
    """What a health check can look at: the phase, whether all is observed, and the conditions but for their words."""
    status = run["status"]
    conditions = [(c["type"], c["status"], c["reason"]) for c in status.get("conditions", ())]
    return status.get("phase"), status.get("observedGeneration") == run["metadata"]["generation"], conditions


def write_testdata(runs: Mapping[str, Json]) -> None:
    """Write the objects of this test, without what the API server keeps for itself, and what Argo CD says of them."""
    (ARGO / "testdata").mkdir(exist_ok=True)
    for state, run in runs.items():
        kept = {key: value for key, value in run["metadata"].items() if key != "managedFields"}
        body = {**run, "metadata": {**kept, "namespace": "default"}}
        (ARGO / "testdata" / f"{state}.yaml").write_text(yaml.safe_dump(body, sort_keys=False))
    tests = [
        {"healthStatus": vars(health), "inputPath": f"testdata/{state}.yaml"}
        for state, health in judged("argocd", runs, ARGO / "health.lua").items()
    ]
    (ARGO / "health_test.yaml").write_text(yaml.safe_dump({"tests": tests}, sort_keys=False))


def test_the_docs_have_the_health_check_as_it_is() -> None:
    (script,) = block_with("resource.customizations.health").body["data"].values()
    assert script == (ARGO / "health.lua").read_text()
