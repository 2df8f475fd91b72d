"""A pool's world in memory: simulated workers that speak the protocol to the real inbox, one request at a time.

As in `World`, tests decide what happens between any two calls, and also between any two requests of workers.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

from ingestrun.kube.protocol import Object
from ingestrun.model.pool import (
    Claim,
    ClaimAnswer,
    ClaimRequest,
    Fetched,
    FetchedAnswer,
    FetchedRequest,
    PublishAnswer,
    PublishRequest,
    Report,
)
from ingestrun.planner.pool.late_reports import answers_after_end
from ingestrun.planner.pool.requests import Answer, Replaced, Request, WorkerRequest
from tests.fakes.world import KEY, World, environment

Act = Literal["fail", "permanent", "die", "oom", "stop", "evict"]
"""What a worker does with a batch other than to publish it, once it has fetched it."""


def pool_spec(**spec: Any) -> dict[str, Any]:
    """The spec of a run with the built-in worker, by a pool."""
    base: dict[str, Any] = {
        "fetch": None,
        "publish": None,
        "hooks": [],
        "source": {"http": {"url": "http://example/data", "pagination": {"page": {}}}},
        "sink": {"parquet": {"path": "out"}},
        "workspace": {"persistentVolumeClaim": {"claimName": "data"}},
        "execution": {"mode": "Pool"},
    }
    return base | spec


@dataclass(eq=False)
class SimulatedWorker:
    """One worker process: what it holds, and the request that it has under way."""

    number: int
    job: str
    claim: Claim | None = None
    fetched: Fetched | None = None
    accepted: bool = False
    published: bool = False
    reports: tuple[Report, ...] = ()
    under_way: tuple[WorkerRequest, asyncio.Future[Answer]] | None = None
    stuck: bool = False
    """It is partitioned, or frozen: it asks nothing more."""

    def next_request(self) -> Request:
        """What it asks next."""
        if self.claim is None:
            return ClaimRequest(reports=self.reports, wait_seconds=20)
        batch, attempt, fetched = self.claim.batch, self.claim.attempt, self.fetched
        assert fetched is not None
        if not self.accepted and not self.claim.partition:
            return FetchedRequest(batch=batch, attempt=attempt, fetched=fetched)
        return PublishRequest(batch=batch, attempt=attempt, fetched=fetched, written=fetched.read, rejected=0)

    def drop(self) -> None:
        """Abandon the batch."""
        self.claim, self.fetched, self.accepted, self.published = None, None, False, False


@dataclass
class Grant:
    """A permission that a worker was told of."""

    batch: int
    attempt: int
    worker: int
    revision: int


class PoolWorld(World):
    """A world whose Jobs are workers of pools."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.workers: dict[str, SimulatedWorker] = {}
        """The worker processes, by the name of their Jobs."""
        self.act: Callable[[Claim], Act | None] = lambda _: None
        self.requests = 0
        """The number of steps that workers have taken: requests sent, and answers taken."""
        self.on_request: Callable[[int], None] | None = None
        """Called with that number before each."""
        self.claims: list[Grant] = []
        self.grants: list[Grant] = []
        self.commits: list[Grant] = []
        self.late: list[Grant] = []

    # ---- the kubelet

    def run_pods(self) -> None:
        """Start the pods of all workers' Jobs, and end the processes whose Jobs are gone."""
        jobs = {job["metadata"]["name"]: job for job in self.active_jobs()}
        for name, job in jobs.items():
            if name not in self.workers and job["metadata"]["labels"]["ingestrun.dev/stage"] == "worker":
                self.cluster.start_pod(name)
                self.workers[name] = SimulatedWorker(int(environment(job)["INGEST_WORKER"]), name)
        for name in [name for name in self.workers if name not in jobs]:
            del self.workers[name]

    def end(self, worker: SimulatedWorker, **how: Any) -> None:
        """The process ends."""
        self.workers.pop(worker.job, None)
        if not how:
            how = {"result": '{"v":"v1","outcome":"done"}'}
        if any(job["metadata"]["name"] == worker.job for job in self.active_jobs()):
            self.cluster.finish_job(worker.job, **how)

    # ---- a worker

    def turn(self, worker: SimulatedWorker) -> bool:
        """Let a worker take one step; False if it can only wait."""
        if worker.stuck:
            return False
        if worker.under_way is None:
            self._point()
            if worker.job in self.workers and not worker.stuck:
                self._send(worker)
            return True
        request, answer = worker.under_way
        if answer.done():
            self._point()
            if worker.job in self.workers and not worker.stuck:
                worker.under_way = None
                self._take(worker, request.body, answer.result())
            return True
        if request not in self._memory(worker).requests:  # the operator that had it is gone
            worker.under_way = None
            return True
        return False

    def _point(self) -> None:
        self.requests += 1
        if self.on_request is not None:
            self.on_request(self.requests)

    def _memory(self, worker: SimulatedWorker) -> Any:
        return self.store.memories.recall(self._uid(worker))

    def _uid(self, worker: SimulatedWorker) -> str:
        return str(self.cluster.job(worker.job)["metadata"]["labels"]["ingestrun.dev/run-uid"])

    def _send(self, worker: SimulatedWorker) -> None:
        request = WorkerRequest(worker.number, worker.next_request())
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        worker.under_way = (request, answer)
        uid = self._uid(worker)
        if self.store.is_archived(uid):
            answer.set_result(answers_after_end(None, [request])[request])
            return
        self.store.memories.recall(uid).requests[request] = answer
        key = self.store.key_of(uid)
        if key is not None:
            self.asked[key] = "worker"

    def _take(self, worker: SimulatedWorker, asked: Request, answer: Answer) -> None:
        if isinstance(answer, Replaced):
            self.end(worker)
        elif isinstance(answer, ClaimAnswer):
            worker.reports = ()
            if answer.claim is not None:
                self._begin(worker, answer.claim)
            elif answer.wait is None:
                self.end(worker)
        elif isinstance(answer, FetchedAnswer):
            if answer.cancelled is not None:
                self.end(worker)
            elif answer.accepted:
                worker.accepted = True
            else:
                worker.drop()
        elif isinstance(answer, PublishAnswer):
            if answer.cancelled is not None:
                self.end(worker)
            elif answer.granted:
                self._commit(worker)
            else:
                worker.drop()

    def _begin(self, worker: SimulatedWorker, claim: Claim) -> None:
        self.claims.append(Grant(claim.batch, claim.attempt, worker.number, self.cluster.revision))
        if claim.partition:
            worker.claim, worker.fetched = claim, Fetched(read=10, exhausted=True)
        else:
            start = int(claim.cursor or 0)
            read = min(claim.limit or 10**9, self.source.total - start)
            end = start + read
            worker.claim = claim
            worker.fetched = Fetched(read=read, next_cursor=str(end), exhausted=end >= self.source.total)
        act = self.act(claim)
        if act in ("fail", "permanent", "stop"):
            outcome = "stopped" if act == "stop" else "failed"
            told = {"stage": "fetch", "message": "no luck", "permanent": act == "permanent"} if act != "stop" else {}
            report = {"batch": claim.batch, "attempt": claim.attempt, "outcome": outcome, **told}
            worker.drop()
            worker.reports = (Report.model_validate(report),)
        elif act is not None:
            how: dict[str, dict[str, Any]] = {
                "die": {"exit_code": 1},
                "oom": {"exit_code": 137, "reason": "OOMKilled"},
                "evict": {"exit_code": 137, "pod_reason": "NodeLost"},
            }
            self.end(worker, **how[act])

    def _commit(self, worker: SimulatedWorker) -> None:
        claim, fetched = worker.claim, worker.fetched
        assert claim is not None
        assert fetched is not None
        grant = Grant(claim.batch, claim.attempt, worker.number, self.cluster.revision)
        self.grants.append(grant)
        self._point()
        if worker.job not in self.workers or worker.stuck:
            return  # it was killed between permission and commit
        self.source.published[claim.idempotency_key] = fetched.read
        self.commits.append(grant)
        worker.drop()
        worker.reports = (
            Report.model_validate(
                {
                    "batch": claim.batch,
                    "attempt": claim.attempt,
                    "outcome": "done",
                    "fetched": fetched.model_dump(mode="json", by_alias=True, exclude_none=True),
                    "written": fetched.read,
                    "rejected": 0,
                }
            ),
        )
        self._point()

    # ---- all together

    async def play_pool(self, rounds: int = 400) -> None:
        """Let the operator, the kubelet and the workers act in turn until nothing moves any more."""
        for _ in range(rounds):
            await self.settle()
            self.run_pods()
            moved = False
            for worker in list(self.workers.values()):
                if worker.job in self.workers:
                    moved |= self.turn(worker)
                    await asyncio.sleep(0)
            if moved or self.asked:
                continue
            if not self.due:
                return
            self.now = max(self.now + timedelta(milliseconds=1), min(self.due.values()))
        raise AssertionError(f"no end after {rounds} rounds: {self.status}")

    def uid(self) -> str:
        """The run's UID."""
        return str(self.cluster.run(KEY)["metadata"]["uid"])

    def grants_after_end(self) -> list[Object]:
        """What must never be: stored statuses of an ended run that have more claims or permissions than before."""
        found: list[Object] = []
        latest: dict[str, Object] = {}
        for change in self.cluster.changes:
            if change.kind != "IngestRun":
                continue
            uid, status = change.obj["metadata"]["uid"], change.obj.get("status") or {}
            before = latest.get(uid, {})
            if status.get("phase") in ("Cancelled", "Failed", "Succeeded"):
                for kind in ("claimed", "publishing"):
                    now, then = (each.get("batches", {}).get(kind, "") for each in (status, before))
                    if now not in ("", then):
                        found.append(change.obj)
            latest[uid] = status
        return found
