"""What a watch event does here: it updates the store, and asks for a look at the run. No decision is made."""

from __future__ import annotations

from typing import Any, Final, NoReturn

import kopf
import structlog

from ingestrun.controller.state.cache import RunCache, parents_of
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model import names
from ingestrun.planner.batch.attempt import MalformedJobError, read_job, read_pod
from ingestrun.planner.run.concurrency import ConcurrentRun, affects

logger = structlog.get_logger("ingestrun.watch")


class EventHandlers:
    """Takes events in any order, doubled or late; types are the API's (None: from a list)."""

    def __init__(self, store: RunCache, queue: WorkQueue[RunKey]) -> None:
        self._store = store
        self._queue = queue

    def run(self, event_type: str | None, body: Object) -> None:
        """A run was added, changed or deleted."""
        meta = body["metadata"]
        key = RunKey.of(body)
        if event_type != "DELETED":
            self._queue.add(self._store.upsert_run(body), "run")
            self._look_around(key, body)
            self._wake_rivals(body, gone=False)
            return
        known = self._store.run(key)
        if known is not None and known["metadata"]["uid"] == meta["uid"]:
            self._store.remove_run(key)
            self._queue.forget(key)
            for waiting in self._store.resuming_runs(key):
                self._queue.add(waiting, "resume")
            self._wake_rivals(body, gone=True)

    def _wake_rivals(self, body: Object, *, gone: bool) -> None:
        """A run of some concurrency key that waits is made room for; one that is over makes room."""
        rivals = self._store.peers_of(body)
        if not rivals:
            return
        changed = ConcurrentRun.read(body)
        for other in rivals:
            if other["metadata"]["uid"] != changed.uid and affects(changed, ConcurrentRun.read(other), gone=gone):
                self._queue.add(RunKey.of(other), "rival")

    def _look_around(self, key: RunKey, body: Object) -> None:
        """A cancel goes on to the runs below, what became of them is told above, and one that waits may resume."""
        for waiting in self._store.resuming_runs(key):
            self._queue.add(waiting, "resume")
        cancellation = (body.get("status") or {}).get("cancellation") or {}
        if cancellation.get("cascade"):
            for child in self._store.children_of(key):
                self._queue.add(RunKey.of(child), "parent")
        for parent in parents_of(body):
            above = self._store.run(parent)
            record = ((above or {}).get("status") or {}).get("cancellation") or {}
            if above is not None and record.get("cascade") and not self._store.is_archived(above["metadata"]["uid"]):
                self._queue.add(parent, "child")

    def job(self, event_type: str | None, body: Object) -> None:
        """A Job with our label was added, changed or deleted."""
        try:
            job = read_job(body)
        except MalformedJobError as error:
            logger.warning("ignoring a Job that is not ours", why=str(error))
            return
        if event_type == "DELETED":
            self._store.remove_job(run_uid=job.run_uid, job_uid=job.uid)
        else:
            self._store.upsert_job(job)
        self._look(job.run_uid, "job")

    def pod(self, event_type: str | None, body: Object) -> None:
        """A pod with our label was added, changed or deleted."""
        pod = read_pod(body)
        if pod is None:
            return
        if event_type == "DELETED":
            self._store.remove_pod(run_uid=pod.run_uid, pod_uid=pod.uid)
        else:
            self._store.upsert_pod(pod)
        self._look(pod.run_uid, "pod")

    def _look(self, run_uid: str, trigger: str) -> None:
        key = self._store.key_of(run_uid)
        if key is not None and not self._store.is_archived(run_uid):
            self._queue.add(key, trigger)


# The part of kopf: it watches runs, Jobs and pods; each event only says "look at this run".
#
# `on.event` handlers alone: they write nothing (no annotation, no finalizer), and no diff decides anything.
# kopf's change handlers store what they have seen before they have acted on it; one refused write, and a change
# is never shown again. What these handlers miss, the resync makes up for.
#

WATCH_SECONDS: Final = 300
"""How long one watch request lasts; a stream that has died in silence is noticed by its missing bookmarks."""


class NoDiffBase(kopf.DiffBaseStorage):
    """Nothing is remembered, since no handler of ours asks for a diff.

    kopf builds what it would remember for every event all the same: a deep copy of the object, which took a third of
    its work on one.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> NoReturn:
        raise NotImplementedError("a handler that needs a diff was registered")


def operator_settings() -> kopf.OperatorSettings:
    """Set kopf up as we use it: no peering, no scanning, no Events of its own, nothing stored in our objects."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.peering.standalone = True
    settings.persistence.finalizer = f"{names.GROUP}/kopf"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=names.GROUP)
    settings.persistence.diffbase_storage = NoDiffBase()
    settings.watching.server_timeout = WATCH_SECONDS
    settings.watching.client_timeout = WATCH_SECONDS + 10
    settings.watching.connect_timeout = 30
    settings.watching.chunk_size = 500
    settings.networking.request_timeout = 30
    settings.process.ultimate_exiting_timeout = 20
    # Filtered by the server: a decorator's `labels=` would stream every Job and pod of the cluster to us first.
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.LABEL_RUN_UID
    settings.watching.label_selectors["v1", "pods"] = names.LABEL_RUN_UID
    return settings


def registry(watch: EventHandlers) -> kopf.OperatorRegistry:
    """The handlers, bound to this process's store and queue."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=handlers, id="runs")
    async def on_run(event: kopf.RawEvent, **_: Any) -> None:
        watch.run(event["type"], event["object"])

    @kopf.on.event("batch", "v1", "jobs", registry=handlers, id="jobs")
    async def on_job(event: kopf.RawEvent, **_: Any) -> None:
        watch.job(event["type"], event["object"])

    @kopf.on.event("v1", "pods", registry=handlers, id="pods")
    async def on_pod(event: kopf.RawEvent, **_: Any) -> None:
        watch.pod(event["type"], event["object"])

    return handlers
