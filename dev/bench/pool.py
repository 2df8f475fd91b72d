"""`make bench-pool`: what a pool's batch costs the operator, and how long a worker waits for an answer.

BENCH_RUNS runs of WORKERS simulated workers each, which are real HTTP clients, take BATCHES batches of 0.2 s each in
all; then one run of 100 workers takes as many. Prints batches per second, the operator's CPU time and writes a batch,
and how long a claim took. Whether the runs end as they should is all that is judged.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from tests.api.conftest import Cluster, WaitFor
from tests.api.operator_process import OperatorProcess, api_settings, free_port
from tests.race.calls import is_event, is_watch, reads, writes
from tests.race.history import AuditTail
from tests.race.pool_workers import Fleet, Habits, bound_claim, pool_spec

from dev.bench.process import cpu_seconds, resident_mib
from dev.bench.throughput import Course

RUNS: Final = int(os.environ.get("BENCH_RUNS") or 20)
WORKERS: Final = int(os.environ.get("WORKERS") or 5)
BATCHES: Final = int(os.environ.get("BATCHES") or 4000)
BATCH_SECONDS: Final = 0.2
THREADS: Final = 8


def _percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


@pytest.mark.parametrize(("runs", "workers"), [(RUNS, WORKERS), (1, 100)])
def test_pool(
    runs: int,
    workers: int,
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    wait_for: WaitFor,
    say: Callable[[str], None],
) -> None:
    """The bench."""
    operator = pool_operator(cluster, operator_kubeconfig, namespace, tmp_path / "operator.log")
    tail, course = AuditTail(audit_path, namespace), Course()
    spec = pool_spec(workers=workers, batches={"partitions": {"count": BATCHES // runs}})
    total = BATCHES // runs * runs
    operator.start()
    try:
        with bound_claim(cluster, namespace), Fleet(cluster, [namespace], Habits(batch_seconds=BATCH_SECONDS)) as fleet:
            with ThreadPoolExecutor(THREADS) as threads:
                names = [f"run-{number:03}" for number in range(runs)]
                list(threads.map(lambda name: cluster.create_run(namespace, spec, name=name), names))
            wait_for(lambda: len(fleet.ledger.commits) > total // 20, 300, "the pools to have begun")
            began, at, done = cpu_seconds(operator.pid), time.monotonic(), len(fleet.ledger.commits)
            before = _counts(course.read(tail))
            wait_for(lambda: len(fleet.ledger.commits) > total * 9 // 10, 60 + total, "most batches")
            seconds, busy = time.monotonic() - at, len(fleet.ledger.commits) - done
            used = cpu_seconds(operator.pid) - began
            after = _counts(course.read(tail))
            wait_for(lambda: len(course.read(tail).ended) == runs, 60 + total, "all runs to end")
            memory = resident_mib(operator.pid)
            claims = fleet.ledger.claim_seconds
            errors = fleet.ledger.errors
    finally:
        operator.stop()
        tail.close()
    calls = after - before
    load = os.getloadavg()[0]
    say(f"\n{runs} runs of {workers} workers, {total} batches of {BATCH_SECONDS} s; load average {load:.1f}")
    say(
        f"pool: {busy / seconds:.0f} batches/s; operator {used / busy:.4f} s CPU per batch, {memory} MiB; "
        f"calls per batch: {writes(calls) / busy:.3f} writes, {reads(calls) / busy:.3f} reads; "
        f"claim p50 {_percentile(claims, 0.5) * 1000:.0f} ms, p99 {_percentile(claims, 0.99) * 1000:.0f} ms"
    )
    if errors or {phase for phase, _ in course.ended.values()} != {"Succeeded"}:
        pytest.fail(f"not all runs Succeeded: {course.ended} {errors[:3]}")
    published = Counter(commit.run for commit in fleet.ledger.commits)
    if set(published.values()) != {total // runs}:
        pytest.fail(f"not each batch was published once: {published}")


def pool_operator(cluster: Cluster, kubeconfig: Path, namespace: str, log: Path) -> OperatorProcess:
    """Return an operator process that serves the pool on a port of this machine; its key is in the namespace."""
    return OperatorProcess(
        kubeconfig=kubeconfig,
        context=cluster.context,
        namespace=namespace,
        log=log,
        settings=api_settings(free_port()),
    )


def _counts(course: Course) -> Counter[str]:
    return Counter({call: count for call, count in course.calls.items() if not is_watch(call) and not is_event(call)})
