"""`make bench-scale BATCHES=1500`: one run of 1500 partitions, fetch and publish each, played by KWOK.

`make bench-scale BATCHES=100000 TAIL=1000`: the first thousand of a run of 100,000, which is then cancelled; then the
last thousand, by a run that goes on from a saved state. The batches that are published in that state have as many gaps
as one run can leave; the gaps are repeated first, and count into the thousand.

It prints Jobs per second, the operator's calls per batch from the audit log and the largest version of the object, by
tenths; also the most Jobs at once, and the operator's memory. It fails only if a run does not end as it should, or if a
version of the object exceeds 16 KiB.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
from tests.api.conftest import GROUP, PLURAL, VERSION, Cluster
from tests.race.account import Operator
from tests.race.calls import is_event, is_watch
from tests.race.generator import run_spec
from tests.race.history import OPERATOR, AuditTail, call_name, microseconds

from dev.bench.process import resident_mib
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.size_budget import MAX_FAILED_BATCHES, MAX_PARALLELISM

BATCHES = int(os.environ.get("BATCHES") or 1500)
TAIL = int(os.environ.get("TAIL") or 0)
PARALLELISM = int(os.environ.get("PARALLELISM") or 40)
POLL_SECONDS: Final = 1
PARTS: Final = 10
ROWS: Final = 10
OBJECT_BYTES: Final = 16 * 1024
RUN: Final = "long"
ENDED: Final = ("Succeeded", "Failed", "Cancelled")


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """A part of a run of `BATCHES` partitions, to be measured."""

    name: str
    batches: int
    phase: str = "Succeeded"
    """The phase in which the run ends. With Cancelled, it is cancelled once this stretch is published."""
    before: IndexRanges = field(default_factory=IndexRanges)
    """The batches that are published when the stretch begins."""

    def spec(self) -> dict[str, Any]:
        """Build the spec of the stretch's run."""
        partitions = {"partitions": {"count": BATCHES}}
        spec = run_spec({"rows": str(ROWS)}, hooks=0, batches=partitions, parallelism=PARALLELISM)
        if self.before:
            rows = ROWS * len(self.before)
            ranges = str(self.before)
            spec["resumeFrom"] = {
                "savedState": {
                    "uid": "7a1f6f0e-5f0c-4b0e-9d3a-2f1c8e4b6a90",
                    "batches": {"fetched": ranges, "published": ranges},
                    "records": {"fetched": rows, "rejected": 0, "published": rows},
                }
            }
        return spec


def stretches() -> list[Stretch]:
    """List the stretches that are measured, in their order."""
    if not TAIL:
        return [Stretch(name=f"{BATCHES} partitions", batches=BATCHES)]
    done = BATCHES - TAIL
    before = cut(done)
    ranges = str(before).count(",") + 1
    return [
        Stretch(name=f"the first {TAIL} of {BATCHES} partitions, then a cancel", batches=TAIL, phase="Cancelled"),
        Stretch(
            name=f"the last {TAIL} of {BATCHES} partitions; the {done} before are published, in {ranges} ranges",
            batches=TAIL,
            before=before,
        ),
    ]


def cut(published: int) -> IndexRanges:
    """Return this many published batches with the most gaps that failed batches and batches in flight can leave."""
    gaps = min(MAX_FAILED_BATCHES + MAX_PARALLELISM, TAIL)
    end = published + gaps
    return IndexRanges.span(0, end - 1) - IndexRanges((n + 1) * end // (gaps + 1) for n in range(gaps))


@dataclass
class Part:
    """A tenth of the stretch, between two status writes."""

    number: int
    batches: int
    microseconds: int
    calls: Counter[str]

    def line(self, *, largest: int, memory: int) -> str:
        """Format the part as a line of the report."""
        per = {kind: count / self.batches for kind, count in self.counts().items()}
        jobs = self.calls["create jobs"] / (self.microseconds / 1_000_000)
        return (
            f"  {self.number:>2}/{PARTS}  {self.batches:>7} batches in {self.microseconds / 1_000_000:>7.1f} s  "
            f"{jobs:>6.1f} Jobs/s  per batch {per['writes']:.2f} writes, {per['reads']:.2f} reads, "
            f"{per['deletes']:.3f} deletes of Jobs; largest object {largest:>6,} bytes; {memory} MiB"
        )

    def counts(self) -> Counter[str]:
        """Count the calls by kind; a delete counts as a write too."""
        kinds: Counter[str] = Counter(writes=0, reads=0, deletes=0)
        for call, count in self.calls.items():
            if not is_event(call) and not is_watch(call):
                kinds["reads" if call.split()[0] in ("get", "list") else "writes"] += count
                kinds["deletes"] += count if call.startswith("delete") else 0
        return kinds


class Course:
    """The run's course, read from the audit log as it is written."""

    def __init__(self, stretch: Stretch) -> None:
        self.phase = ""
        self.calls: Counter[str] = Counter()
        self.published = 0
        """The number of published batches of the stretch."""
        self._stretch = stretch
        self._since: int | None = None
        self._accounted = 0
        self._here: Counter[str] = Counter()

    def add(self, entry: dict[str, Any]) -> Iterator[Part]:
        """Take an entry of the log and yield the tenth that ends with it, if one does."""
        if entry["user"]["username"] != OPERATOR:
            return
        call = call_name(entry)
        self.calls[call] += 1
        self._here[call] += 1
        body = entry.get("responseObject") or {}
        if call != "patch ingestruns/status" or body.get("kind") != "IngestRun":
            return
        self.phase = body["status"].get("phase", "")
        batches, at = body["status"]["batches"], microseconds(entry["stageTimestamp"])
        if not batches.get("claimed"):
            return  # the saved state is not taken over yet
        self.published = len(IndexRanges.parse(batches.get("published", ""))) - len(self._stretch.before)
        self._since = at if self._since is None else self._since
        tenth = PARTS * self.published // self._stretch.batches
        if tenth > PARTS * self._accounted // self._stretch.batches and self._accounted < self._stretch.batches:
            yield Part(tenth, self.published - self._accounted, at - self._since, self._here)
            self._accounted, self._since, self._here = self.published, at, Counter()


class Versions:
    """The sizes of a run's versions as a client gets them: with the managed fields, which the audit log leaves out."""

    def __init__(self, cluster: Cluster, made: dict[str, Any]) -> None:
        self.largest = 0
        self._cluster = cluster
        self._namespace = made["metadata"]["namespace"]
        self._version = made["metadata"]["resourceVersion"]
        self._here = self._last = 0

    def follow(self, seconds: int) -> None:
        """Measure each version that is stored within this time."""
        answer = self._cluster.custom.list_namespaced_custom_object(
            GROUP,
            VERSION,
            self._namespace,
            PLURAL,
            watch=True,
            resource_version=self._version,
            timeout_seconds=seconds,
            _preload_content=False,
        )
        for line in answer.data.splitlines():
            event = json.loads(line)
            self._version = event["object"]["metadata"]["resourceVersion"]
            self._last = len(line) - len(b'{"type":"","object":}') - len(event["type"])
            self._here, self.largest = max(self._here, self._last), max(self.largest, self._last)

    def largest_since(self) -> int:
        """Return the largest size since the last call, including the version that was current then."""
        here, self._here = self._here, self._last
        return here


@pytest.mark.parametrize("stretch", stretches(), ids=lambda stretch: str(stretch.phase))
def test_scale(
    stretch: Stretch,
    cluster: Cluster,
    operator_kubeconfig: Path,
    audit_path: Path,
    namespace: str,
    tmp_path: Path,
    say: Callable[[str], None],
) -> None:
    """Run the stretch on the cluster and print its cost by tenths."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    tail, course = AuditTail(audit_path, namespace), Course(stretch)
    operator.start()
    say(f"\n{stretch.name}; {PARALLELISM} in flight")
    began, most, cancelled = time.monotonic(), 0, False
    say(f"  operator's memory {resident_mib(operator.pid)} MiB")
    try:
        versions = Versions(cluster, cluster.create_run(namespace, stretch.spec(), name=RUN))
        while course.phase not in ENDED:
            versions.follow(POLL_SECONDS)
            for entry in tail.poll():
                for part in course.add(entry):
                    most = max(most, len(cluster.jobs(namespace)))
                    say(part.line(largest=versions.largest_since(), memory=resident_mib(operator.pid)))
            if stretch.phase == "Cancelled" and course.published >= stretch.batches and not cancelled:
                cluster.cancel(namespace, RUN)
                cancelled = True
        seconds = time.monotonic() - began
        versions.follow(POLL_SECONDS)
        run = cluster.run(namespace, RUN)
    finally:
        operator.stop()
        tail.close()
    say(f"in {seconds:.0f} s; {course.calls['create jobs'] / seconds:.1f} Jobs/s")
    say(f"largest version of the object {versions.largest:,} bytes; at most {most} Jobs at the ends of the tenths")
    if course.phase != stretch.phase:
        pytest.fail(f"it did not end as {stretch.phase}: {run['status']}")
    if stretch.phase == "Succeeded" and run["status"]["batches"]["published"] != f"0-{BATCHES - 1}":
        pytest.fail(f"not all is published: {run['status']}")
    if versions.largest >= OBJECT_BYTES:
        pytest.fail(f"a version of the object has {versions.largest} bytes")
