"""`make bench-cancel`: the time from the answered cancel patch to the stored Cancelled, from the audit log.

Twenty runs of ten running pods each are cancelled, ROUNDS times over, in turns all at once and one every 250 ms. It
prints the latency, and the operator's calls per cancelled run: up to Cancelled, and from there until Drained.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.api.conftest import Cluster
from tests.race.account import Operator
from tests.race.bulk import Bulk, percentiles
from tests.race.checker import latency_ms
from tests.race.history import RunHistory

RUNS = int(os.environ.get("BENCH_RUNS") or 20)
PODS = int(os.environ.get("BENCH_PODS") or 10)
ROUNDS = int(os.environ.get("ROUNDS") or 6)
PAUSE_SECONDS = 0.25


def test_cancel_latency(
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    say: Callable[[str], None],
) -> None:
    """Cancel all runs of each round and print the latencies and calls."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    bulk = Bulk(cluster, namespace, audit_path)
    operator.start()
    latencies: dict[str, list[float]] = {"all at once": [], "one after another": []}
    to_cancelled: Counter[str] = Counter()
    to_drained: Counter[str] = Counter()
    say(f"\n{RUNS} runs of {PODS} running pods, {ROUNDS} rounds")
    try:
        for number in range(ROUNDS):
            label = f"round{number}"
            names = bulk.start(RUNS, pods=PODS, label=label)
            before = bulk.calls()
            how = list(latencies)[number % 2]
            seconds = bulk.cancel(names) if how == "all at once" else bulk.cancel_spaced(names, PAUSE_SECONDS)
            bulk.await_cancelled(label, RUNS)
            cancelled = bulk.calls()
            here = _latencies(bulk.histories()[name] for name in names)
            latencies[how] += here
            say(f"round {number}, {how}: patches took {seconds:.2f} s; {percentiles(here)}")
            bulk.let_go(label)
            bulk.await_drained(label, RUNS)
            to_cancelled += cancelled - before
            to_drained += bulk.calls() - cancelled
            bulk.delete(label)
    finally:
        operator.stop()
    for how, measured in latencies.items():
        say(f"patch answered to Cancelled stored, {how}, {len(measured)} runs: {percentiles(measured)}")
    for title, calls in (("until Cancelled was stored", to_cancelled), ("from there until Drained", to_drained)):
        say(f"calls of the operator per cancelled run, {title}:")
        for call, count in sorted(calls.items()):
            say(f"  {call:<28}{count / (RUNS * ROUNDS):>8.2f}")


def _latencies(runs: Iterable[RunHistory]) -> list[float]:
    return [latency for run in runs if (latency := latency_ms(run)) is not None]
