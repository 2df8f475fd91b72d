"""What `kubectl ingestrun logs` shows of real pods; all else of the plugin is in tests/api/test_cli.py."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Final

from tests.e2e.cluster import ROOT, Json, Kubectl, image

SPEAKS: Final = """
import os, time
print("hello from the", os.environ["INGEST_STAGE"], "of batch", os.environ["INGEST_BATCH"], flush=True)
time.sleep(2)
print("bye", flush=True)
with open("/dev/termination-log", "w") as result:
    result.write('{"v":"v1","outcome":"done","read":1,"written":1,"rejected":0}')
"""


def speaking(namespace: str, name: str) -> Json:
    """A run whose containers print a line at their begin and at their end."""
    container = {"image": image("WORKER_IMAGE"), "command": ["python", "-c", SPEAKS]}
    return {
        "apiVersion": "ingestrun.dev/v1alpha1",
        "kind": "IngestRun",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "fetch": container,
            "publish": container,
            "batches": {"partitions": {"count": 2}},
            "jobRetention": {"failedBatches": 3},
        },
    }


def logs(kubectl: Kubectl, namespace: str, *words: str) -> list[str]:
    """The lines that the plugin prints."""
    command = [sys.executable, "-m", "ingestrun.cli", "logs", *words, "-n", namespace, "--context", kubectl.context]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "operator")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=180)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_logs_are_followed_over_all_stages_and_then_read_by_batch_and_stage(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply([speaking(namespace, "speaking")])
    followed = logs(kubectl, namespace, "speaking", "-f")
    stages = [(batch, stage) for batch in (0, 1) for stage in ("fetch", "publish")]
    for batch, stage in stages:
        lead = f"[batch {batch}, {stage}] "
        own = [line.removeprefix(lead) for line in followed if line.startswith(lead)]
        assert own == [f"hello from the {stage} of batch {batch}", "bye"]
    read = logs(kubectl, namespace, "speaking", "--batch", "1", "--stage", "publish", "--tail", "1")
    assert read == ["bye"], "of one pod, without its name"
