"""What happened to each run: from the audit log, read as it grows, and from the observer's watches.

The audit log is the API server's own record; nothing of the operator is between it and the judge. Only what the checker
asks for is kept, and only of the runs that are there now: memory does not grow with the number of runs.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from ingestrun.model.names import LABEL_CANCELLED
from ingestrun.model.ranges import IndexRanges
from tests.race.pool_workers import Commit, Told

Json = dict[str, Any]

OPERATOR: Final = "system:serviceaccount:ingestrun-system:ingestrun-operator"
_UID: Final = "ingestrun.dev/run-uid"


@dataclass(frozen=True, kw_only=True)
class Counters:
    """What must not move once a run has ended."""

    claimed: str = ""
    fetched: str = ""
    published: str = ""
    failed: str = ""
    exhausted: bool = False
    records: tuple[int, int, int] = (0, 0, 0)
    """Fetched, rejected, published."""
    cursor: str | None = None

    @property
    def in_flight(self) -> set[int]:
        """Claimed and not ended."""
        return indexes(self.claimed) - indexes(self.published) - indexes(self.failed)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A pool's worker in a stored status, and the attempt at a batch that it holds."""

    worker: int
    batch: int | None = None
    attempt: int = 0


@dataclass(frozen=True, kw_only=True)
class Version:
    """One stored version of a run. Times are microseconds, of the API server's clock."""

    resource_version: int
    received: int
    answered: int
    actor: str
    status_write: bool
    generation: int = 1
    cancel: bool = False
    """It asks to be cancelled: by its spec, or by the operator's label, which outlives a cancel that is taken back."""
    reason: str | None = None
    """`spec.cancellation.reason`."""
    terminate: bool = False
    """`spec.cancellation.policy` is Terminate."""
    phase: str | None = None
    counters: Counters = Counters()
    conditions: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By type: status and reason."""
    cancellation: Mapping[str, Any] | None = None
    completed: str | None = None
    observed_generation: int = -1
    publishing: str = ""
    """In a pool: the batches that may be published."""
    workers: tuple[Holder, ...] = ()
    unpublished: frozenset[int] = frozenset()
    """Batches of a chain that were fetched and are not published; those that are to be fetched again are not in the
    counters' `fetched`, though their records count."""
    after_end: str = ""
    """Batches that were published after the end."""
    unknown: str = ""
    """Batches of which the record of the cancel says that nobody knows."""

    @property
    def ended(self) -> bool:
        """Whether its phase is one that nothing leaves."""
        return self.phase in ("Succeeded", "Failed", "Cancelled")

    def condition(self, kind: str) -> tuple[str, str]:
        """Its status and reason; empty where there is none."""
        return self.conditions.get(kind, ("", ""))


@dataclass(frozen=True, kw_only=True)
class JobCreate:
    """A call that asked for a Job of the run."""

    name: str
    batch: int
    """Of a pool's worker its number; the same holds for its pod."""
    step: int
    stage: str
    attempt: int
    received: int
    answered: int
    code: int
    actor: str
    resource_version: int | None = None
    """Of the Job as it was stored first, where the audit policy or a watch has shown it."""


@dataclass(kw_only=True)
class Pod:
    """A pod's life, by the resourceVersions at which the watch has shown its steps."""

    name: str
    job: str
    batch: int
    stage: str
    attempt: int
    created: int
    started: int | None = None
    ended: int | None = None
    succeeded: bool = False
    deleting: int | None = None
    """When it was told to end, if that came before its own end."""
    gone: int | None = None


@dataclass(kw_only=True)
class RunHistory:
    """Everything that is known of one run."""

    uid: str
    namespace: str
    name: str
    rows: int = 10
    versions: list[Version] = field(default_factory=list)
    creates: list[JobCreate] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)
    """The codes of refused writes of the run's spec."""
    pods: dict[str, Pod] = field(default_factory=dict)
    job_versions: dict[str, int] = field(default_factory=dict)
    """The resourceVersion at which the watch has shown each Job first: that of its creation."""
    seen: list[Version] = field(default_factory=list)
    """The versions that the observer's watch has shown, without times."""
    unanswered: list[tuple[int, int]] = field(default_factory=list)
    """Status writes that ended in a server's error, from receipt to answer: a writer that is killed meanwhile gets the
    504 of a cancelled request, and what it wrote may be stored all the same."""
    calls: Counter[str] = field(default_factory=Counter)
    """The operator's calls that name the run."""
    moment: str = ""
    planned_kill: bool = False
    pooled: bool = False
    """Workers of a pool do the batches; the next two are what they say."""
    told: list[Told] = field(default_factory=list)
    commits: list[Commit] = field(default_factory=list)

    def ordered(self) -> list[Version]:
        """The versions in the order in which they were stored; a write that changed nothing made none."""
        logged: dict[int, Version] = {}
        for version in sorted(self.versions, key=lambda v: (v.resource_version, v.answered)):
            logged.setdefault(version.resource_version, version)
        missing = {v.resource_version: v for v in self.seen if v.resource_version not in logged}
        if not missing:
            return list(logged.values())
        ordered: list[Version] = []
        for number in sorted(logged.keys() | missing.keys()):
            found = logged.get(number)
            ordered.append(found if found is not None else self._timed(missing[number], ordered))
        return ordered

    def _timed(self, version: Version, before: list[Version]) -> Version:
        """A version that no answered write accounts for, at the time of the unanswered one that stored it."""
        last = before[-1] if before else None
        since = last.answered if last else 0
        received, answered = next((w for w in sorted(self.unanswered) if w[0] >= since), (since, since))
        # The operator writes labels as well; what leaves the status as it was is no decision of its.
        written = last is None or _status(last) != _status(version)
        return replace(version, received=received, answered=answered, status_write=written)

    @property
    def terminal(self) -> Version | None:
        """The version in which the run ended."""
        return next((version for version in self.ordered() if version.ended), None)

    @property
    def requested(self) -> Version | None:
        """The version that asked for the cancel first."""
        return next((version for version in self.ordered() if version.cancel), None)

    @property
    def drained(self) -> Version | None:
        """The version that said Drained first."""
        return next((version for version in self.ordered() if version.condition("Drained")[0] == "True"), None)


def _status(version: Version) -> tuple[object, ...]:
    return (
        version.phase,
        version.counters,
        version.conditions,
        version.cancellation,
        version.completed,
        version.observed_generation,
        version.publishing,
        version.workers,
        version.after_end,
    )


def subject_of(labels: Mapping[str, str]) -> int:
    """The batch of a Job or pod; of a pool's worker its number."""
    return int(labels[f"ingestrun.dev/{'worker' if labels['ingestrun.dev/stage'] == 'worker' else 'batch'}"])


def indexes(ranges: str) -> set[int]:
    """ "0-2,5" as a set."""
    return set(IndexRanges.parse(ranges))


def microseconds(stamp: str) -> int:
    """An audit log's time as a number; no float: that would lose the last digits."""
    moment = datetime.fromisoformat(stamp.replace("Z", "+00:00")) - datetime(1970, 1, 1, tzinfo=UTC)
    return (moment.days * 86_400 + moment.seconds) * 1_000_000 + moment.microseconds


class AuditTail:
    """The audit log from now on, its new lines at each `poll`; follows a rotation."""

    def __init__(self, path: Path, needle: str) -> None:
        """Lines without `needle` are passed over unparsed."""
        self._path = path
        self._needle = needle.encode()
        self._file: BinaryIO = path.open("rb")
        self._file.seek(0, 2)
        self._rest = b""
        self.lines = 0

    def poll(self) -> Iterator[Json]:
        """The entries that were written since the last time."""
        yield from self._read()
        if self._path.exists() and self._path.stat().st_ino != self._inode():
            yield from self._read()
            self._file.close()
            self._file = self._path.open("rb")
            self._rest = b""
            yield from self._read()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _inode(self) -> int:
        return os.fstat(self._file.fileno()).st_ino

    def _read(self) -> Iterator[Json]:
        while block := self._file.read(1 << 20):
            *lines, self._rest = (self._rest + block).split(b"\n")
            for line in lines:
                if self._needle in line:
                    self.lines += 1
                    entry: Json = json.loads(line)
                    if entry.get("stage") in ("ResponseComplete", "ResponseStarted") and "objectRef" in entry:
                        yield entry


class Histories:
    """The histories of the runs that are there now, by UID."""

    def __init__(self) -> None:
        self.runs: dict[str, RunHistory] = {}
        self.calls: dict[str, Counter[str]] = {}
        """The operator's calls by namespace, watches apart."""
        self.actors: dict[str, set[str]] = {}
        """Who wrote a status or created a Job, by namespace: more than one address is more than one operator."""
        self._names: dict[tuple[str, str], str] = {}
        self._over: set[str] = set()

    def add(self, entry: Json) -> None:
        """Take one entry of the audit log."""
        target = entry["objectRef"]
        namespace, resource = target.get("namespace", ""), target.get("resource")
        if namespace in self._over:
            return  # the operator's last calls there, written down after all was judged
        code = int((entry.get("responseStatus") or {}).get("code", 0))
        if entry["user"]["username"] == OPERATOR:
            call = call_name(entry)
            self.calls.setdefault(namespace, Counter())[call] += 1
            uid = self._names.get((namespace, target.get("name", "")))
            if uid in self.runs:
                self.runs[uid].calls[call] += 1
            if entry["verb"] in ("create", "patch") and resource in ("jobs", "ingestruns"):
                self.actors.setdefault(namespace, set()).add(",".join(entry.get("sourceIPs") or ()))
        if resource == "ingestruns" and target.get("subresource") in (None, "status"):
            self._run(entry, code)
        elif resource == "jobs" and entry["verb"] == "create" and target.get("subresource") is None:
            self._job(entry, code)

    def forget(self, namespaces: Iterable[str]) -> None:
        """Drop all that is kept of these namespaces, and take nothing of them any more."""
        gone = set(namespaces)
        self._over |= gone
        self.runs = {uid: run for uid, run in self.runs.items() if run.namespace not in gone}
        self._names = {key: uid for key, uid in self._names.items() if key[0] not in gone}
        for namespace in gone:
            self.calls.pop(namespace, None)
            self.actors.pop(namespace, None)

    def _of(self, uid: str, namespace: str, name: str) -> RunHistory:
        self._names[namespace, name] = uid
        return self.runs.setdefault(uid, RunHistory(uid=uid, namespace=namespace, name=name))

    def _run(self, entry: Json, code: int) -> None:
        target, stored = entry["objectRef"], entry.get("responseObject") or {}
        if entry["verb"] not in ("create", "update", "patch"):
            return
        if 200 <= code < 300 and stored.get("kind") == "IngestRun":
            meta = stored["metadata"]
            self._of(meta["uid"], meta["namespace"], meta["name"]).versions.append(read_version(entry))
            return
        run = self.runs.get(self._names.get((target["namespace"], target.get("name", "")), ""))
        if run is not None and code >= 400 and target.get("subresource") is None:
            run.refused.append(code)
        elif run is not None and code >= 500:
            run.unanswered.append(
                (microseconds(entry["requestReceivedTimestamp"]), microseconds(entry["stageTimestamp"]))
            )

    def _job(self, entry: Json, code: int) -> None:
        meta = (entry.get("requestObject") or {}).get("metadata") or {}
        labels = meta.get("labels") or {}
        uid = labels.get(_UID)
        if uid is None:
            return
        run = self._of(uid, meta["namespace"], labels.get("ingestrun.dev/run", ""))
        stored = (entry.get("responseObject") or {}).get("metadata") or {}
        run.creates.append(
            JobCreate(
                name=meta["name"],
                batch=subject_of(labels),
                step=int(labels["ingestrun.dev/step"]),
                stage=labels["ingestrun.dev/stage"],
                attempt=int(labels["ingestrun.dev/attempt"]),
                received=microseconds(entry["requestReceivedTimestamp"]),
                answered=microseconds(entry["stageTimestamp"]),
                code=code,
                actor=entry["user"]["username"],
                resource_version=int(stored["resourceVersion"]) if "resourceVersion" in stored else None,
            )
        )


def call_name(entry: Json) -> str:
    """Verb and resource as RBAC names them."""
    target = entry["objectRef"]
    return f"{entry['verb']} {'/'.join(filter(None, (target.get('resource'), target.get('subresource'))))}"


def read_version(entry: Json) -> Version:
    """The run that a write has stored."""
    return replace(
        version_of(entry["responseObject"]),
        received=microseconds(entry["requestReceivedTimestamp"]),
        answered=microseconds(entry["stageTimestamp"]),
        actor=entry["user"]["username"],
        status_write=entry["objectRef"].get("subresource") == "status",
    )


def version_of(stored: Json) -> Version:
    """A run's body, without who wrote it and when."""
    meta, spec, status = stored["metadata"], stored["spec"], stored.get("status") or {}
    batches, records = status.get("batches") or {}, status.get("records") or {}
    return Version(
        resource_version=int(meta["resourceVersion"]),
        received=0,
        answered=0,
        actor="",
        status_write=False,
        generation=meta.get("generation", 1),
        cancel=bool(spec.get("cancel")) or (meta.get("labels") or {}).get(LABEL_CANCELLED) == "true",
        reason=(spec.get("cancellation") or {}).get("reason"),
        terminate=(spec.get("cancellation") or {}).get("policy") == "Terminate",
        phase=status.get("phase"),
        counters=Counters(
            **{key: batches.get(key, "") for key in ("claimed", "fetched", "published", "failed")},
            exhausted=bool(batches.get("exhausted")),
            records=(records.get("fetched", 0), records.get("rejected", 0), records.get("published", 0)),
            cursor=status.get("cursor"),
        ),
        conditions={c["type"]: (c["status"], c["reason"]) for c in status.get("conditions") or ()},
        cancellation=status.get("cancellation"),
        completed=status.get("completionTime"),
        observed_generation=status.get("observedGeneration", -1),
        publishing=batches.get("publishing") or "",
        workers=tuple(
            Holder(worker=each["worker"], batch=each.get("batch"), attempt=each.get("batchAttempt", 0))
            for each in status.get("workers") or ()
        ),
        unpublished=frozenset(each["batch"] for each in batches.get("unpublished") or ()),
        after_end=(status.get("afterEnd") or {}).get("published", ""),
        unknown=(status.get("cancellation") or {}).get("unknown", ""),
    )
