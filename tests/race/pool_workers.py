"""Simulated workers of pools: real HTTP clients, many at once, beside pods that KWOK plays on simulated nodes.

A pod of a worker's Job is held by an annotation. Once it runs, a client with the pod's own environment speaks the
protocol for it; when the client ends, the pod is let go, with the exit code that the client had. It is written by the
contract alone, with none of the operator's and the worker's code.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Final

import aiohttp
from kubernetes import client, watch

from tests.api.conftest import Cluster

Json = dict[str, Any]
ROWS: Final = 10
"""Records in each batch."""
HOLD: Final = "simulate.ingestrun.dev/hold"
BATCHES: Final = "simulate.ingestrun.dev/batches"
"""Annotation: how many batches a chain has, if not as many as the fleet says."""
BATCH_SECONDS: Final = "simulate.ingestrun.dev/batch-seconds"
"""Annotation: how long a batch takes, if not as long as the fleet's habits say."""
SELECTOR: Final = "ingestrun.dev/stage=worker"
FIRST_RETRY: Final = 0.1
LAST_RETRY: Final = 2.0


def pool_spec(*, workers: int, batches: Json, **changes: Any) -> Json:
    """The spec of a run whose workers are simulated."""
    spec: Json = {
        "source": {"http": {"url": "http://example/data?part={partition}", "pagination": {"page": {}}}},
        "sink": {"parquet": {"path": "out"}},
        "workspace": {"persistentVolumeClaim": {"claimName": "data"}},
        "execution": {"mode": "Pool"},
        "batches": batches,
        "parallelism": workers,
        "backoff": {"initialSeconds": 1, "maxSeconds": 2},
        "backpressure": {"retrySeconds": 1},
        "podTemplate": {
            "annotations": {HOLD: "true", "simulate.ingestrun.dev/fail-attempts": "0"},
            "nodeSelector": {"ingestrun.dev/simulated": "true"},
            "tolerations": [{"key": "ingestrun.dev/simulated", "operator": "Exists"}],
        },
    }
    spec.update(changes)
    return spec


@contextlib.contextmanager
def bound_claim(cluster: Cluster, namespace: str, name: str = "data") -> Iterator[None]:
    """A claim that is bound at once, so that pods which mount it can be placed on simulated nodes."""
    meta, capacity = {"name": f"{namespace}-{name}"}, {"storage": "1Gi"}
    volume: Any = {
        "metadata": meta,
        "spec": {
            "capacity": capacity,
            "accessModes": ["ReadWriteMany"],
            "hostPath": {"path": "/nonexistent"},
            "claimRef": {"namespace": namespace, "name": name},
            "persistentVolumeReclaimPolicy": "Retain",
        },
    }
    claim: Any = {
        "metadata": {"name": name},
        "spec": {
            "storageClassName": "",
            "volumeName": meta["name"],
            "accessModes": ["ReadWriteMany"],
            "resources": {"requests": capacity},
        },
    }
    cluster.core.create_persistent_volume(volume)
    try:
        cluster.core.create_namespaced_persistent_volume_claim(namespace, claim)
        yield
    finally:
        cluster.core.delete_persistent_volume(meta["name"])


@dataclass(frozen=True, kw_only=True)
class Commit:
    """A batch that a worker has published: what a sink would hold. Times are those of the wall clock."""

    run: str
    uid: str
    batch: int
    attempt: int
    worker: int
    asked: float
    granted: float


@dataclass(frozen=True, kw_only=True)
class Told:
    """A claim or a permission that a worker was told of."""

    what: str
    """`claim` or `permission`."""
    uid: str
    batch: int
    attempt: int
    worker: int
    at: float
    """By the wall clock, when the answer was read."""


@dataclass(kw_only=True)
class Habits:
    """How the workers of a fleet behave. Shares are probabilities for each batch."""

    batch_seconds: float = 0.2
    seed: int = 0
    die: float = 0.0
    """The process ends without a word: before or after a commit."""
    fail: float = 0.0
    """The batch fails by its data, for now."""
    freeze: float = 0.0
    """It stands still for a while between permission and commit, and comes back as if nothing had happened."""
    repeat: float = 0.0
    """A request is sent twice, the first answer is thrown away."""
    straggle: float = 0.0
    """A copy of a request arrives later, among those that were sent after it."""
    delay: float = 0.0
    """A request arrives late."""
    zombie: float = 0.0
    """Its pod has failed for all that the cluster knows; it goes on, and comes back with its old claim."""
    freeze_seconds: float = 1.0
    """Most seconds of a freeze, a delay, a copy's lateness; twice as many for a zombie."""


@dataclass(kw_only=True)
class Ledger:
    """What all workers of a fleet have seen and done."""

    commits: list[Commit] = field(default_factory=list)
    claim_seconds: list[float] = field(default_factory=list)
    told_cancelled: dict[str, list[float]] = field(default_factory=dict)
    """Moments at which workers heard of the end of their run, by its name."""
    told: list[Told] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    mishaps: Counter[str] = field(default_factory=Counter)
    """How often each of the habits was had."""


class _Ended(Exception):  # noqa: N818
    """The process ends, with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class _Worker:
    """One worker process."""

    def __init__(self, fleet: Fleet, pod: Json, session: aiohttp.ClientSession) -> None:
        self._fleet = fleet
        self._env = {entry["name"]: entry.get("value", "") for entry in pod["spec"]["containers"][0]["env"]}
        self._session = session
        self._meta = pod["metadata"]
        self._run, self._uid = self._env["INGEST_RUN_NAME"], self._env["INGEST_RUN_UID"]
        self._number = int(self._env["INGEST_WORKER"])
        self._random = random.Random(f"{fleet.habits.seed}/{self._uid}/{self._number}")
        told = self._meta.get("annotations") or {}
        self._batches = int(told.get(BATCHES, fleet.chain_batches))
        self._seconds = float(told.get(BATCH_SECONDS, fleet.habits.batch_seconds))

    async def live(self) -> int:
        """Do the work; return the exit code."""
        reports: list[Json] = []
        try:
            while True:
                asked = time.time()
                answer = await self._ask("claim", {"v": "v1", "reports": reports, "waitSeconds": 10})
                reports = []
                if "claim" in answer:
                    self._fleet.ledger.claim_seconds.append(time.time() - asked)
                    report = await self._work(answer["claim"])
                    reports = [report] if report else []
                elif "wait" not in answer:
                    self._hear_of_end(answer)
                    return 0
        except _Ended as end:
            return end.code

    def _hear_of_end(self, answer: Json) -> None:
        if "cancelled" in answer:
            self._fleet.ledger.told_cancelled.setdefault(self._run, []).append(time.time())

    async def _work(self, claim: Json) -> Json | None:
        """Take one batch through; return the report, None if the batch was taken away."""
        habits, batch, attempt = self._fleet.habits, claim["batch"], claim["attempt"]
        held = {"batch": batch, "attempt": attempt}
        self._note("claim", held)
        await self._mishap(habits.zombie / 2, habits.die / 4)
        if self._chance(habits.fail):
            return {**held, "outcome": "failed", "stage": "fetch", "message": "simulated failure", "permanent": False}
        fetched: Json = {"read": ROWS, "exhausted": True}
        if not claim.get("partition"):
            following = int(claim.get("cursor") or 0) + 1
            fetched = {"read": ROWS, "nextCursor": str(following), "exhausted": following >= self._batches}
            await asyncio.sleep(self._seconds / 4)
            answer = await self._ask("fetched", {"v": "v1", **held, "fetched": fetched})
            if not answer.get("accepted"):
                self._give_up(answer)
                return None
        await asyncio.sleep(self._seconds)
        await self._mishap(0, habits.die / 4)
        asked = time.time()
        self._fleet.on_step(self._uid, "asked", batch)
        wish = {"v": "v1", **held, "fetched": fetched, "written": ROWS, "rejected": 0}
        answer = await self._ask("publish", wish)
        if not answer.get("granted"):
            self._give_up(answer)
            return None
        granted = time.time()
        self._note("permission", held)
        if self._chance(habits.freeze):
            self._fleet.ledger.mishaps["frozen"] += 1
            await asyncio.sleep(self._random.uniform(0.2, 1) * habits.freeze_seconds)
        await self._mishap(habits.zombie / 2, habits.die / 4)
        self._fleet.ledger.commits.append(
            Commit(run=self._run, uid=self._uid, **held, worker=self._number, asked=asked, granted=granted)
        )
        self._fleet.on_step(self._uid, "committed", batch)
        await self._mishap(0, habits.die / 4)
        return {**held, "outcome": "done", "fetched": fetched, "written": ROWS, "rejected": 0}

    def _note(self, what: str, held: Mapping[str, int]) -> None:
        self._fleet.ledger.told.append(Told(what=what, uid=self._uid, **held, worker=self._number, at=time.time()))
        self._fleet.on_step(self._uid, what, held["batch"])

    async def _mishap(self, zombie: float, die: float) -> None:
        """Die, or be cut off from the cluster for a while, and taken for dead, with these probabilities."""
        habits = self._fleet.habits
        if self._chance(die):
            self._fleet.ledger.mishaps["died"] += 1
            raise _Ended(137)
        if self._chance(zombie):
            self._fleet.ledger.mishaps["zombie"] += 1
            await self._fleet.lose(self._meta["namespace"], self._meta["name"])
            await asyncio.sleep(self._random.uniform(0.2, 2) * habits.freeze_seconds)

    def _give_up(self, answer: Json) -> None:
        if "cancelled" in answer:
            self._hear_of_end(answer)
            raise _Ended(0)

    async def _ask(self, what: str, body: Json) -> Json:
        """Ask until there is an answer. A repeated request is idempotent, so one may go out twice."""
        delay, habits, mishaps = FIRST_RETRY, self._fleet.habits, self._fleet.ledger.mishaps
        again = self._chance(habits.repeat)
        mishaps["repeated"] += again
        if self._chance(habits.straggle):
            mishaps["straggled"] += 1
            self._fleet.send_later(self._random.random() * habits.freeze_seconds, lambda: self._post(what, body))
        if self._chance(habits.delay):
            mishaps["delayed"] += 1
            await asyncio.sleep(self._random.random() * habits.freeze_seconds)
        while True:
            try:
                status, answer, later = await self._post(what, body)
            except (aiohttp.ClientError, TimeoutError, OSError):
                await asyncio.sleep(delay * (0.5 + self._random.random()))
                delay = min(delay * 2, LAST_RETRY)
                continue
            if status == 200 and not again:
                return answer
            again = False
            if status in (404, 409):
                raise _Ended(0)
            if status in (429, 503):
                await asyncio.sleep(later)
            elif status != 200:
                self._fleet.ledger.errors.append(f"{self._run}, worker {self._number}: {what}: {status} {answer}")
                raise _Ended(1)

    async def _post(self, what: str, body: Json) -> tuple[int, Json, float]:
        headers = {"Authorization": f"Bearer {self._env['INGEST_POOL_TOKEN']}"}
        url = f"{self._env['INGEST_POOL_URL']}/{what}"
        async with self._session.post(url, json=body, headers=headers) as response:
            text = await response.text()
            later = float(response.headers.get("Retry-After", "0.2"))
            return response.status, json.loads(text) if text else {}, later

    def _chance(self, share: float) -> bool:
        return share > 0 and self._random.random() < share


class Fleet:
    """All simulated workers of some namespaces, on a thread of their own. Use as a context manager."""

    def __init__(
        self,
        cluster: Cluster,
        namespaces: list[str],
        habits: Habits,
        *,
        chain_batches: int = 3,
        on_step: Callable[[str, str, int], None] = lambda *_: None,
    ) -> None:
        """`chain_batches`: how many batches a chain has.

        `on_step` is called on the fleet's thread with a run's UID, what a worker has just done (`claim`, `asked`,
        `permission`, `committed`) and the batch.
        """
        self._cluster = cluster
        self.on_step = on_step
        self._namespaces = namespaces
        self.habits = habits
        self.chain_batches = chain_batches
        self.ledger = Ledger()
        self._tasks: dict[str, asyncio.Task[int]] = {}
        self._over: set[str] = set()
        self._lost: set[str] = set()
        """Pods whose processes outlive them."""
        self._copies: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._session: aiohttp.ClientSession | None = None
        self._stopped = threading.Event()
        self._patches = ThreadPoolExecutor(8)
        self._threads = [threading.Thread(target=self._serve, daemon=True, name="workers")]
        self._threads += [
            threading.Thread(target=self._watch, args=(namespace,), daemon=True, name=f"pods of {namespace}")
            for namespace in namespaces
        ]

    def __enter__(self) -> Fleet:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._loop.call_soon_threadsafe(self._cancel_all)
        self._threads[0].join()
        self._patches.shutdown()

    def send_later(self, seconds: float, request: Callable[[], Awaitable[object]]) -> None:
        """Send a copy of a request, whose answer nobody hears."""

        async def send() -> None:
            await asyncio.sleep(seconds)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
                await request()

        task = self._loop.create_task(send())
        self._copies.add(task)
        task.add_done_callback(self._copies.discard)

    async def lose(self, namespace: str, name: str) -> None:
        """A node is lost: the pod has failed, and the process knows nothing of it."""
        self._lost.add(name)
        await self._loop.run_in_executor(self._patches, self._let_go, namespace, name, 137)

    def _cancel_all(self) -> None:
        for task in (*self._tasks.values(), *self._copies):
            task.cancel()
        self._loop.stop()

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(asyncio.gather(*self._tasks.values(), *self._copies, return_exceptions=True))
        if self._session is not None:
            self._loop.run_until_complete(self._session.close())
        self._loop.close()

    def _watch(self, namespace: str) -> None:
        """Follow the pods of one namespace, from a list on, and begin anew when the watch ends."""
        core = self._cluster.core
        api: Any = self._cluster.api
        begin: Any = watch.Watch
        while not self._stopped.is_set():
            with contextlib.suppress(client.ApiException, OSError):
                listed: Any = core.list_namespaced_pod(namespace, label_selector=SELECTOR)
                for pod in listed.items:
                    self._loop.call_soon_threadsafe(self._see, api.sanitize_for_serialization(pod))
                stream = begin().stream(
                    core.list_namespaced_pod,
                    namespace,
                    label_selector=SELECTOR,
                    resource_version=listed.metadata.resource_version,
                    timeout_seconds=30,
                )
                for event in stream:
                    if self._stopped.is_set():
                        return
                    if not self._loop.is_closed():
                        self._loop.call_soon_threadsafe(self._see, event["raw_object"])

    def _see(self, pod: Json) -> None:
        name, phase = pod["metadata"]["name"], pod.get("status", {}).get("phase")
        if phase == "Running" and "deletionTimestamp" not in pod["metadata"] and name not in self._over:
            if name not in self._tasks:
                self._tasks[name] = self._loop.create_task(self._process(pod))
        elif phase in ("Succeeded", "Failed") or "deletionTimestamp" in pod["metadata"]:
            self._over.add(name)
            task = self._tasks.get(name)
            if task is not None and name not in self._lost:
                task.cancel()

    async def _process(self, pod: Json) -> int:
        """The life of one process, from its pod's start to the end of its container."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=40)
            )
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        try:
            code = await _Worker(self, pod, self._session).live()
        finally:
            self._tasks.pop(name, None)
            self._over.add(name)
        if name not in self._lost:
            await self._loop.run_in_executor(self._patches, self._let_go, namespace, name, code)
        return code

    def _let_go(self, namespace: str, name: str, code: int) -> None:
        """End the container: KWOK completes a pod that is not held any more."""
        prefix = "simulate.ingestrun.dev/"
        annotations: Json = {HOLD: None}
        if code:
            annotations |= {f"{prefix}fail-attempts": "1", f"{prefix}exit-code": str(code)}
        with contextlib.suppress(client.ApiException):  # the pod may be gone
            self._cluster.core.patch_namespaced_pod(name, namespace, {"metadata": {"annotations": annotations}})
