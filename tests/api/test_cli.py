"""`kubectl ingestrun` as a person types it, against the real API server, with the operator as a process beside it."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Protocol

import pytest
import yaml

from tests.api.conftest import REPOSITORY, Cluster, Json, WaitFor
from tests.api.operator_process import OperatorProcess
from tests.api.test_fence import labelled_namespace
from tests.api.test_runs import drained, in_phase, spec
from tests.api.test_users import bound, labels, may, roles

__all__ = ["labels", "roles"]

HOLD: Final = {"hold": "true"}
COMMAND: Final = (sys.executable, "-m", "ingestrun.cli")


class Plugin(Protocol):
    """Runs the plugin in the test's namespace: what comes of it."""

    def __call__(self, *words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]: ...


def environment(cluster: Cluster, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "KUBECONFIG": str(cluster.kubeconfig),
        "PYTHONPATH": str(REPOSITORY / "operator"),
        **more,
    }


@pytest.fixture
def plugin(cluster: Cluster, crd: Json, namespace: str) -> Plugin:
    assert crd

    def call(*words: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*COMMAND, *words, "-n", namespace],
            env=environment(cluster, **more),
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return call


def holding(cluster: Cluster, namespace: str, wait_for: WaitFor, *names: str, **more: Any) -> None:
    """Runs whose pods have started and do not end by themselves."""
    for name in names:
        cluster.create_run(namespace, spec(HOLD, batches={"partitions": {"count": 2}}, **more), name=name)
    for name in names:
        wait_for(lambda name=name: _running(cluster, namespace, name) == 2, 60, f"the pods of {name}")  # type: ignore[misc]


def _running(cluster: Cluster, namespace: str, name: str) -> int:
    return sum(pod.status.phase == "Running" for pod in cluster.pods(namespace, f"ingestrun.dev/run={name}"))


def box(printed: str) -> dict[str, str]:
    """The fields of a boxed summary."""
    assert printed.startswith("=" * 60 + "\n")
    return dict(re.findall(r"^([A-Z][A-Za-z ]*): +(.+)$", printed, re.MULTILINE))


# ----------------------------------------------------------------------------------------------------------- cancel


def test_a_cancel_prints_the_summary_and_the_run_has_the_reason(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    holding(cluster, namespace, wait_for, "flights")
    done = plugin("cancel", "flights", "--reason", "wrong source")
    assert (done.returncode, done.stderr) == (0, "")
    assert box(done.stdout) == {
        "Run": "flights",
        "Status": "CANCELLED",
        "Cancelled": "1 run(s)",
        "Message": "Cancelled 1 run(s)",
        "Reason": "wrong source",
        "In flight": "2 batches, may finish (--terminate ends them)",
    }
    record = cluster.run(namespace, "flights")["status"]["cancellation"]
    assert (record["reason"], record["requestedBy"]) == ("wrong source", "field manager kubectl-ingestrun")
    again = json.loads(plugin("cancel", "ir/flights", "--json", "--reason", "another").stdout)
    assert (again["status"], again["cancelled_runs"], again["reason"]) == ("cancelled", [], "wrong source")
    assert cluster.run(namespace, "flights")["spec"]["cancellation"] == {"reason": "wrong source"}
    listed = plugin("list", "--phase", "Cancelled").stdout.splitlines()
    assert listed[1].split(maxsplit=2)[::2] == ["flights", "field manager kubectl-ingestrun   wrong source"]


def test_each_refusal_has_its_exit_code(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    cluster.create_run(namespace, spec(batches={"partitions": {"count": 1}}), name="done")
    wait_for(in_phase(cluster, namespace, "done", "Succeeded"), 60, "Succeeded")
    ended = plugin("cancel", "done", "--json")
    assert ended.returncode == 4
    assert ended.stderr == (
        'The IngestRun "done" is invalid: spec.cancel: Invalid value: '
        "the run is already Succeeded and cannot be cancelled\n"
    )
    assert json.loads(ended.stdout) == {
        "status": "error",
        "run": "done",
        "namespace": namespace,
        "cancelled_runs": [],
        "message": "the run is already Succeeded and cannot be cancelled",
    }
    missing = plugin("cancel", "missing")
    assert (missing.returncode, missing.stdout) == (3, "")
    assert missing.stderr == 'Error from server (NotFound): ingestruns.ingestrun.dev "missing" not found\n'
    assert plugin("cancel", "done", "--foo").returncode == 2
    forbidden = plugin("cancel", "done", "--as", "nobody")
    assert forbidden.returncode == 6
    assert forbidden.stderr.startswith("Error from server (Forbidden): ")
    assert plugin("cancel", "done", KUBECONFIG="/nowhere").returncode == 1


def test_cascade_cancels_the_tree_and_lists_it(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    holding(cluster, namespace, wait_for, "top")
    for name, parent in (("child-1", "top"), ("child-2", "top"), ("grandchild", "child-1")):
        holding(cluster, namespace, wait_for, name, parentRef={"name": parent})
    dry = plugin("cancel", "top", "--cascade", "--dry-run")
    assert (dry.returncode, box(dry.stdout)["Message"]) == (0, "Would cancel 4 run(s) (server dry run)")
    assert [run["status"]["phase"] for run in cluster.runs(namespace)] == ["Running"] * 4
    done = plugin("cancel", "top", "missing", "--cascade", "--reason", "all of it")
    assert done.returncode == 3, "it goes on after a failure, and tells of it"
    assert box(done.stdout)["Message"] == "Cancelled 4 run(s)"
    assert re.findall(r"^  - (.*)$", done.stdout, re.MULTILINE) == ["top", "child-1", "child-2", "grandchild"]
    assert [run["status"]["phase"] for run in cluster.runs(namespace)] == ["Cancelled"] * 4
    printed = plugin("tree", "top").stdout
    assert [line.split("  ")[0] for line in printed.splitlines()][1:] == [
        "top",
        "├── child-1",
        "│",
        "└── child-2",
    ]


def test_below_a_run_that_was_cancelled_alone_cascade_cancels_the_children(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    holding(cluster, namespace, wait_for, "top")
    holding(cluster, namespace, wait_for, "child", parentRef={"name": "top"})
    assert plugin("cancel", "top").returncode == 0
    assert cluster.run(namespace, "child")["status"]["phase"] == "Running"
    done = plugin("cancel", "top", "--cascade", "--json")
    assert (done.returncode, json.loads(done.stdout)["cancelled_runs"]) == (0, ["child"])
    assert cluster.run(namespace, "child")["status"]["phase"] == "Cancelled"


def test_a_selector_and_all_leave_ended_runs_alone(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    cluster.create_run(namespace, spec(batches={"partitions": {"count": 1}}), name="done")
    for name in ("a", "b"):
        body = spec(HOLD, batches={"partitions": {"count": 1}})
        cluster.create_run(namespace, body, name=name, metadata={"labels": {"team": name}})
    wait_for(in_phase(cluster, namespace, "done", "Succeeded"), 60, "Succeeded")
    assert plugin("cancel", "-l", "team=a", "-o", "name").stdout == "ingestrun.ingestrun.dev/a\n"
    done = plugin("cancel", "--all", "-o", "json")
    assert done.returncode == 0
    assert [item["run"] for item in json.loads(done.stdout)["items"]] == ["b"]
    again = plugin("cancel", "--all")
    assert (again.returncode, again.stderr) == (0, f"No active runs found in {namespace} namespace.\n")


def test_waiting_for_the_drain_times_out_and_terminate_ends_it(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    holding(cluster, namespace, wait_for, "flights")
    late = plugin("cancel", "flights", "--wait=drained", "--timeout", "1s")
    assert late.returncode == 5
    assert late.stderr == "error: timed out waiting for the condition on ingestruns/flights\n"
    assert box(late.stdout)["Drained"].startswith("no: 2 ")
    done = plugin("cancel", "flights", "--terminate", "--grace-period", "1", "--wait=drained")
    assert done.returncode == 0
    assert box(done.stdout)["Drained"] == "yes; not published: batch 0-1"
    assert cluster.run(namespace, "flights")["status"]["cancellation"]["policy"] == "Terminate"


def test_without_an_operator_the_cancel_is_told_as_stored_and_applied_on_its_return(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    holding(cluster, namespace, wait_for, "flights")
    operator.kill()
    stored = plugin("cancel", "flights", "--reason", "first")
    assert (stored.returncode, box(stored.stdout)["Status"]) == (0, "CANCEL REQUESTED")
    assert plugin("cancel", "flights", "--wait", "--timeout", "1s").returncode == 5
    assert plugin("explain", "flights").stdout.startswith("flights is Running: CancelPending\n")
    operator.start()
    done = plugin("cancel", "flights", "--wait", "--reason", "second")
    assert (done.returncode, box(done.stdout)["Reason"]) == (0, "first")


def test_stale_is_judged_by_progress(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    """The one that stands still and the one that was never begun go; the one that works and the suspended one stay."""
    quick = {"rows": "1", "run-seconds": "0.5"}
    cluster.create_run(namespace, spec(suspend=True), name="suspended")
    cluster.create_run(namespace, spec(resumeFrom={"name": "suspended"}), name="pending")
    holding(cluster, namespace, wait_for, "stuck")
    cluster.create_run(namespace, spec(quick, batches={"partitions": {"count": 500}}, parallelism=1), name="busy")
    begun = time.monotonic()
    wait_for(lambda: time.monotonic() - begun > 12, 30, "the runs to be old enough")
    dry = plugin("cleanup", "--stale", "10s", "--dry-run", "-o", "name")
    expected = {"ingestrun.ingestrun.dev/pending", "ingestrun.ingestrun.dev/stuck"}
    assert set(dry.stdout.split()) == expected, dry.stderr
    done = plugin("cleanup", "--stale", "10s", "-o", "json")
    assert done.returncode == 0, done.stderr
    found = {item["run"]: item for item in json.loads(done.stdout)["items"]}
    assert {name for name, item in found.items() if item["status"] == "cancelled"} == {"stuck", "pending"}
    assert found["stuck"]["reason"].startswith("no progress for ")
    assert {run["metadata"]["name"]: run["status"]["phase"] for run in cluster.runs(namespace)} == {
        "busy": "Running",
        "stuck": "Cancelled",
        "pending": "Cancelled",
        "suspended": "Suspended",
    }


# ------------------------------------------------------------------------------------------------------ the others


def test_a_run_is_created_suspended_explained_watched_and_told_of(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    body = {
        "apiVersion": "ingestrun.dev/v1alpha1",
        "kind": "IngestRun",
        "metadata": {"name": "flights"},
        "spec": spec({"rows": "5"}, suspend=True, batches={"partitions": {"count": 2}}),
    }
    created = plugin("run", "-f", "-", stdin=json.dumps(body))
    assert (created.returncode, created.stdout) == (0, "ingestrun.ingestrun.dev/flights created\n")
    assert plugin("run", "-f", "-", stdin=json.dumps(body)).returncode == 4, "it exists"
    wait_for(in_phase(cluster, namespace, "flights", "Suspended"), 30, "Suspended")
    assert "helps: kubectl ingestrun unsuspend" in plugin("explain", "flights").stdout
    assert plugin("unsuspend", "flights").stdout == "ingestrun.ingestrun.dev/flights unsuspended\n"
    watched = plugin("watch", "flights")
    assert watched.returncode == 0, watched.stderr
    assert watched.stdout.splitlines()[-1].split("   ")[1:] == [
        "Succeeded",
        "batches 2/2 (100%)",
        "rows 10",
        "Completed",
    ]
    assert "\x1b" not in watched.stdout, "no colour where there is no terminal"
    printed = plugin("status", "flights").stdout
    # Times are in whole seconds, so a run of less than one has no rate.
    assert re.search(r"^Rows: +10 published(, \d+ a second)?$", printed, re.MULTILINE), printed
    assert plugin("suspend", "flights").returncode == 4
    assert plugin("history").stdout.splitlines()[1].split()[:2] == ["flights", "Succeeded"]


def test_failed_batches_are_shown_explained_and_done_again(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    fails = {"rows": "5", "fail-attempts": "9", "fail-batch": "1"}
    parts = {"batches": {"partitions": {"count": 3}}, "onBatchFailure": "Continue"}
    cluster.create_run(namespace, spec(fails, retries=1, **parts), name="geo")
    wait_for(in_phase(cluster, namespace, "geo", "Succeeded"), 60, "Succeeded")
    wait_for(drained(cluster, namespace, "geo"), 60, "the drain")
    printed = plugin("status", "geo").stdout
    assert "2/3 published, 1 failed (1)" in printed
    assert re.search(r"^1 +fetch +2 .*Error", printed, re.MULTILINE), printed
    refused = plugin("resume", "geo", "--name", "geo")
    assert refused.returncode != 0, "a run cannot resume itself"
    again = plugin("retry", "geo", "--failed", "--dry-run=client", "-o", "yaml")
    rest = yaml.safe_load(again.stdout)
    assert (rest["metadata"]["name"], rest["spec"]["resumeFrom"]) == ("geo-2", {"name": "geo"})
    rest["spec"]["podTemplate"]["annotations"] = {"simulate.ingestrun.dev/rows": "5"}
    watched = plugin("run", "-f", "-", "--watch", stdin=yaml.safe_dump(rest))
    assert (watched.returncode, watched.stdout.splitlines()[-1].split("   ")[2]) == (0, "batches 3/3 (100%)")
    assert plugin("retry", "geo", "--failed").returncode == 4, "it is resumed already"


def test_a_cancelled_run_is_resumed(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, plugin: Plugin
) -> None:
    holding(cluster, namespace, wait_for, "flights")
    assert plugin("resume", "flights").returncode == 4, "it has not ended"
    assert plugin("cancel", "flights", "--terminate", "--grace-period", "1", "--wait=drained").returncode == 0
    done = plugin("resume", "flights")
    assert (done.returncode, done.stdout) == (0, "ingestrun.ingestrun.dev/flights-2 created, resumes flights\n")
    wait_for(in_phase(cluster, namespace, "flights-2", "Running"), 60, "Running")
    assert "cancel" not in cluster.run(namespace, "flights-2")["spec"]
    refused = plugin("resume", "flights")
    assert (refused.returncode, refused.stderr) == (4, 'error: run "flights" is already resumed by run "flights-2"\n')


def test_a_list_is_watched(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with out.open("w") as stdout:
        words = [*COMMAND, "list", "--watch", "-n", namespace]
        watching = subprocess.Popen(words, env=environment(cluster), stdout=stdout)
        try:
            wait_for(lambda: "NAME" in out.read_text(), 30, "the head of the list")
            cluster.create_run(namespace, spec(batches={"partitions": {"count": 1}}), name="flights")
            wait_for(lambda: "Succeeded" in out.read_text(), 60, "the end of the run in the list")
        finally:
            watching.terminate()
            watching.wait(30)
    phases = [line.split()[1] for line in out.read_text().splitlines()[1:]]
    assert list(dict.fromkeys(phases)) == ["Pending", "Running", "Succeeded"]


# ------------------------------------------------------------------------------------------------- kubectl's own ways


def test_kubectl_finds_the_plugin_and_its_completions(
    cluster: Cluster, namespace: str, crd: Json, tmp_path: Path
) -> None:
    assert crd
    cluster.create_run(namespace, spec(suspend=True), name="flights")
    for name, module in (("kubectl-ingestrun", "main"), ("kubectl_complete-ingestrun", "completion")):
        script = tmp_path / name
        script.write_text(f"#!{sys.executable}\nfrom ingestrun.cli.{module} import main\nmain()\n")
        script.chmod(0o755)
    found = environment(cluster, PATH=f"{tmp_path}:{os.environ['PATH']}")
    kubectl = shutil.which("kubectl")
    assert kubectl is not None

    def call(*words: str) -> str:
        return subprocess.run([kubectl, *words], env=found, capture_output=True, text=True, check=True).stdout

    assert call("ingestrun", "list", "-n", namespace, "-o", "name") == "ingestrun.ingestrun.dev/flights\n"
    completed = call("__complete", "ingestrun", "cancel", "-n", namespace, "")
    assert completed.splitlines() == ["flights", ":4"]
    assert call("__complete", "ingestrun", "canc").splitlines()[0].startswith("cancel\t")


def test_credentials_of_an_exec_plugin(cluster: Cluster, namespace: str, plugin: Plugin, tmp_path: Path) -> None:
    config = yaml.safe_load(cluster.kubeconfig.read_text())
    [user] = [it["user"] for it in config["users"]]
    status = {
        "clientCertificateData": base64.b64decode(user["client-certificate-data"]).decode(),
        "clientKeyData": base64.b64decode(user["client-key-data"]).decode(),
    }
    version = "client.authentication.k8s.io/v1"
    answer = tmp_path / "answer.json"
    answer.write_text(json.dumps({"apiVersion": version, "kind": "ExecCredential", "status": status}))
    config["users"][0]["user"] = {
        "exec": {"apiVersion": version, "command": "cat", "args": [str(answer)], "interactiveMode": "Never"}
    }
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config))
    done = plugin("list", KUBECONFIG=str(path))
    assert (done.returncode, done.stderr) == (0, f"No runs found in {namespace} namespace.\n")


@pytest.fixture
def watched_namespace(cluster: Cluster, labels: dict[str, str]) -> Iterator[str]:
    """A namespace in which the canceller's policy holds."""
    name = labelled_namespace(cluster, labels)
    yield name
    cluster.core.delete_namespace(name)


def test_a_canceller_cancels_and_suspends_and_does_no_more(
    cluster: Cluster, watched_namespace: str, roles: dict[str, str], wait_for: WaitFor
) -> None:
    carol = bound(cluster, watched_namespace, roles["ingestrun-canceller"], "carol")
    wait_for(lambda: may(carol, watched_namespace), 10, "the rights of carol")
    cluster.create_run(watched_namespace, spec(suspend=True), name="flights")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        full = [*COMMAND, *words, "-n", watched_namespace, "--as", "carol"]
        return subprocess.run(full, env=environment(cluster), capture_output=True, text=True, check=False, timeout=60)

    assert call("unsuspend", "flights").returncode == 0
    assert call("suspend", "flights").returncode == 0
    assert call("cancel", "flights", "--reason", "r", "--cascade", "--terminate").returncode == 0
    assert cluster.run(watched_namespace, "flights")["spec"]["cancel"] is True
    refused = call("run", "geo", "--files", "a", "--to", "b", "--claim", "c")
    assert refused.returncode == 6
    assert 'User "carol" cannot create resource "ingestruns"' in refused.stderr
