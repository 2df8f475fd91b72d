"""`make bench-idle`: runs to which nothing happens: what 5,000 suspended ones cost the operator.

Prints its resident memory once they are created and it is at rest, then, after a restart, the memory and the CPU time
that it took until it was at rest again. Whether all are Suspended is all that is judged. RUNS=5000.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from tests.api.conftest import GROUP, PLURAL, VERSION, Cluster, WaitFor
from tests.race.account import Operator
from tests.race.generator import run_spec

from dev.bench.process import await_rest, cpu_seconds, resident_mib

RUNS = int(os.environ.get("RUNS") or 5000)
THREADS: Final = 8
SECONDS_PER_RUN: Final = 0.2
"""What ends a bench that hangs; no time is judged."""


def test_idle(
    cluster: Cluster,
    operator_kubeconfig: Path,
    namespace: str,
    tmp_path: Path,
    wait_for: WaitFor,
    say: Callable[[str], None],
) -> None:
    """The bench."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    patience = 60 + SECONDS_PER_RUN * RUNS
    operator.start()
    try:
        await_rest(operator.pid, timeout=patience)
        empty = resident_mib(operator.pid)
        _create(cluster, namespace)
        wait_for(lambda: _suspended(cluster, namespace) == RUNS, patience, "all runs to be Suspended")
        await_rest(operator.pid, timeout=patience)
        created = resident_mib(operator.pid)
        operator.stop()
        operator.start()
        begun = cpu_seconds(operator.pid)
        rested = await_rest(operator.pid, timeout=patience)
        restarted = resident_mib(operator.pid)
        suspended = _suspended(cluster, namespace)
        load = os.getloadavg()[0]
        say(f"\n{RUNS} suspended runs; load average {load:.1f}")
        say(
            f"idle: operator {empty} MiB without runs, {created} MiB after their creation, {restarted} MiB after a "
            f"restart, which took {rested:.1f} s CPU ({begun:.1f} s of it until it led)"
        )
    finally:
        operator.stop()
        _delete(cluster, namespace, wait_for, patience)
    if suspended != RUNS:
        pytest.fail(f"{suspended} of {RUNS} runs are Suspended")


def _create(cluster: Cluster, namespace: str) -> None:
    def create(number: int) -> None:
        # As runs of one pipeline are: alike but for what each is to ingest.
        source = {"env": [{"name": "DAY", "value": f"day-{number}"}]}
        spec = run_spec({"run-seconds": "0.2"}, batches={"partitions": {"count": 10}}, suspend=True)
        spec["fetch"] = {**spec["fetch"], **source}
        cluster.create_run(namespace, spec, name=f"idle-{number:05}")

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(create, range(RUNS)))


def _suspended(cluster: Cluster, namespace: str) -> int:
    """Return how many runs are Suspended; all are read, since a list with a selector does not say how many remain."""
    found, token = 0, None
    while True:
        page = cluster.custom.list_namespaced_custom_object(
            GROUP,
            VERSION,
            namespace,
            PLURAL,
            field_selector="status.phase=Suspended",
            limit=1000,
            **({"_continue": token} if token else {}),
        )
        found, token = found + len(page["items"]), page["metadata"].get("continue")
        if not token:
            return found


def _delete(cluster: Cluster, namespace: str, wait_for: WaitFor, timeout: float) -> None:
    """Delete the runs and wait until they are gone: the namespace alone would be deleted after the bench has ended."""

    def delete(name: str) -> None:
        cluster.custom.delete_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, name)

    # One by one, because one delete of thousands takes longer than the API server allows a request.
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(delete, [run["metadata"]["name"] for run in cluster.runs(namespace)]))
    wait_for(lambda: not cluster.runs(namespace), timeout, "the runs to be gone")
