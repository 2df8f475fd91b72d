"""The budget of API calls: a batch of three Jobs costs the operator at most 5 writes and 3 reads.

Deterministic in what it asserts: whatever order the watches show things in, the operator may coalesce, never repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.api.conftest import Cluster, WaitFor
from tests.race.account import Operator
from tests.race.calls import READS_PER_BATCH, WRITES_PER_BATCH, count_calls, reads, table, writes

BATCHES = 12
ONCE_WRITES = 2
"""The first claim, and the end."""
ONCE_READS = 5
"""The resync's list of runs and of all Jobs, the first look at the run's Jobs and pods; the last list after the end."""


def test_a_batch_keeps_to_its_budget_of_calls(
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    wait_for: WaitFor,
    say: Callable[[str], None],
) -> None:
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    operator.start()
    try:
        calls = count_calls(cluster, namespace, audit_path, wait_for, batches=BATCHES)
    finally:
        operator.stop()
    say("\n" + "\n".join(table(calls, BATCHES)))
    assert calls["create jobs"] == 3 * BATCHES
    assert writes(calls) <= WRITES_PER_BATCH * BATCHES + ONCE_WRITES, calls
    assert reads(calls) <= READS_PER_BATCH * BATCHES + ONCE_READS, calls
