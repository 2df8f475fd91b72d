"""Fixtures of the race tests, for the benchmarks."""

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
