"""A cluster that does only what a long run needs, in memory and time that do not grow with its length.

`tests.fakes.cluster` keeps every call and every version, for tests that look back. Here a run may have a hundred
thousand batches: Jobs are kept as long as nobody deletes them, calls are counted, and pods end when `play` is asked.
The rules that the operator's promises rest on hold here as well: the precondition of a status write, AlreadyExists.
"""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, cast

from ingestrun.controller.reconcile.reconciler import Reconciler
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.state.usage import Usage
from ingestrun.controller.watch.handlers import EventHandlers
from ingestrun.kube.errors import AlreadyExists, Conflict
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.planner.jobs.manifest import WorkerImage
from ingestrun.planner.run.fair_sharing import JobLimits
from tests.fakes import selectors
from tests.fakes.shapes import Json, merge_patch
from tests.fakes.world import KEY, environment, manifest

RESULT = json.dumps({"v": "v1", "outcome": "done", "read": 10, "written": 10, "exhausted": True})


class CrowdCluster:
    """See the module. What a run that goes well never asks for is missing."""

    def __init__(self) -> None:
        self.run: Json = {}
        self.jobs: dict[str, Json] = {}
        self.pods: dict[str, Json] = {}
        """By their Job's name."""
        self.counts: Counter[str] = Counter()
        self.largest_run = 0
        """Bytes of the largest version of the run, as JSON."""
        self.most_jobs = 0
        self.tell: Callable[[str, str, Object], None] = lambda *_: None
        self._revision = 0

    def create_run(self, body: Json) -> None:
        self.run = copy.deepcopy(body)
        self.run["metadata"] |= {"uid": "u-1", "generation": 1, "creationTimestamp": "2026-11-23T12:00:00Z"}
        self.run["status"] = {"observedGeneration": -1}
        self._stamp(self.run)
        self.tell("IngestRun", "ADDED", self.run)

    async def get_run(self, key: RunKey) -> Object:
        self.counts["get ingestruns"] += 1
        return self.run

    async def write_status(self, key: RunKey, *, resource_version: str, status: Object) -> Object:
        self.counts["patch ingestruns/status"] += 1
        if self.run["metadata"]["resourceVersion"] != resource_version:
            raise Conflict("the object has been modified")
        self.run = {
            **self.run,
            "metadata": dict(self.run["metadata"]),
            "status": merge_patch(self.run["status"], status),
        }
        self._stamp(self.run)
        self.largest_run = max(self.largest_run, len(json.dumps(self.run, separators=(",", ":")).encode()))
        self.tell("IngestRun", "MODIFIED", self.run)
        return self.run

    async def list_jobs(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        self.counts["list jobs"] += 1
        return list(self.jobs.values())

    async def list_pods(self, *, namespace: str, run_uid: str) -> Sequence[Object]:
        self.counts["list pods"] += 1
        return list(self.pods.values())

    async def create_job(self, job: Object) -> Object:
        self.counts["create jobs"] += 1
        name = job["metadata"]["name"]
        if name in self.jobs:
            raise AlreadyExists(name)
        stored = {**job, "metadata": {**job["metadata"], "uid": f"j-{name}"}, "status": {}}
        stored["metadata"]["creationTimestamp"] = "2026-11-23T12:00:00Z"
        self._stamp(stored)
        self.jobs[name] = stored
        self.most_jobs = max(self.most_jobs, len(self.jobs))
        return stored

    async def delete_jobs(self, *, namespace: str, selector: str) -> None:
        self.counts["deletecollection jobs"] += 1
        matches = selectors.parse(selector)
        for name, job in list(self.jobs.items()):
            if matches(job["metadata"]["labels"]):
                del self.jobs[name]
                self.tell("Job", "DELETED", job)
                pod = self.pods.pop(name, None)
                if pod is not None:
                    self.tell("Pod", "DELETED", pod)

    async def create_event(self, event: Object) -> None:
        self.counts["create events"] += 1

    def end_pod(self, job: Json, *, exit_code: int = 0) -> None:
        """The Job's pod has ended, and the Job with it."""
        meta, container = job["metadata"], job["spec"]["template"]["spec"]["containers"][0]
        terminated: Json = {"exitCode": exit_code, "reason": "Error" if exit_code else "Completed"}
        if not exit_code:
            terminated["message"] = RESULT
        pod: Json = {
            "metadata": {
                "name": f"{meta['name']}-pod",
                "namespace": meta["namespace"],
                "uid": f"p-{meta['name']}",
                "labels": meta["labels"],
                "ownerReferences": [{"kind": "Job", "name": meta["name"], "uid": meta["uid"], "controller": True}],
            },
            "spec": job["spec"]["template"]["spec"],
            "status": {
                "phase": "Failed" if exit_code else "Succeeded",
                "containerStatuses": [{"name": container["name"], "imageID": "", "state": {"terminated": terminated}}],
            },
        }
        self._stamp(pod)
        self.pods[meta["name"]] = pod
        self.tell("Pod", "MODIFIED", pod)
        done = {
            "type": "Failed" if exit_code else "Complete",
            "status": "True",
            "lastTransitionTime": "2026-11-23T12:00:00Z",
        }
        ended = {**job, "metadata": dict(meta), "status": {"conditions": [done]}}
        self._stamp(ended)
        self.jobs[meta["name"]] = ended
        self.tell("Job", "MODIFIED", ended)

    def _stamp(self, obj: Json) -> None:
        self._revision += 1
        obj["metadata"]["resourceVersion"] = str(self._revision)


@dataclass
class Part:
    """One tenth of a run, in numbers."""

    batches: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    passes: int = 0
    seconds: float = 0.0
    """Of the operator alone, in CPU time."""

    def per_batch(self, verb: str = "") -> float:
        """Calls a batch; Events apart."""
        count = sum(n for call, n in self.calls.items() if call.startswith(verb) and not call.endswith(" events"))
        return count / self.batches


class Crowd:
    """One operator before one long run; `clock` gives the CPU time where it is of interest."""

    def __init__(self, *, clock: Callable[[], float] = lambda: 0.0) -> None:
        self.cluster = CrowdCluster()
        self.store = RunCache(Usage(JobLimits(), wake=lambda _: None))
        self.now = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
        self._clock = clock
        self._asked = self._settling = False
        self._due: datetime | None = None
        self.most_facts = 0
        """The most Jobs that the operator ever knew of at once."""
        self.reconciler = Reconciler(
            cast(Cluster, self.cluster),
            self.store,
            worker=WorkerImage(name="example/worker:1"),
            instance="test",
            clock=lambda: self.now,
            monotonic=lambda: self.now.timestamp(),
            drain_pause_seconds=0,
        )
        watch = EventHandlers(self.store, self)  # type: ignore[arg-type]
        takes = {"IngestRun": watch.run, "Job": watch.job, "Pod": watch.pod}
        self.cluster.tell = lambda kind, event, body: takes[kind](event, body)

    # the queue's part that Watch uses
    def add(self, key: RunKey, trigger: str) -> None:
        self._asked = True

    def add_after(self, key: RunKey, seconds: float, trigger: str) -> None:
        self._settling = True

    def forget(self, key: RunKey) -> None:
        self._due = None

    @property
    def phase(self) -> str | None:
        phase: str | None = self.cluster.run["status"].get("phase")
        return phase

    async def settle(self) -> int:
        """Take passes until nobody asks for one; how many there were."""
        passes = 0
        while self._asked or self._settling or (self._due is not None and self._due <= self.now):
            self._asked, self._settling, self._due = False, False, None
            delay = await self.reconciler.reconcile(KEY, "test")
            passes += 1
            if delay is not None:
                self._due = self.now + timedelta(seconds=delay)
            self.most_facts = max(self.most_facts, len(self.store.attempts("u-1")))
        return passes

    async def play(
        self,
        *,
        count: int,
        exit_code: Callable[[int, str], int] = lambda *_: 0,
        progress: Callable[[Part], None] = lambda _: None,
        **spec: Any,
    ) -> list[Part]:
        """A run of so many partitions from its creation until it is quiet; what it took, by tenths."""
        self.cluster.create_run(manifest(hooks=None, batches={"partitions": {"count": count}}, **spec))
        parts: list[Part] = []
        part, reached = Part(), 0
        while True:
            counts, began = self.cluster.counts.copy(), self._clock()
            part.passes += await self.settle()
            part.seconds += self._clock() - began
            part.calls += self.cluster.counts - counts
            done = self.reached()
            if done - reached >= count / 10 and len(parts) < 9:
                part.batches = done - reached
                parts.append(part)
                progress(part)
                part, reached = Part(), done
            active = [job for job in self.cluster.jobs.values() if not job["status"]]
            for job in active:
                env = environment(job)
                self.cluster.end_pod(job, exit_code=exit_code(int(env["INGEST_BATCH"]), env["INGEST_STAGE"]))
            if not active and self._due is None:
                break
            if not active and self._due is not None:
                self.now = max(self.now, self._due)
        part.batches = done - reached
        parts.append(part)
        progress(part)
        return parts

    def reached(self) -> int:
        """How many batches are accounted for."""
        body = self.cluster.run["status"].get("batches", {})
        return sum(_length(body.get(name, "")) for name in ("published", "failed"))


def _length(ranges: str) -> int:
    parts = [part.partition("-") for part in ranges.split(",") if part]
    return sum(int(last or first) - int(first) + 1 for first, _, last in parts)
