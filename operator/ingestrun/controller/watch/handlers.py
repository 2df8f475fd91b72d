"""Handlers of watch events: they update the cache, and ask for a look at the run. No decision is made.

`EventHandlers` has the handlers, `registry` binds them to kopf. kopf is given `on.event` handlers alone: they write
nothing (no annotation, no finalizer), and no diff decides anything. kopf's change handlers store what they have seen
before they have acted on it; one refused write, and a change is never shown again. What these handlers miss, the resync
makes up for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NoReturn

import kopf

from ingestrun.controller.state.cache import Change, RunCache
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model import names
from ingestrun.model.lineage import parents_of
from ingestrun.model.run import cancel_requested, has_ended
from ingestrun.planner.run.concurrency import ConcurrentRun, affects

BURST_SECONDS: Final = 0.05
"""Wait after a major change of a Job or a pod, so that stages which end together cost one pass and one write."""
SETTLE_SECONDS: Final = 1.0
"""Wait after a minor change of a Job or a pod, so that a pod on its way to its end costs one pass, not four."""
LIST_PAGE: Final = 200
"""Objects in one page of a list; kopf keeps the last page, as decoded, as long as it watches."""
IDLE_SECONDS: Final = 0.2
"""Time for which kopf's task for an object awaits its next event. It keeps the whole object meanwhile, and thousands of
runs are listed within seconds."""
WATCH_SECONDS: Final = 300
"""Duration of one watch request. A stream that has died in silence is noticed by its missing bookmarks."""


class EventHandlers:
    """Takes events in any order, doubled or late; types are the API's (None: from a list)."""

    def __init__(
        self, cache: RunCache, queue: WorkQueue[RunKey], *, stopped: Callable[[RunKey], None] = lambda _: None
    ) -> None:
        """Tell `stopped` of each event of a run that is to be cancelled, has ended or is gone."""
        self._cache = cache
        self._queue = queue
        self._stopped = stopped

    def run(self, event_type: str | None, body: Object) -> None:
        """Take in that a run was added, changed or deleted."""
        meta, key = body["metadata"], RunKey.of(body)
        if event_type == "DELETED" or "deletionTimestamp" in meta or cancel_requested(body) or has_ended(body):
            self._stopped(key)
        known = self._cache.run(key)
        if known is not None and event_type is None and self._cache.knows_newer(body):
            # Either the list is late, or the API server's data were restored from a backup: a live read tells.
            self._cache.memories.recall(known["metadata"]["uid"]).must_read = True
            self._queue.add(key, "list")
            return
        if event_type != "DELETED":
            self._cache.upsert_run(body)
            if not self._cache.memories.has_taken_up(meta["uid"], str(meta.get("resourceVersion", ""))):
                self._queue.add(key, "run")
            self._wake_relatives(key, body)
            self._wake_peers(body, gone=False)
            return
        if known is not None and known["metadata"]["uid"] == meta["uid"]:
            self._cache.remove_run(key)
            self._queue.forget(key)
            for waiting in self._cache.resuming_runs(key):
                self._queue.add(waiting, "resume")
            self._wake_peers(body, gone=True)

    def job(self, event_type: str | None, body: Object) -> None:
        """Take in that a Job with the run label was added, changed or deleted."""
        job = self._cache.own_job(body, gone=event_type == "DELETED")
        if job is None:
            return
        change = Change.MAJOR
        if event_type == "DELETED":
            self._cache.job_vanished(run_uid=job.run_uid, job_uid=job.uid)
        else:
            change = self._cache.upsert_job(job)
            if change is Change.NONE and event_type in (None, "ADDED"):
                # The pass that has created the Job has planned before it was there. One that waits to be admitted, or
                # for a pod, may have no other event, so the times of that wait are planned now.
                change = Change.MINOR
        self._look(job.run_uid, change, "job")

    def pod(self, event_type: str | None, body: Object) -> None:
        """Take in that a pod with the run label was added, changed or deleted."""
        pod = self._cache.own_pod(body, gone=event_type == "DELETED")
        if pod is None:
            return
        change = Change.MAJOR
        if event_type == "DELETED":
            self._cache.remove_pod(run_uid=pod.run_uid, pod_uid=pod.uid)
        else:
            change = self._cache.upsert_pod(pod)
        self._look(pod.run_uid, change, "pod")

    def _look(self, run_uid: str, change: Change, trigger: str) -> None:
        key = self._cache.key_of(run_uid)
        if key is None or change is Change.NONE or self._cache.is_archived(run_uid):
            return
        self._queue.add_after(key, BURST_SECONDS if change is Change.MAJOR else SETTLE_SECONDS, trigger)

    def _wake_peers(self, body: Object, *, gone: bool) -> None:
        """Wake the runs of the same concurrency key for which the change makes room, or that have to make room."""
        peers = self._cache.peers_of(body)
        if not peers:
            return
        changed = ConcurrentRun.read(body)
        for other in peers:
            if other["metadata"]["uid"] != changed.uid and affects(changed, ConcurrentRun.read(other), gone=gone):
                self._queue.add(RunKey.of(other), "peer")

    def _wake_relatives(self, key: RunKey, body: Object) -> None:
        """Wake the runs below for a cascading cancel, the run above for its outcome, and runs that wait to resume."""
        for waiting in self._cache.resuming_runs(key):
            self._queue.add(waiting, "resume")
        if _cascades(body):
            for child in self._cache.children_of(key):
                self._queue.add(RunKey.of(child), "parent")
        for parent in parents_of(body):
            above = self._cache.run(parent)
            if above is not None and _cascades(above) and not self._cache.is_archived(above["metadata"]["uid"]):
                self._queue.add(parent, "child")


def _cascades(body: Object) -> bool:
    cancellation = (body.get("status") or {}).get("cancellation") or {}
    return bool(cancellation.get("cascade"))


class NoDiffBase(kopf.DiffBaseStorage):
    """Stores nothing, because no handler asks for a diff.

    kopf builds for every event what it would store: a deep copy of the object, which took a third of its work on one.
    """

    def build(self, **_: Any) -> kopf.BodyEssence:
        return kopf.BodyEssence({})

    def fetch(self, **_: Any) -> None:
        return None

    def store(self, **_: Any) -> NoReturn:
        raise NotImplementedError("a handler that needs a diff was registered")


def operator_settings() -> kopf.OperatorSettings:
    """Return kopf's settings: no peering, no scanning, no Events of its own, nothing stored in objects."""
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
    settings.watching.chunk_size = LIST_PAGE
    settings.queueing.idle_timeout = IDLE_SECONDS
    settings.networking.request_timeout = 30
    settings.process.ultimate_exiting_timeout = 20
    # Filtered by the server: a decorator's `labels=` would stream every Job and pod of the cluster to us first.
    settings.watching.label_selectors["batch", "v1", "jobs"] = names.LABEL_RUN_UID
    settings.watching.label_selectors["v1", "pods"] = names.LABEL_RUN_UID
    return settings


def registry(watch: EventHandlers) -> kopf.OperatorRegistry:
    """Bind the handlers to kopf."""
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
