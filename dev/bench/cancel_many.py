"""`make bench-cancel-many`: 500 runs with a running pod each, cancelled as fast as this machine can patch."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from tests.api.conftest import Cluster
from tests.race.account import Operator
from tests.race.bulk import Bulk, percentiles
from tests.race.checker import latency_ms

RUNS = int(os.environ.get("BENCH_RUNS") or 500)


def test_cancel_many(
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    say: Callable[[str], None],
) -> None:
    """Cancel all runs and print the latencies from the audit log."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    bulk = Bulk(cluster, namespace, audit_path)
    operator.start()
    try:
        names = bulk.start(RUNS, pods=1, label="many")
        bulk.cancel(names)
        bulk.await_cancelled("many", RUNS)
        runs = [bulk.histories()[name] for name in names]
        bulk.let_go("many")
        bulk.await_drained("many", RUNS)
    finally:
        operator.stop()
    asked = sorted(run.requested.answered for run in runs if run.requested)
    stored = sorted(run.terminal.answered for run in runs if run.terminal)
    latencies = [latency for run in runs if (latency := latency_ms(run)) is not None]
    say(f"\n{len(runs)} runs, a running pod each; patched within {(asked[-1] - asked[0]) / 1e6:.2f} s")
    say(f"patch answered to Cancelled stored: {percentiles(latencies)}")
    say(f"the first patch answered to the last Cancelled stored: {(stored[-1] - asked[0]) / 1e6:.2f} s")
    say(f"the last patch answered to the last Cancelled stored: {(stored[-1] - asked[-1]) / 1e6:.2f} s")
