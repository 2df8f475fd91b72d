"""A run's whole world in memory: the strict API server, the real store and reconciler, a kubelet that tests script.

Time is virtual and passes are taken one by one, so a test decides what happens between any two calls.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from ingestrun.controller.reconcile.reconciler import Reconciler
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.state.usage import Usage
from ingestrun.controller.watch.handlers import SETTLE_SECONDS, EventHandlers
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.planner.jobs.manifest import CheckEndpointFor, WorkerImage
from ingestrun.planner.run.fair_sharing import JobLimits
from tests.fakes.cluster import Call, FakeCluster

KEY = RunKey(namespace="default", name="flights")


class Killed(KubeError):  # noqa: N818
    """Stands for SIGKILL: the pass ends where it is, and a new process knows nothing of it."""


def manifest(**spec: Any) -> dict[str, Any]:
    """A run with one hook and one's own containers, cursor chain by default."""
    container = {"image": "example/worker:1"}
    base: dict[str, Any] = {
        "fetch": container,
        "hooks": [{"name": "check", "container": container}],
        "publish": container,
        "batches": {"cursor": {}, "size": 100},
        "parallelism": 3,
        "backoff": {"initialSeconds": 10, "maxSeconds": 60},
    }
    base.update(spec)
    return {
        "apiVersion": "ingestrun.dev/v1alpha1",
        "kind": "IngestRun",
        "metadata": {"name": KEY.name, "namespace": KEY.namespace},
        "spec": {name: value for name, value in base.items() if value is not None},
    }


@dataclass
class Source:
    """A source of `total` records: what its fetches, hooks and publishes report. Counts what was published, by key."""

    total: int = 450
    published: dict[str, int] = field(default_factory=dict)
    handed_on: dict[str, int] = field(default_factory=dict)

    def run(self, job: Object) -> dict[str, Any]:
        """What the container of this Job does: its result, exit code 0."""
        env = environment(job)
        key = env["INGEST_IDEMPOTENCY_KEY"]
        if env["INGEST_STAGE"] == "on-cancel":
            return {}
        if env["INGEST_STAGE"] == "fetch":
            if "INGEST_PARTITIONS" in env:
                read = 10
                result: dict[str, Any] = {"exhausted": True}
            else:
                start = int(env.get("INGEST_CURSOR") or 0)
                read = min(int(env["INGEST_LIMIT"]), self.total - start)
                result = {"nextCursor": str(start + read), "exhausted": start + read >= self.total}
            self.handed_on[key] = read
        else:
            read, result = self.handed_on[key], {}
        if env["INGEST_STAGE"] == "publish":
            self.published[key] = read
        return {"v": "v1", "outcome": "done", "read": read, "written": read, "rejected": 0, **result}


def environment(job: Object) -> dict[str, str]:
    """The variables of a Job's container, as the container sees them."""
    container = job["spec"]["template"]["spec"]["containers"][0]
    values: dict[str, str] = {}
    for entry in container["env"]:
        values[entry["name"]] = _expanded(entry.get("value", ""), values)
    return values


def _expanded(value: str, known: dict[str, str]) -> str:
    """The value as the kubelet hands it on: $$ is one $, and $(NAME) is the value of a variable before it."""
    return re.sub(
        r"\$(?:\$|\(([^)]*)\))", lambda found: known.get(found[1], found[0]) if found[0] != "$$" else "$", value
    )


class World:
    """One operator process (replaceable by `restart`) in front of one API server."""

    def __init__(self, caps: JobLimits | None = None) -> None:
        self.caps = caps or JobLimits()
        self.now = datetime(2026, 11, 23, 12, 0, tzinfo=UTC)
        self.cluster = FakeCluster(now=lambda: self.now)
        self.source = Source()
        self.worker = "example/worker:1"
        self.pull_policy = "IfNotPresent"
        self.check: CheckEndpointFor | None = None
        self.due: dict[RunKey, datetime] = {}
        self.asked: dict[RunKey, str] = {}
        self.settling: dict[RunKey, str] = {}
        self.deaf: set[str] = set()
        """Kinds whose watch has fallen silent."""
        self.start()
        self.cluster.watch(self._changed)

    def start(self) -> None:
        """A new operator process: it knows nothing but what the server shows it."""
        self.asked.clear()
        self.settling.clear()
        self.due.clear()
        self.store = RunCache(Usage(self.caps, wake=lambda key: self.add(key, "room")))
        self.reconciler = Reconciler(
            self.cluster,
            self.store,
            worker=WorkerImage(name=self.worker, pull_policy=self.pull_policy),
            instance="test",
            check=self.check,
            clock=lambda: self.now,
            monotonic=lambda: self.now.timestamp(),
            drain_pause_seconds=0,
        )
        self.watch = EventHandlers(self.store, self)  # type: ignore[arg-type]

    def restart(self) -> None:
        """The process dies and comes back: watches list everything anew."""
        self.start()
        for body in self.cluster._select("IngestRun"):
            self.watch.run(None, body)
        for body in self.cluster.jobs():
            self.watch.job(None, body)
        for body in self.cluster.pods():
            self.watch.pod(None, body)

    # the queue's part that Watch uses
    def add(self, key: RunKey, trigger: str) -> None:
        self.asked[key] = trigger

    def add_after(self, key: RunKey, seconds: float, trigger: str) -> None:
        """Ask for a look once nothing else is asked for: as if the time had passed."""
        if seconds < SETTLE_SECONDS:
            self.asked[key] = trigger
        else:
            self.settling[key] = trigger

    def forget(self, key: RunKey) -> None:
        self.due.pop(key, None)

    def _changed(self, kind: str, event_type: str, body: Object) -> None:
        if kind in self.deaf:
            return
        if kind == "IngestRun":
            self.watch.run(event_type, body)
        elif kind == "Job":
            self.watch.job(event_type, body)
        elif kind == "Pod":
            self.watch.pod(event_type, body)

    async def step(self) -> bool:
        """Take one pass; False when nobody asks for one. An error counts as a request to come back."""
        for key, when in list(self.due.items()):
            if when <= self.now:
                del self.due[key]
                self.asked[key] = "timer"
        if not self.asked:
            self.asked, self.settling = self.settling, {}
        if not self.asked:
            return False
        key, trigger = self.asked.popitem()
        self.settling.pop(key, None)
        try:
            delay = await self.reconciler.reconcile(key, trigger)
        except KubeError:
            delay = 1.0
            self.now += timedelta(seconds=1)
        if delay is not None:
            when = self.now + timedelta(seconds=delay)
            self.due[key] = min(when, self.due.get(key, when))
        return True

    async def settle(self, limit: int = 200) -> None:
        """Take passes until nobody asks for one."""
        for _ in range(limit):
            if not await self.step():
                return
        raise AssertionError(f"no rest after {limit} passes: {self.cluster.history[-8:]}")

    def active_jobs(self) -> list[Object]:
        """The Jobs that have not ended, oldest first."""
        return [job for job in self.cluster.jobs() if not _finished(job)]

    def work(self, job: Object, **how: Any) -> None:
        """The kubelet runs this Job to its end; `how` as in `finish_job`, or the source's own result."""
        if not how:
            how = {"result": json.dumps(self.source.run(job))}
        self.cluster.finish_job(job["metadata"]["name"], **how)

    async def play(self, rounds: int = 100, *, each: Callable[[Object], dict[str, Any]] | None = None) -> None:
        """Let the operator and the kubelet work in turn until the run is drained or nothing moves any more."""
        for _ in range(rounds):
            await self.settle()
            jobs = self.active_jobs()
            for job in jobs:
                if not any(left["metadata"]["uid"] == job["metadata"]["uid"] for left in self.active_jobs()):
                    continue  # deleted meanwhile
                how = each(job) if each else {}
                self.work(job, **how)
            if not jobs:
                if not self.due:
                    return
                self.now = max(self.now, min(self.due.values()))
        raise AssertionError(f"no end after {rounds} rounds: {self.status}")

    def create(self, **spec: Any) -> Object:
        return self.cluster.user_create_run(manifest(**spec))

    def cancel(self, **more: Any) -> None:
        self.cluster.user_patch_spec(KEY, {"cancel": True, **more})

    @property
    def status(self) -> dict[str, Any]:
        status: dict[str, Any] = self.cluster.run(KEY)["status"]
        return status

    @property
    def phase(self) -> str | None:
        return self.status.get("phase")

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status["conditions"] if c["type"] == kind), {})

    def creates_after_cancelled(self) -> list[Call]:
        """What must never be: Jobs stored after `phase=Cancelled` was. The history is the judge."""
        cancelled_at = next(
            (
                change.revision
                for change in self.cluster.changes
                if change.kind == "IngestRun" and change.obj.get("status", {}).get("phase") == "Cancelled"
            ),
            None,
        )
        if cancelled_at is None:
            return []
        creates = self.cluster.calls("create", "jobs")
        return [call for call in creates if call.stored and call.revision is not None and call.revision > cancelled_at]


def _finished(job: Object) -> bool:
    return any(
        condition["type"] in ("Complete", "Failed") and condition["status"] == "True"
        for condition in job["status"].get("conditions", ())
    )
