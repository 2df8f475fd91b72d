"""Runs as JSON, and an API server in memory that answers the plugin's calls."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from ingestrun.cli.client import RUNS, Listed
from ingestrun.cli.errors import ExitCode, ServerError
from ingestrun.cli.output import Output
from ingestrun.cli.session import Session

Json = dict[str, Any]
ENDED = ("Succeeded", "Failed", "Cancelled")
NOW = datetime(2026, 11, 28, 12, 0, 0, tzinfo=UTC)
"""The server's time. This machine's is another."""


def at(ago: float) -> str:
    """The time so many seconds ago."""
    return (NOW - timedelta(seconds=ago)).strftime("%Y-%m-%dT%H:%M:%SZ")


def run_body(name: str = "flights", phase: str | None = "Running", *, age: float = 3600, **more: Any) -> Json:
    """A run. `more`: `spec`, `status`, and fields of the metadata."""
    spec = {"batches": {"partitions": {"count": 2}}, **more.pop("spec", {})}
    status = {**({"phase": phase} if phase else {}), **more.pop("status", {})}
    meta = {
        "name": name,
        "namespace": "geo",
        "uid": f"uid-{name}",
        "resourceVersion": "1",
        "creationTimestamp": at(age),
        **more,
    }
    return {"apiVersion": RUNS, "kind": "IngestRun", "metadata": meta, "spec": spec, "status": status}


def condition(kind: str, status: str, reason: str, message: str = "", *, ago: float = 60) -> Json:
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastTransitionTime": at(ago)}


def not_found(name: str) -> ServerError:
    message = f'ingestruns.ingestrun.dev "{name}" not found'
    return ServerError({"reason": "NotFound", "message": message}, 404)


class FakeApi:
    """An API server with the runs of one namespace, and an operator that makes a cancelled run Cancelled at once."""

    def __init__(self, *bodies: Json, jobs: Sequence[Json] = (), operator: bool = True) -> None:
        self.bodies = {body["metadata"]["name"]: copy.deepcopy(body) for body in bodies}
        self.patches: list[tuple[str, Json]] = []
        self.created: list[Json] = []
        self.namespace = "geo"
        self.refuse: Mapping[str, ServerError] = {}
        self.before_patch: Callable[[str], None] = lambda _: None
        self._jobs = list(jobs)
        self._operator = operator

    def run(self, namespace: str, name: str) -> tuple[Json, datetime]:
        if name not in self.bodies:
            raise not_found(name)
        return copy.deepcopy(self.bodies[name]), NOW

    def runs(self, namespace: str | None, *, selector: str | None = None, field_selector: str | None = None) -> Listed:
        field, _, value = (field_selector or "").partition("=")
        found = [
            body
            for name, body in self.bodies.items()
            if value == {"": "", "metadata.name": name, "status.phase": body["status"].get("phase")}[field]
        ]
        return Listed(items=copy.deepcopy(found), resource_version="9", at=NOW)

    def jobs(self, namespace: str, selector: str) -> list[Json]:
        return self._jobs

    def patch(self, namespace: str, name: str, patch: Mapping[str, Any], *, dry_run: bool = False) -> Json:
        self.before_patch(name)
        if name in self.refuse:
            raise self.refuse[name]
        body = self.bodies[name] if not dry_run else copy.deepcopy(self.bodies[name])
        wanted = (patch.get("metadata") or {}).get("resourceVersion")
        if wanted not in (None, body["metadata"]["resourceVersion"]):
            raise ServerError({"reason": "Conflict", "message": "the object has been modified"}, 409)
        self.patches.append((name, dict(patch)))
        merge(body["spec"], patch["spec"])
        self.touch(body)
        ended = body["status"].get("phase") in ENDED
        if body["spec"].get("cancel") and not ended and self._operator and not dry_run:
            self._cancel(body)
        return copy.deepcopy(body)

    def _cancel(self, body: Json) -> None:
        asked = body["spec"].get("cancellation") or {}
        body["status"] |= {"phase": "Cancelled", "cancellation": {"acceptedAt": at(0), **asked}}
        if asked.get("cascade"):
            for child in self.bodies.values():
                parent = (child["spec"].get("parentRef") or {}).get("name")
                if parent == body["metadata"]["name"] and child["status"].get("phase") not in ENDED:
                    child["spec"]["cancellation"] = asked
                    self._cancel(child)

    def touch(self, body: Json) -> None:
        """What any write does."""
        body["metadata"]["resourceVersion"] = str(int(body["metadata"]["resourceVersion"]) + 1)

    def create(self, namespace: str, body: Mapping[str, Any], *, dry_run: bool = False) -> Json:
        made = copy.deepcopy(dict(body))
        if not dry_run:
            self.created.append(made)
        return made

    def watch_runs(self, namespace: str | None, resource_version: str, **_: Any) -> Iterator[tuple[str, Json]]:
        yield from (("MODIFIED", copy.deepcopy(body)) for body in self.bodies.values())


def merge(target: Json, patch: Mapping[str, Any]) -> None:
    """A JSON merge patch."""
    for key, value in patch.items():
        if isinstance(value, Mapping):
            merge(target.setdefault(key, {}), value)
        elif value is None:
            target.pop(key, None)
        else:
            target[key] = value


def call(module: Any, api: FakeApi, *words: str) -> tuple[ExitCode, str, str]:
    """Run a command against it: the exit code, what it prints, and what it complains of."""
    out, err = io.StringIO(), io.StringIO()
    session = Session(module.parser().read(words), Output(out, err))
    vars(session)["api"] = api
    return module.run(session), out.getvalue(), err.getvalue()
