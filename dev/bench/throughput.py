"""`make bench-throughput`: many short batches at once, on simulated nodes: what a batch costs the operator.

BENCH_RUNS runs of BATCHES batches, each of three stages (one hook) whose pods last 0.2 s. Prints batches per second,
the operator's CPU time per batch, from its process, and its calls per batch, from the audit log. Whether the runs end
as they should is all that is judged. CPU time means something on a machine that does other work as well; batches per
second mean less there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import pytest
from tests.api.conftest import Cluster, WaitFor
from tests.race.account import Operator
from tests.race.calls import is_event, is_watch, reads, writes
from tests.race.generator import run_spec
from tests.race.history import OPERATOR, AuditTail, call_name, microseconds

from dev.bench.process import cpu_seconds, resident_mib

RUNS = int(os.environ.get("BENCH_RUNS") or 20)
BATCHES = int(os.environ.get("BATCHES") or 10)
STAGES: Final = 3
POD_SECONDS: Final = "0.2"
SECONDS_PER_BATCH: Final = 3
"""What ends a bench that hangs; no time is judged."""
THREADS: Final = 8


class Course:
    """Course of all runs, read from the audit log."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        """The operator's."""
        self.began = 0
        """When the first run was asked for."""
        self.ended: dict[str, tuple[str, int]] = {}
        """By the run's name: the phase it ended in, and when."""

    def read(self, tail: AuditTail) -> Course:
        """Take what was written since the last time."""
        for entry in tail.poll():
            call = call_name(entry)
            if call == "create ingestruns":
                at = microseconds(entry["requestReceivedTimestamp"])
                self.began = min(self.began or at, at)
            if entry["user"]["username"] != OPERATOR:
                continue
            self.calls[call] += 1
            stored = entry.get("responseObject") or {}
            if call == "patch ingestruns/status" and stored.get("kind") == "IngestRun":
                phase = stored["status"].get("phase", "")
                if phase in ("Succeeded", "Failed", "Cancelled"):
                    end = (phase, microseconds(entry["stageTimestamp"]))
                    self.ended.setdefault(stored["metadata"]["name"], end)
        return self

    def seconds(self) -> float:
        """Return how long it took from the first create to the last end."""
        return (max(at for _, at in self.ended.values()) - self.began) / 1_000_000


def test_throughput(
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    wait_for: WaitFor,
    say: Callable[[str], None],
) -> None:
    """The bench."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    tail, course = AuditTail(audit_path, namespace), Course()
    spec = run_spec({"run-seconds": POD_SECONDS}, batches={"partitions": {"count": BATCHES}})
    total = RUNS * BATCHES
    operator.start()
    try:
        began = cpu_seconds(operator.pid)
        with ThreadPoolExecutor(THREADS) as pool:
            names = [f"run-{number:03}" for number in range(RUNS)]
            list(pool.map(lambda name: cluster.create_run(namespace, spec, name=name), names))
        wait_for(lambda: len(course.read(tail).ended) == RUNS, 60 + SECONDS_PER_BATCH * total, "all runs to end")
        used = cpu_seconds(operator.pid) - began
        memory = resident_mib(operator.pid)
        # The Events of the end follow it; they are counted, their CPU time is that of a few of hundreds.
        wait_for(lambda: course.read(tail).calls["create events"] >= 2 * RUNS, 30, "the last Events")
    finally:
        operator.stop()
        tail.close()
    calls = Counter({call: count for call, count in course.calls.items() if not is_watch(call)})
    events = sum(count for call, count in calls.items() if is_event(call))
    load = os.getloadavg()[0]
    say(f"\n{RUNS} runs of {BATCHES} batches of {STAGES} stages, pods of {POD_SECONDS} s; load average {load:.1f}")
    say(
        f"throughput: {total / course.seconds():.2f} batches/s; operator {used / total:.4f} s CPU per batch, "
        f"{memory} MiB; calls per batch: {writes(calls) / total:.2f} writes, {reads(calls) / total:.2f} reads, "
        f"{events / total:.2f} Events"
    )
    for call, count in sorted(calls.items()):
        say(f"  {call:<28}{count:>8}{count / total:>10.2f}")
    if {phase for phase, _ in course.ended.values()} != {"Succeeded"}:
        pytest.fail(f"not all runs Succeeded: {course.ended}")
    for run in cluster.runs(namespace):
        if run["status"]["batches"]["published"] != f"0-{BATCHES - 1}":
            pytest.fail(f"{run['metadata']['name']} has not published all: {run['status']}")
