"""What the race tests and the benches share: the cluster and its fixtures are those of tests/api."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.api.conftest import (
    REPOSITORY,
    Cluster,
    Json,
    alone,
    audit_log,
    cluster,
    crd,
    kubeconfig,
    namespace,
    wait_for,
)
from tests.race.account import service_account_kubeconfig

__all__ = ["alone", "cluster", "crd", "kubeconfig", "namespace", "wait_for"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder needs the cluster, and says so by its marker."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.api)


@pytest.fixture(scope="session")
def audit_path(cluster: Cluster) -> Path:
    """The API server's audit log."""
    path = audit_log(cluster)
    if not path.is_file():
        pytest.fail(f"there is no audit log at {path}: run `make cluster-up NODES=both` first", pytrace=False)
    return path


@pytest.fixture(scope="session")
def operator_kubeconfig(cluster: Cluster, crd: Json, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the operator's process: a token of its own service account. No deployed operator acts meanwhile."""
    assert crd
    assert REPOSITORY.is_dir()
    return service_account_kubeconfig(cluster, tmp_path_factory.mktemp("account") / "kubeconfig")


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    """Print at once, past pytest's capture: a long run shows how far it is."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(text, flush=True)

    return line
