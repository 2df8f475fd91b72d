"""`make demo`: real data through the operator in a real cluster, then a cancel half-way, each claim checked."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dev.demo.audit import read_trail, timeline
from dev.demo.console import ROOT, Console, DemoError
from dev.demo.status import ENDED, ROWS, Status

NAMESPACE = "ingest-demo"
SYSTEM = "ingestrun-system"
RUN = "flights"
CANCELLED_RUNS = {"flights-cancelled": "in a pool of workers", "flights-cancelled-jobs": "with a Job for each stage"}
"""The runs that are cancelled half-way, and how each runs its batches."""
BATCHES = 7
CANCEL_AT = 3
"""The number of published batches at which the second run is cancelled."""
STUCK_SECONDS = 120
CANCEL_PATCH = {"spec": {"cancel": True, "cancellation": {"reason": "demo: enough for today"}}}
SKIPPING = "ingest run cancelled, skipping"


def main() -> int:
    """Run the demo; return 1 if a check fails."""
    cluster = os.environ.get("CLUSTER") or "kind"
    console = Console(cluster)
    try:
        right = story(console)
    except DemoError as error:
        console.say(f"\nThe demo stops: {error}")
        diagnose(console)
        return 1
    except KeyboardInterrupt:
        console.say("\ninterrupted: `make demo` again starts over")
        return 130
    console.say(f"\n{'All checks are right' if right else 'A CHECK HAS FAILED'}, after {console.elapsed:.0f} s.")
    return 0 if right else 1


def story(console: Console) -> bool:
    """Run all parts in order; return whether all checks passed."""
    prepare(console)
    ingest(console)
    begin_check(console, RUN)
    findings = [show_check(console, RUN)]
    for name in CANCELLED_RUNS:
        cancelled = cancel_half_way(console, name)
        findings += [show_check(console, name), judge(console, cancelled)]
    console.section("What to try next")
    if console.cluster != "current":
        console.say('  eval "$(python3 dev/cluster env)"        # kubectl for this cluster, in your shell')
    suspend = '{"spec":{"suspend":true}}'
    console.say(
        f"  kubectl -n {NAMESPACE} get ir -o wide   # `ir` is short for ingestruns\n"
        f"  kubectl -n {NAMESPACE} describe ir {next(iter(CANCELLED_RUNS))}\n"
        f"  kubectl -n {NAMESPACE} delete ir --all; kubectl apply -f dev/demo/runs/{RUN}.yaml\n"
        f"  kubectl -n {NAMESPACE} patch ir {RUN} --type merge -p '{suspend}'   # true: a pause; null: go on\n"
        "  make test                               # lint, types, unit, api and e2e tests\n"
        "  make cluster-down                       # remove the cluster"
    )
    return all(findings)


def prepare(console: Console) -> None:
    """Build and deploy images, cluster, operator and data source, and remove what an earlier demo has left."""
    prefix = os.environ.get("IMAGE_PREFIX", "")
    if console.cluster == "current" and not prefix:
        raise DemoError(
            "CLUSTER=current is your own cluster, which must be able to pull the images: give IMAGE_PREFIX, a"
            " registry to push them to (IMAGE_PREFIX=registry.example.com/team/), or localhost/ if you have loaded"
            " them into it yourself"
        )
    console.section("Images")
    console.run([sys.executable, "-m", "dev.images", "build"], shown="make images")
    console.section("Cluster")
    if console.cluster == "current":
        console.run([sys.executable, "dev/cluster", "up"], shown="make cluster-up CLUSTER=current")
        console.say("Your own cluster: there will be no audit log to show.")
    else:
        # Also if the cluster is up: that takes a second, and repairs a cluster that has died meanwhile.
        console.run([sys.executable, "dev/cluster", "up"], shown="make cluster-up")
    console.adopt()
    if console.cluster != "current":
        console.run([sys.executable, "-m", "dev.images", "load"], shown="make images-load")
    elif not prefix.startswith("localhost/"):
        console.run([sys.executable, "-m", "dev.images", "push"], shown="make images-push")
    console.section("The operator, by manifests/base with these images; then the demo's data source and volume")
    clean(console)
    console.run(["kubectl", "apply", "-k", "build/deploy"])
    console.run(["kubectl", "apply", "-k", "build/demo"])
    wait_for(console, "wait", "crd/ingestruns.ingestrun.dev", "--for=condition=Established", "--timeout=60s")
    wait_for(console, "-n", SYSTEM, "rollout", "status", "deployment/ingestrun-operator", "--timeout=120s")
    wait_for(console, "-n", NAMESPACE, "rollout", "status", "deployment/flights", "--timeout=120s")


def clean(console: Console) -> None:
    """Remove an earlier demo's runs (their Jobs go with them) and dataset."""
    if "NotFound" in console.try_capture(["kubectl", "get", "namespace", NAMESPACE]):
        return
    console.say("An earlier demo's runs and dataset are removed first.")
    in_demo = ["kubectl", "-n", NAMESPACE, "delete", "--ignore-not-found", "--wait=true", "--timeout=120s"]
    console.try_capture([*in_demo, "ingestruns", RUN, *CANCELLED_RUNS])
    console.capture([*in_demo, "jobs", "--all", "--cascade=foreground"])
    console.capture([*in_demo, "pvc", "ingest-data"])
    # One call for all of them, because `delete events --all` makes one call for each, at five a second.
    console.capture(["kubectl", "delete", "--raw", f"/api/v1/namespaces/{NAMESPACE}/events"])


def wait_for(console: Console, *arguments: str) -> None:
    """Run a kubectl command that waits, and show its output."""
    console.run(["kubectl", *arguments])


def ingest(console: Console) -> None:
    """Run the first run to its end."""
    console.section(f"Ingest {ROWS:,} flights from HTTP to Parquet")
    console.say((ROOT / "dev" / "demo" / "runs" / f"{RUN}.yaml").read_text())
    console.run(["kubectl", "apply", "-f", f"dev/demo/runs/{RUN}.yaml"])
    began = time.monotonic()
    status = follow(console, RUN)
    if status.phase != "Succeeded":
        raise DemoError(f"the run is {status.phase}, not Succeeded: {status.message}")
    took = time.monotonic() - began
    console.run(["kubectl", "-n", NAMESPACE, "get", "ingestruns"])
    workers = console.object("-n", NAMESPACE, "ingestrun", RUN)["status"]["execution"]["started"]
    console.say(f"{ROWS:,} rows in {took:.0f} s: {BATCHES} batches, by {workers} workers.")


def cancel_half_way(console: Console, name: str) -> dict[str, Any]:
    """Cancel a run half-way, wait until it has drained, and return it."""
    console.section(f"The same again {CANCELLED_RUNS[name]}, and a cancel half-way")
    console.run(["kubectl", "apply", "-f", f"dev/demo/runs/{name}.yaml"])
    status = follow(console, name, until_published=CANCEL_AT)
    if status.phase != "Running":
        raise DemoError(f"the run is {status.phase} before it could be cancelled: {status.message}")
    patch = json.dumps(CANCEL_PATCH, separators=(",", ":"))
    target = ["-n", NAMESPACE, "patch", "ingestrun", name, "--type", "merge", "-p"]
    began = time.monotonic()
    console.run(["kubectl", *target, patch])
    wait_quietly(console, name, "--for=jsonpath={.status.phase}=Cancelled", "30s")
    console.say(f"Cancelled {time.monotonic() - began:.1f} s after the command was typed:")
    console.run(["kubectl", "-n", NAMESPACE, "get", "ingestruns"])
    console.say("\nSoft: pods that had started may finish. Drained says that the last one has:")
    console.run(["kubectl", "-n", NAMESPACE, "wait", f"ingestrun/{name}", "--for=condition=Drained", "--timeout=120s"])
    run = console.object("-n", NAMESPACE, "ingestrun", name)
    begin_check(console, name, "--part", str(Status(run["status"]).files))
    console.say("\n.status.cancellation is the cancel's own record:")
    console.run(["kubectl", "-n", NAMESPACE, "get", "ingestrun", name, "-o", "jsonpath-as-json={.status.cancellation}"])
    await_events(console, name)
    console.say("\nThe run's events:")
    columns = "custom-columns=TIME:.eventTime,TYPE:.type,REASON:.reason,MESSAGE:.message"
    about = f"involvedObject.name={name}"
    console.run(
        [
            "kubectl",
            "-n",
            NAMESPACE,
            "get",
            "events",
            "--field-selector",
            about,
            "--sort-by=.metadata.creationTimestamp",
            "-o",
            columns,
        ]
    )
    show_skipped(console, run)
    return run


def show_skipped(console: Console, run: dict[str, Any]) -> None:
    """Show what was skipped because of the cancel: by the operator and, in a pool, by the workers.

    Raises:
        DemoError: nothing was.
    """
    name, uid = run["metadata"]["name"], run["metadata"]["uid"]
    console.say(f'\n"{SKIPPING}", in the logs of the operator and of the run\'s pods:')
    console.say(f"$ kubectl -n {SYSTEM} logs deployment/ingestrun-operator | grep '{SKIPPING}'")
    console.say(f"$ kubectl -n {NAMESPACE} logs -l ingestrun.dev/run={name} --tail=-1 | grep '{SKIPPING}'")
    log = console.capture(["kubectl", "-n", SYSTEM, "logs", "deployment/ingestrun-operator"])
    selector = ["-l", f"ingestrun.dev/run={name}", "--tail=-1"]
    log += console.try_capture(["kubectl", "-n", NAMESPACE, "logs", *selector])
    lines = [line for line in log.splitlines() if SKIPPING in line and uid in line]
    console.say("\n".join(lines[:5]))
    if len(lines) > 5:
        console.say(f"... {len(lines)} such lines in all")
    if not lines:
        raise DemoError(f"no log has a line {SKIPPING!r} for this run")


def follow(console: Console, name: str, until_published: int | None = None) -> Status:
    """Show a run's progress until it has ended or published `until_published` batches; return its last status.

    Raises:
        DemoError: nothing has moved for two minutes.
    """
    began = moved = time.monotonic()
    last, latest = "", Status({})
    for change in console.changes("-n", NAMESPACE, "ingestrun", name):
        if change is not None:
            latest = Status(change)
            if (line := latest.line()) != last:
                console.say(f"  {time.monotonic() - began:3.0f} s  {line}")
                last, moved = line, time.monotonic()
            if latest.phase in ENDED or (until_published and latest.published >= until_published):
                break
        if time.monotonic() - moved > STUCK_SECONDS:
            raise DemoError(f"the run {name} has not moved for {STUCK_SECONDS} s: {latest.message}")
    return latest


def begin_check(console: Console, dataset: str, *arguments: str) -> None:
    """Start a Job that checks a dataset by DuckDB in the cluster, because no image has a shell to copy files out."""
    job = check_job(f"check-{dataset}", dataset, arguments)
    console.capture(["kubectl", "create", "-f", "-"], stdin=json.dumps(job))


def show_check(console: Console, dataset: str) -> bool:
    """Wait until the check has ended and show its findings; return whether all are right."""
    console.section(f"Check the dataset {dataset!r} with DuckDB, in the cluster")
    name = f"check-{dataset}"
    deadline = time.monotonic() + 120
    ended: set[str] = set()
    while not ended & {"Complete", "Failed"}:
        if time.monotonic() > deadline:
            raise DemoError(f"the Job {name} has not ended within 120 s")
        time.sleep(0.3)
        status = console.object("-n", NAMESPACE, "job", name).get("status") or {}
        ended = {condition["type"] for condition in status.get("conditions") or ()}
    console.run(["kubectl", "-n", NAMESPACE, "logs", f"job/{name}"])
    right = "Complete" in ended
    return console.verdict(right, f"the dataset is {'as it should be' if right else 'wrong'}")


def check_job(name: str, dataset: str, arguments: Sequence[str], *, image: str | None = None) -> dict[str, Any]:
    """Build the Job that runs dev/demo/check_dataset.py on a folder of the volume.

    It runs the image that was built last, unless `image` names another.
    """
    container = {
        "name": "check",
        "image": image or built("DEMO_IMAGE"),
        "command": ["/venv/bin/python", "/demo/check_dataset.py"],
        "args": [f"/data/{dataset}", *arguments],
        "resources": {"requests": {"cpu": "100m", "memory": "256Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        },
        "volumeMounts": [
            {"name": "data", "mountPath": "/data", "readOnly": True},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the pod's own emptyDir
        ],
    }
    pod = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "runAsGroup": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [container],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": "ingest-data", "readOnly": True}},
            {"name": "tmp", "emptyDir": {}},
        ],
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"backoffLimit": 0, "activeDeadlineSeconds": 120, "template": {"spec": pod}},
    }


def judge(console: Console, run: dict[str, Any]) -> bool:
    """Check by the API server's audit log that no Job was created after Cancelled."""
    console.section("Nothing was started after Cancelled: what the API server's audit log says")
    log = console.environment.get("INGESTRUN_AUDIT_LOG", "")
    if console.cluster == "current" or not Path(log).exists():
        console.say("There is no audit log of this cluster to show.")
        return console.cluster == "current"
    with Path(log).open() as lines:
        trail = read_trail(lines, run["metadata"]["uid"])
    console.say(timeline(trail))
    late, granted = trail.created_after, trail.granted_after
    created = trail.created
    findings = [
        console.verdict(trail.cancelled is not None, "the write of Cancelled is in the log"),
        console.verdict(bool(created), f"{len(created)} Jobs were created for the run"),
        console.verdict(not late, f"{len(late)} of them after Cancelled"),
        console.verdict(bool(trail.grants), f"{len(trail.grants)} writes gave batches, or permission to publish"),
        console.verdict(not granted, f"{len(granted)} of them after Cancelled"),
    ]
    return all(findings)


def diagnose(console: Console) -> None:
    """Show pods, runs, events and logs after a failure, once kubectl is known to talk to the right cluster."""
    if not console.adopted:
        return
    for title, command in (
        ("pods", ["kubectl", "get", "pods", "-n", NAMESPACE, "-o", "wide"]),
        ("runs", ["kubectl", "get", "ingestruns", "-n", NAMESPACE, "-o", "yaml"]),
        ("events", ["kubectl", "get", "events", "-n", NAMESPACE, "--sort-by=.metadata.creationTimestamp"]),
        ("the operator's pods", ["kubectl", "describe", "pods", "-n", SYSTEM]),
        ("the operator's log", ["kubectl", "logs", "-n", SYSTEM, "deployment/ingestrun-operator", "--tail=30"]),
    ):
        console.say(f"\n-- {title}")
        console.say("\n".join(console.try_capture(command).splitlines()[-40:]))


def wait_quietly(console: Console, name: str, condition: str, timeout: str) -> None:
    """Wait for a condition of a run without showing kubectl's output."""
    console.capture(["kubectl", "-n", NAMESPACE, "wait", f"ingestrun/{name}", condition, f"--timeout={timeout}"])


def await_events(console: Console, name: str) -> None:
    """Wait for the Event about the end of the drain, which the operator posts among the last."""
    given_up = time.monotonic() + 15
    about = f"involvedObject.name={name},reason=Drained"
    while time.monotonic() < given_up:
        if "Drained" in console.capture(["kubectl", "-n", NAMESPACE, "get", "events", "--field-selector", about]):
            return
        time.sleep(0.2)


def built(variable: str) -> str:
    """Return the name of an image from build/images.env."""
    lines = (ROOT / "build" / "images.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines)[variable]


if __name__ == "__main__":
    sys.exit(main())
