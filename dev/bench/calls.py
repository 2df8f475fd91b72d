"""`make calls`: the operator's API calls for a chain with one hook, by verb and resource, in all and per batch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.api.conftest import Cluster, WaitFor
from tests.race.account import Operator
from tests.race.calls import READS_PER_BATCH, WRITES_PER_BATCH, count_calls, table

BATCHES = int(os.environ.get("BATCHES") or 20)


def test_calls(
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    wait_for: WaitFor,
    say: Callable[[str], None],
) -> None:
    """Run the chain and print its calls."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    operator.start()
    try:
        calls = count_calls(cluster, namespace, audit_path, wait_for, batches=BATCHES)
    finally:
        operator.stop()
    say(f"\na chain of {BATCHES} batches, one hook: {3 * BATCHES} Jobs")
    for line in table(calls, BATCHES):
        say(line)
    say(f"budget per batch: {WRITES_PER_BATCH} writes, {READS_PER_BATCH} reads")
