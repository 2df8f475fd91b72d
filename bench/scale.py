"""`make bench-scale BATCHES=1500`: one run of so many partitions, fetch and publish each, played by KWOK.

Prints Jobs per second and the operator's calls per batch, by tenths of the run from the audit log; the largest version
of the object, how many Jobs there were at most, and the operator's memory. Whether the run Succeeded is all that is
judged.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.api.conftest import Cluster
from tests.race.account import Operator
from tests.race.calls import is_event, is_watch
from tests.race.generator import run_spec
from tests.race.history import OPERATOR, AuditTail, call_name, microseconds

from ingestrun.model.ranges import IndexRanges

BATCHES = int(os.environ.get("BATCHES") or 1500)
PARALLELISM = int(os.environ.get("PARALLELISM") or 40)
POLL_SECONDS = 1.0
PARTS = 10


@dataclass
class Part:
    """A tenth of the run, from one status write to another."""

    batches: int
    microseconds: int
    calls: Counter[str] = field(default_factory=Counter)

    def line(self, number: int) -> str:
        """For people."""
        per = {kind: count / self.batches for kind, count in self.counts().items()}
        jobs = self.calls["create jobs"] / (self.microseconds / 1_000_000)
        return (
            f"  {number:>2}/{PARTS}  {self.batches:>7} batches in {self.microseconds / 1_000_000:>7.1f} s  "
            f"{jobs:>6.1f} Jobs/s  per batch {per['writes']:.2f} writes, {per['reads']:.2f} reads, "
            f"{per['deletes']:.3f} deletes of Jobs"
        )

    def counts(self) -> Counter[str]:
        """By kind; a delete is a write too."""
        kinds: Counter[str] = Counter(writes=0, reads=0, deletes=0)
        for call, count in self.calls.items():
            if not is_event(call) and not is_watch(call):
                kinds["reads" if call.split()[0] in ("get", "list") else "writes"] += count
                kinds["deletes"] += count if call.startswith("delete") else 0
        return kinds


class Course:
    """The run's course, read from the audit log as it is written."""

    def __init__(self, total: int) -> None:
        self.largest = 0
        self.phase = ""
        self.calls: Counter[str] = Counter()
        self._total = total
        self._begun: tuple[int, int] | None = None
        self._here: Counter[str] = Counter()

    def add(self, entry: dict[str, Any]) -> Iterator[Part]:
        """Take an entry; a tenth that ends with it."""
        if entry["user"]["username"] != OPERATOR:
            return
        call = call_name(entry)
        self.calls[call] += 1
        self._here[call] += 1
        body = entry.get("responseObject") or {}
        if call != "patch ingestruns/status" or body.get("kind") != "IngestRun":
            return
        self.largest = max(self.largest, len(json.dumps(body, separators=(",", ":")).encode()))
        self.phase = body["status"].get("phase", "")
        published = len(IndexRanges.parse(body["status"]["batches"].get("published", "")))
        at = microseconds(entry["stageTimestamp"])
        if self._begun is None:
            self._begun = (published, at)
        first, since = self._begun
        if published - first >= self._total / PARTS or (self.phase == "Succeeded" and published > first):
            yield Part(batches=published - first, microseconds=at - since, calls=self._here)
            self._begun, self._here = (published, at), Counter()


def test_scale(
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    say: Callable[[str], None],
) -> None:
    """The bench."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    tail, course = AuditTail(audit_path, namespace), Course(BATCHES)
    operator.start()
    say(f"\n{BATCHES} partitions, {PARALLELISM} in flight, {2 * BATCHES} Jobs")
    began, most, parts = time.monotonic(), 0, 0
    say(f"  operator's memory {_memory(operator)} MiB")
    try:
        spec = run_spec({"rows": "10"}, hooks=0, batches={"partitions": {"count": BATCHES}}, parallelism=PARALLELISM)
        cluster.create_run(namespace, spec, name="long")
        while course.phase not in ("Succeeded", "Failed"):
            time.sleep(POLL_SECONDS)
            for entry in tail.poll():
                for part in course.add(entry):
                    parts += 1
                    most = max(most, len(cluster.jobs(namespace)))
                    say(part.line(parts) + f", {_memory(operator)} MiB")
        seconds = time.monotonic() - began
        run = cluster.run(namespace, "long")
    finally:
        operator.stop()
        tail.close()
    say(f"in {seconds:.0f} s; {course.calls['create jobs'] / seconds:.1f} Jobs/s")
    say(f"largest version of the object {course.largest} bytes; at most {most} Jobs at the ends of the tenths")
    if (course.phase, run["status"]["batches"]["published"]) != ("Succeeded", f"0-{BATCHES - 1}"):
        pytest.fail(f"it did not end well: {run['status']}")


def _memory(operator: Operator) -> int:
    """Resident, in MiB."""
    lines = Path(f"/proc/{operator.pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) // 1024
