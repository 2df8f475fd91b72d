"""The Jobs and pods that carry a run's labels and are not the run's own, each of which is logged once."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from ingestrun.kube.protocol import Object
from ingestrun.model.names import LABEL_RUN, LABEL_RUN_UID
from ingestrun.planner.batch.ownership import OrphanedJob, orphaned_job

logger = structlog.get_logger("ingestrun")


@dataclass(frozen=True, slots=True)
class _Stranger:
    run_uid: str
    orphan: OrphanedJob | None = None


class Strangers:
    """The strangers that exist, as far as has been seen. There are few, so all are kept."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Stranger] = {}
        self._pods: dict[str, _Stranger] = {}
        self._listed: set[str] | None = None
        self.orphan_seen: Callable[[], None] = lambda: None
        """Called when a Job is seen that may be an orphan, and when the run of one is gone."""

    def note_job(self, body: Object, why: str) -> None:
        """Note a Job that is not the own Job of the run that its label names."""
        orphan = orphaned_job(body)
        known = self._note(self._jobs, body, orphan)
        if orphan is not None:
            self.orphan_seen()
        if not known:
            _log("ignoring a Job that is not of the run that its labels name", body, job=True, why=why)

    def note_pod(self, body: Object, why: str) -> None:
        """Note a pod that does not belong to the run that its label names. That of a foreign Job is told with it."""
        known = self._note(self._pods, body, None)
        if not known and not self.is_of_foreign_job(body):
            _log("ignoring a pod that is not of the run that its labels name", body, job=False, why=why)

    def is_of_foreign_job(self, pod: Object) -> bool:
        """Tell whether one of the Jobs noted here controls the pod."""
        references = pod["metadata"].get("ownerReferences") or ()
        return any(reference.get("controller") and reference["uid"] in self._jobs for reference in references)

    def forget(self, uid: str) -> None:
        """Drop a Job or pod that is gone, or has been found to be the run's own."""
        self._jobs.pop(uid, None)
        self._pods.pop(uid, None)

    def has_jobs_with_labels_of(self, run_uid: str) -> bool:
        """Tell whether a foreign Job carries the labels of this run, so that a selector would find it."""
        return any(job.run_uid == run_uid for job in self._jobs.values())

    def run_gone(self, run_uid: str) -> None:
        """Take in that a run is gone, which may make orphans of Jobs that have lost it as their owner."""
        if any(job.orphan is not None and job.run_uid == run_uid for job in self._jobs.values()):
            self.orphan_seen()

    def orphans(self, known_runs: Collection[str]) -> list[OrphanedJob]:
        """Return the Jobs that may be orphans: those without an owner whose run's UID is not among the known ones."""
        found = (job.orphan for job in self._jobs.values() if job.run_uid not in known_runs)
        return [orphan for orphan in found if orphan is not None]

    def begin_sync(self) -> None:
        """Note from now on which strangers are listed."""
        self._listed = set()

    def finish_sync(self) -> None:
        """Drop the strangers that the lists have not shown."""
        listed, self._listed = self._listed, None
        for uid in [uid for uid in (*self._jobs, *self._pods) if listed is not None and uid not in listed]:
            self.forget(uid)

    def _note(self, known: dict[str, _Stranger], body: Object, orphan: OrphanedJob | None) -> bool:
        """Keep a stranger; return whether it was known."""
        meta = body["metadata"]
        before = meta["uid"] in known
        known[meta["uid"]] = _Stranger((meta.get("labels") or {}).get(LABEL_RUN_UID, ""), orphan)
        if self._listed is not None:
            self._listed.add(meta["uid"])
        return before


def _log(event: str, body: Object, *, job: bool, why: str) -> None:
    meta = body["metadata"]
    labels, name = meta.get("labels") or {}, {"job" if job else "pod": meta["name"]}
    about = {"run": labels.get(LABEL_RUN), "namespace": meta["namespace"], "uid": labels.get(LABEL_RUN_UID)}
    logger.warning(event, **about, **name, why=why)
