"""The runs of these tests: the demo's, with changes."""

from __future__ import annotations

from typing import Any, Final

import yaml

from tests.e2e.cluster import ROOT, Json, Kubectl, wait_for

ROWS: Final = 336_776


def flights(namespace: str, name: str, **changes: Any) -> Json:
    """The demo's run, in the tests' namespace, publishing to a folder of its own; with a Job for each stage."""
    body: Json = yaml.safe_load((ROOT / "dev/demo/runs/flights.yaml").read_text())
    body["metadata"] = {"name": name, "namespace": namespace}
    body["spec"]["source"]["http"]["url"] = f"http://flights.{namespace}/flights"
    body["spec"]["sink"]["parquet"]["path"] = name
    body["spec"]["execution"] = {"mode": "JobPerStage"}
    body["spec"].update(changes)
    return body


def run_of(kubectl: Kubectl, namespace: str, name: str) -> Json:
    return kubectl.get("-n", namespace, "ingestrun", name)


def ended(kubectl: Kubectl, namespace: str, name: str, *, seconds: float) -> Json:
    kubectl("-n", namespace, "wait", f"ingestrun/{name}", "--for=condition=Finished", f"--timeout={seconds:g}s")
    return run_of(kubectl, namespace, name)


def published(run: Json) -> int:
    return int((run.get("status") or {}).get("records", {}).get("published", 0))


def said_by(kubectl: Kubectl, namespace: str, job: Json) -> str:
    """What a Job of the tests' own prints, once it is complete."""
    name = job["metadata"]["name"]
    job["metadata"]["namespace"] = namespace
    kubectl.apply([job])

    def over() -> str | None:
        status = kubectl.get("-n", namespace, "job", name).get("status") or {}
        ends = [c["type"] for c in status.get("conditions") or () if c["type"] in ("Complete", "Failed")]
        return ends[0] if ends else None

    end = wait_for(over, seconds=180, what=f"the Job {name}")
    said = kubectl("-n", namespace, "logs", f"job/{name}")
    assert end == "Complete", said
    return said


def without_image(namespace: str) -> Json:
    """A run whose first pod never gets its image. Begun early: the verdict comes after two minutes of grace."""
    body = flights(namespace, "no-image", hooks=[])
    del body["spec"]["source"]
    body["spec"]["fetch"] = {"image": "localhost/no-such-image:1", "imagePullPolicy": "Never"}
    return body


def events(kubectl: Kubectl, namespace: str, name: str, reason: str) -> list[str]:
    """What was told of a run with that reason, once it was: Events come a moment after the status."""

    def told() -> list[str]:
        items = kubectl.get("-n", namespace, "events")["items"]
        return [e["message"] for e in items if e["reason"] == reason and e["involvedObject"]["name"] == name]

    return wait_for(told, seconds=90, what=f"an Event {reason}")
