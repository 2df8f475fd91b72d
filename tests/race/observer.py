"""What the API server shows to anyone who watches: runs, Jobs and pods; on connections of its own."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from kubernetes import client

from tests.api.conftest import GROUP, PLURAL, VERSION, Cluster
from tests.race.generator import Signal
from tests.race.history import Pod, Version, subject_of, version_of

Json = dict[str, Any]
OnSignal = Callable[[str, Signal], None]
"""Told of a run's UID and what was just seen of it."""

_LABEL = "ingestrun.dev/"


class Observer:
    """Watches everything in the namespaces that begin with `prefix`."""

    def __init__(self, cluster: Cluster, prefix: str, on_signal: OnSignal) -> None:
        self._cluster = cluster
        self._prefix = prefix
        self._on_signal = on_signal
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self.runs: dict[str, Json] = {}
        self.versions: dict[str, list[Version]] = {}
        """Each version of each run, by UID."""
        self.pods: dict[str, dict[str, Pod]] = {}
        """By the run's UID, by the pod's."""
        self.job_versions: dict[str, dict[str, int]] = {}
        """By the run's UID: at which resourceVersion each Job appeared."""
        self.relists = 0
        """How often a watch was begun by a list: more than once each means that single steps were not seen."""
        self._failed_jobs: set[str] = set()
        batch, core, custom = cluster.batch, cluster.core, cluster.custom
        labelled: Json = {"label_selector": f"{_LABEL}run-uid"}
        self._threads = [
            threading.Thread(target=self._follow, args=(list_, handle), daemon=True, name=f"watch {what}")
            for what, list_, handle in (
                ("runs", lambda **k: custom.list_cluster_custom_object(GROUP, VERSION, PLURAL, **k), self._run),
                ("jobs", lambda **k: batch.list_job_for_all_namespaces(**labelled, **k), self._job),
                ("pods", lambda **k: core.list_pod_for_all_namespaces(**labelled, **k), self._pod),
            )
        ]

    def start(self) -> None:
        """Begin to watch."""
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """End; the threads go with the process, they are asked at most once more."""
        self._stop.set()

    def alive(self) -> bool:
        """Whether all watches go on."""
        return all(thread.is_alive() for thread in self._threads)

    def forget(self, uids: set[str]) -> None:
        """Drop what is kept of these runs."""
        with self._lock:
            for uid in uids:
                self.runs.pop(uid, None)
                self.versions.pop(uid, None)
                self.pods.pop(uid, None)
                self.job_versions.pop(uid, None)
            self._failed_jobs.clear()

    def _follow(self, list_: Callable[..., Any], handle: Callable[[str, Json], None]) -> None:
        version = ""
        while not self._stop.is_set():
            try:
                if not version:
                    listed = json.loads(list_(_preload_content=False).data)
                    for body in listed["items"]:
                        if body["metadata"]["namespace"].startswith(self._prefix):
                            handle("LISTED", body)
                    version = listed["metadata"]["resourceVersion"]
                    self.relists += 1
                answer = list_(
                    _preload_content=False,
                    watch=True,
                    resource_version=version,
                    allow_watch_bookmarks=True,
                    timeout_seconds=240,
                )
                for event in _events(answer):
                    body = event["object"]
                    if event["type"] == "ERROR":
                        version = ""
                        break
                    version = body["metadata"]["resourceVersion"]
                    if event["type"] != "BOOKMARK" and body["metadata"]["namespace"].startswith(self._prefix):
                        handle(event["type"], body)
            except (client.ApiException, OSError, ValueError):
                time.sleep(0.2)

    def _run(self, kind: str, body: Json) -> None:
        uid, status = body["metadata"]["uid"], body.get("status") or {}
        if kind == "DELETED":
            return
        with self._lock:
            before = (self.runs.get(uid) or {}).get("status") or {}
            self.runs[uid] = body
            self.versions.setdefault(uid, []).append(version_of(body))
        if (status.get("batches") or {}).get("claimed") and not (before.get("batches") or {}).get("claimed"):
            self._on_signal(uid, Signal(kind="claimed"))
        if _backing_off(status) - _backing_off(before):
            self._on_signal(uid, Signal(kind="backoff"))
        if status.get("phase") != before.get("phase"):
            self._on_signal(uid, Signal(kind=str(status.get("phase")).lower()))
        if any(c["type"] == "Backpressured" and c["status"] == "True" for c in status.get("conditions") or ()):
            self._on_signal(uid, Signal(kind="backpressured"))

    def _job(self, kind: str, body: Json) -> None:
        labels, name = body["metadata"]["labels"], body["metadata"]["name"]
        uid = labels[f"{_LABEL}run-uid"]
        place: Json = {"stage": labels[f"{_LABEL}stage"], "batch": subject_of(labels)}
        if kind == "ADDED":
            with self._lock:
                self.job_versions.setdefault(uid, {}).setdefault(name, int(body["metadata"]["resourceVersion"]))
            self._on_signal(uid, Signal(kind="job", **place))
        conditions = (body.get("status") or {}).get("conditions") or ()
        if any(c["type"] == "Failed" and c["status"] == "True" for c in conditions) and name not in self._failed_jobs:
            self._failed_jobs.add(name)
            self._on_signal(uid, Signal(kind="failed", **place))

    def _pod(self, kind: str, body: Json) -> None:
        meta, status = body["metadata"], body.get("status") or {}
        labels, version = meta["labels"], int(meta["resourceVersion"])
        uid = labels[f"{_LABEL}run-uid"]
        with self._lock:
            pods = self.pods.setdefault(uid, {})
            new = meta["uid"] not in pods
            if new:
                pods[meta["uid"]] = Pod(
                    name=meta["name"],
                    job=labels.get("batch.kubernetes.io/job-name", ""),
                    batch=subject_of(labels),
                    stage=labels[f"{_LABEL}stage"],
                    attempt=int(labels[f"{_LABEL}attempt"]),
                    created=version,
                )
            pod = pods[meta["uid"]]
            before = (pod.started, pod.ended)
            phase = status.get("phase")
            states = [c.get("state") or {} for c in status.get("containerStatuses") or ()]
            ran = phase in ("Running", "Succeeded") or any("running" in s or "terminated" in s for s in states)
            if ran and pod.started is None:
                pod.started = version
            if phase in ("Succeeded", "Failed") and pod.ended is None:
                pod.ended, pod.succeeded = version, phase == "Succeeded"
            if "deletionTimestamp" in meta and pod.ended is None and pod.deleting is None:
                pod.deleting = version
            if kind == "DELETED" and pod.gone is None:
                pod.gone = version
        if new:
            self._on_signal(uid, Signal(kind="pending", stage=pod.stage, batch=pod.batch))
        if before[0] is None and pod.started is not None:
            self._on_signal(uid, Signal(kind="running", stage=pod.stage, batch=pod.batch))
        if before[1] is None and pod.ended is not None and pod.succeeded:
            self._on_signal(uid, Signal(kind="ended", stage=pod.stage, batch=pod.batch))


def _backing_off(status: Json) -> set[int]:
    """The batches of a pool that wait for their next attempt."""
    checkpoints = (status.get("batches") or {}).get("checkpoints") or ()
    return {entry["batch"] for entry in checkpoints if "notBefore" in entry}


def _events(answer: Any) -> Iterator[Json]:
    rest = b""
    try:
        for block in answer.stream(amt=None, decode_content=False):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                if line:
                    yield json.loads(line)
    finally:
        answer.close()
        answer.release_conn()
