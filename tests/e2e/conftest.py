"""The operator deployed by its own manifests with the images of this checkout, and a place for its runs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.cluster import SYSTEM, Json, Kubectl, wait_for
from tests.e2e.runs import without_image

NAMESPACE = "ingest-e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs a real kubelet, and says so by its marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A failed test brings along what explains it: runs, pods, events, the operator's log."""
    outcome: Any = yield
    report = outcome.get_result()
    kubectl = getattr(item, "funcargs", {}).get("kubectl")
    if report.when != "call" or not report.failed or not isinstance(kubectl, Kubectl):
        return
    for title, arguments in (
        ("runs", ["-n", NAMESPACE, "get", "ingestruns", "-o", "yaml"]),
        ("pods", ["-n", NAMESPACE, "get", "pods", "-o", "wide"]),
        ("events", ["-n", NAMESPACE, "get", "events", "--sort-by=.metadata.creationTimestamp"]),
        ("operator", ["-n", SYSTEM, "logs", "deployment/ingestrun-operator", "--tail=80"]),
        ("operator before", ["-n", SYSTEM, "get", "pods", "-o", "wide"]),
    ):
        try:
            text = kubectl(*arguments)
        except AssertionError as error:
            text = str(error)
        report.sections.append((title, "\n".join(text.splitlines()[-120:])))


@pytest.fixture(scope="session")
def kubectl() -> Kubectl:
    """The context that `python3 dev/cluster env` names: kind's, or with CLUSTER=current the user's, by name."""
    context = os.environ.get("INGESTRUN_CONTEXT")
    if not context:
        pytest.fail("INGESTRUN_CONTEXT is not set: run `make test-e2e`", pytrace=False)
    return Kubectl(context=context)


@pytest.fixture(scope="session")
def operator(kubectl: Kubectl) -> None:
    """The operator as users install it, ready."""
    kubectl("apply", "-k", "build/deploy")
    kubectl("wait", "crd/ingestruns.ingestrun.dev", "--for=condition=Established", "--timeout=180s")
    kubectl("-n", SYSTEM, "rollout", "status", "deployment/ingestrun-operator", "--timeout=180s")


@pytest.fixture(scope="session")
def namespace(kubectl: Kubectl, operator: None) -> Iterator[str]:
    """The demo's data source and volume, in a namespace of the tests' own, with pod security `restricted`."""
    wait_for(lambda: _gone(kubectl, NAMESPACE), seconds=180, what=f"an earlier {NAMESPACE} to go")
    objects: list[Json] = kubectl.rendered("build/demo")
    for found in objects:
        if found["kind"] == "Namespace":
            found["metadata"]["name"] = NAMESPACE
        else:
            found["metadata"]["namespace"] = NAMESPACE
    kubectl.apply(objects)
    kubectl.apply([without_image(NAMESPACE)])
    kubectl("-n", NAMESPACE, "rollout", "status", "deployment/flights", "--timeout=180s")
    yield NAMESPACE
    kubectl("delete", "namespace", NAMESPACE, "--wait=false")


def _gone(kubectl: Kubectl, name: str) -> bool:
    found = kubectl("get", "namespace", name, "--ignore-not-found", "-o", "name").strip()
    if found:
        kubectl("delete", "namespace", name, "--ignore-not-found", "--wait=false")
    return not found
