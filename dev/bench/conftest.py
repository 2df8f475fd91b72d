"""The benches use the cluster and the fixtures of the race tests; they print, and judge no time."""

from __future__ import annotations

from tests.race.conftest import (
    alone,
    audit_path,
    cluster,
    crd,
    kubeconfig,
    namespace,
    operator_kubeconfig,
    say,
    wait_for,
)

__all__ = ["alone", "audit_path", "cluster", "crd", "kubeconfig", "namespace", "operator_kubeconfig", "say", "wait_for"]
