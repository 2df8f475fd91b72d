"""What a watch event does here: it updates the store, and asks for a look at the run. No decision is made."""

from __future__ import annotations

import structlog

from ingestrun.control.queue import KeyedQueue
from ingestrun.control.reconciler import Reconciler
from ingestrun.control.store import Store, parents_of
from ingestrun.engine.concurrency import read_rival, wakes
from ingestrun.engine.facts import MalformedJobError, read_job, read_pod
from ingestrun.kube.protocol import Object, RunKey

logger = structlog.get_logger("ingestrun.watch")


class Watch:
    """Takes events in any order, doubled or late; types are the API's (None: from a list)."""

    def __init__(self, store: Store, queue: KeyedQueue[RunKey], reconciler: Reconciler) -> None:
        self._store = store
        self._queue = queue
        self._reconciler = reconciler

    def run(self, event_type: str | None, body: Object) -> None:
        """A run was added, changed or deleted."""
        meta = body["metadata"]
        key = RunKey.of(body)
        if event_type != "DELETED":
            self._queue.add(self._store.saw_run(body), "run")
            self._look_around(key, body)
            self._wake_rivals(body, gone=False)
            return
        known = self._store.run(key)
        if known is not None and known["metadata"]["uid"] == meta["uid"]:
            self._reconciler.forget(key)
            self._queue.forget(key)
            for waiting in self._store.resumers(key):
                self._queue.add(waiting, "resume")
            self._wake_rivals(body, gone=True)

    def _wake_rivals(self, body: Object, *, gone: bool) -> None:
        """A run of some concurrency key that waits is made room for; one that is over makes room."""
        rivals = self._store.sharing(body)
        if not rivals:
            return
        changed = read_rival(body)
        for other in rivals:
            if other["metadata"]["uid"] != changed.uid and wakes(changed, read_rival(other), gone=gone):
                self._queue.add(RunKey.of(other), "rival")

    def _look_around(self, key: RunKey, body: Object) -> None:
        """A cancel goes on to the runs below, what became of them is told above, and one that waits may resume."""
        for waiting in self._store.resumers(key):
            self._queue.add(waiting, "resume")
        cancellation = (body.get("status") or {}).get("cancellation") or {}
        if cancellation.get("cascade"):
            for child in self._store.below(key):
                self._queue.add(RunKey.of(child), "parent")
        for parent in parents_of(body):
            above = self._store.run(parent)
            record = ((above or {}).get("status") or {}).get("cancellation") or {}
            if above is not None and record.get("cascade") and not self._store.closed(above["metadata"]["uid"]):
                self._queue.add(parent, "child")

    def job(self, event_type: str | None, body: Object) -> None:
        """A Job with our label was added, changed or deleted."""
        try:
            job = read_job(body)
        except MalformedJobError as error:
            logger.warning("ignoring a Job that is not ours", why=str(error))
            return
        if event_type == "DELETED":
            self._store.lost_job(run_uid=job.run_uid, job_uid=job.uid)
        else:
            self._store.saw_job(job)
        self._look(job.run_uid, "job")

    def pod(self, event_type: str | None, body: Object) -> None:
        """A pod with our label was added, changed or deleted."""
        pod = read_pod(body)
        if pod is None:
            return
        if event_type == "DELETED":
            self._store.lost_pod(run_uid=pod.run_uid, pod_uid=pod.uid)
        else:
            self._store.saw_pod(pod)
        self._look(pod.run_uid, "pod")

    def _look(self, run_uid: str, trigger: str) -> None:
        key = self._store.key_of(run_uid)
        if key is not None and not self._store.closed(run_uid):
            self._queue.add(key, trigger)
