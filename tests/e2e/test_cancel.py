"""A cancel as the pods of a real kubelet feel it: by the check, through the Service; by SIGTERM, in mid-work."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Final

from tests.e2e.cluster import Json, Kubectl, image, phase, wait_for
from tests.e2e.runs import flights, run_of
from tests.e2e.test_flights import check_dataset, count

GRACE: Final = 25
"""Seconds between SIGTERM and SIGKILL: far more than the worker needs, so its own end is what is seen."""

ASK: Final = """
import json, os, ssl, urllib.error, urllib.request
url, token = os.environ["INGEST_CANCELLATION_URL"], os.environ["INGEST_CANCELLATION_TOKEN"]
trusted = ssl.create_default_context(cadata=os.environ["INGEST_CANCELLATION_CA"])
own = url.rsplit("/", 2)[1]

def ask(url, token):
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, context=trusted) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)

another = url.replace(f"/{own}/", "/another/")
print(json.dumps([url, ask(url, token), ask(another, token), ask(url, "made-up")]))
"""


def slow(namespace: str, name: str, **changes: Any) -> Json:
    """A run whose one fetch takes a minute or more: a small page at a time."""
    body = flights(namespace, name, parallelism=1, **changes)
    body["spec"]["source"]["http"]["pageSize"] = 100
    body["spec"]["batches"] = {"cursor": {}, "size": 300_000}
    return body


def pods_of(kubectl: Kubectl, namespace: str, run: str, stage: str) -> list[Json]:
    selector = f"ingestrun.dev/run={run},ingestrun.dev/stage={stage}"
    found: list[Json] = kubectl.get("-n", namespace, "pods", "-l", selector)["items"]
    return found


def at_work(kubectl: Kubectl, namespace: str, run: str, stage: str, *, seconds: float) -> str:
    """The name of the stage's pod, once its container has said that it has begun."""

    def begun() -> str | None:
        for pod in pods_of(kubectl, namespace, run, stage):
            # One that is quick may have ended before it is seen to run.
            if pod["status"].get("phase") in ("Running", "Succeeded"):
                name = str(pod["metadata"]["name"])
                if "stage starts" in kubectl("-n", namespace, "logs", name):
                    return name
        return None

    found = wait_for(begun, seconds=seconds, what=f"the {stage} of {run} to begin")
    assert found
    return found


def terminated(pod: Json) -> Json:
    """How its container has ended; empty while it has not."""
    statuses = pod["status"].get("containerStatuses") or [{}]
    found: Json = (statuses[0].get("state") or {}).get("terminated") or {}
    return found


@contextmanager
def watched(kubectl: Kubectl, namespace: str, pod: str) -> Iterator[list[Json]]:
    """All that is seen of the pod until it is gone; read what is yielded after the block."""
    command = ["kubectl", "--context", kubectl.context, "-n", namespace, "get", "pods", "-w", "-o", "json"]
    seen: list[Json] = []
    with tempfile.TemporaryFile("w+") as out:  # a pipe that nobody reads would hold kubectl up
        process = subprocess.Popen([*command, "--field-selector", f"metadata.name={pod}"], stdout=out)
        try:
            # What happens before its first look it never sees.
            wait_for(lambda: os.fstat(out.fileno()).st_size, seconds=60, what=f"a watch of {pod}")
            yield seen
        finally:
            process.terminate()
            process.wait(timeout=30)
            out.seek(0)
            seen += documents(out.read())


def documents(text: str) -> Iterator[Json]:
    """The objects of a stream of JSON, lists opened; the last one may be half written."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        try:
            body, end = decoder.raw_decode(text)
        except ValueError:
            return
        yield from body["items"] if body["kind"] == "List" else [body]
        text = text[end:]


def cancel(kubectl: Kubectl, namespace: str, run: str, **how: Any) -> None:
    patch = json.dumps({"spec": {"cancel": True, **({"cancellation": how} if how else {})}})
    kubectl("-n", namespace, "patch", "ingestrun", run, "--type", "merge", "-p", patch)


def drained(kubectl: Kubectl, namespace: str, run: str, *, seconds: int) -> Json:
    kubectl("-n", namespace, "wait", f"ingestrun/{run}", "--for=condition=Drained", f"--timeout={seconds}s")
    return run_of(kubectl, namespace, run)


def instant(stamp: str) -> float:
    return datetime.fromisoformat(stamp).timestamp()


def test_worker_asks_by_the_service_and_stops_early(kubectl: Kubectl, namespace: str) -> None:
    """The Service's name resolves, the pod's token answers for its own run alone, and the cancel is heard."""
    kubectl.apply([slow(namespace, "asks")])
    pod = at_work(kubectl, namespace, "asks", "fetch", seconds=300)
    answers = json.loads(kubectl("-n", namespace, "exec", pod, "--", "/venv/bin/python", "-c", ASK))
    url, own, another, made_up = answers
    assert url.startswith("https://ingestrun-operator.ingestrun-system.svc")
    assert own[0] == 200
    assert (own[1]["name"], own[1]["phase"], own[1]["cancelled"]) == ("asks", "Running", False)
    assert (another[0], another[1]["error"]) == (403, "forbidden")
    assert (made_up[0], made_up[1]["error"]) == (401, "unauthorized")

    cancel(kubectl, namespace, "asks")
    run = drained(kubectl, namespace, "asks", seconds=50)
    assert phase(run) == "Cancelled"
    assert run["status"]["cancellation"]["policy"] == "Drain"
    assert run["status"]["cancellation"]["notPublished"] == "0"
    assert run["status"].get("failures", []) == []
    (ended,) = pods_of(kubectl, namespace, "asks", "fetch")
    assert "deletionTimestamp" not in ended["metadata"], "nobody has told it to end: it asked"
    result = json.loads(terminated(ended)["message"])
    assert (terminated(ended)["exitCode"], result["outcome"]) == (0, "cancelled")
    assert 0 < result["read"] < 300_000
    assert result["written"] == 0


def unasking(body: Json) -> Json:
    """The same fetch by the same worker, which asks nobody: else it would hear of the cancel before its SIGTERM."""
    source = json.dumps(body["spec"].pop("source"))
    code = (
        "import os, sys; del os.environ['INGEST_CANCELLATION_URL']; os.environ['INGEST_CONFIG'] = sys.argv[1]; "
        "sys.argv[1:] = []; from ingestrun.worker.main import main; main()"
    )
    command = ["/venv/bin/python", "-c", code, source]
    body["spec"]["fetch"] = {"image": image("WORKER_IMAGE"), "imagePullPolicy": "Never", "command": command}
    return body


def test_terminate_ends_a_fetch_in_mid_work(kubectl: Kubectl, namespace: str) -> None:
    """SIGTERM reaches the worker, which ends at once and hands on nothing; nobody waits its grace out."""
    kubectl.apply([unasking(slow(namespace, "terminated"))])
    pod = at_work(kubectl, namespace, "terminated", "fetch", seconds=300)
    with watched(kubectl, namespace, pod) as seen:
        cancel(kubectl, namespace, "terminated", policy="Terminate", gracePeriodSeconds=GRACE)
        run = drained(kubectl, namespace, "terminated", seconds=GRACE + 60)
    assert phase(run) == "Cancelled"
    assert run["status"]["cancellation"]["notPublished"] == "0"
    end = next(terminated(body) for body in reversed(seen) if terminated(body))
    assert end["exitCode"] == 143, "by SIGTERM, and by its own handler of it"
    assert json.loads(end["message"])["message"] == "stopped by SIGTERM, nothing published"
    # The first: once the pod has ended its Job is deleted, and the pod with no grace.
    told = next(body["metadata"]["deletionTimestamp"] for body in seen if "deletionTimestamp" in body["metadata"])
    assert instant(end["finishedAt"]) < instant(told) - GRACE / 2, "deletionTimestamp is when the grace is over"
    check_dataset(kubectl, namespace, "terminated", "--part", "0")


def test_terminate_while_it_publishes_leaves_all_or_nothing(kubectl: Kubectl, namespace: str) -> None:
    """Whether SIGTERM comes before the commit or after it: the record, the result and the dataset agree."""
    body = flights(namespace, "halfway", hooks=[], parallelism=1)
    body["spec"]["batches"] = {"cursor": {}, "size": 300_000}
    kubectl.apply([body])
    pod = at_work(kubectl, namespace, "halfway", "publish", seconds=480)
    with watched(kubectl, namespace, pod) as seen:
        cancel(kubectl, namespace, "halfway", policy="Terminate", gracePeriodSeconds=GRACE)
        run = drained(kubectl, namespace, "halfway", seconds=GRACE + 60)
    end = next(terminated(body) for body in reversed(seen) if terminated(body))
    landed = count(run["status"]["batches"]["published"]) + count(run["status"]["cancellation"]["published"])
    outcome = json.loads(end["message"])["outcome"]
    assert (end["exitCode"], outcome, landed) in ((143, "failed", 0), (0, "done", 1), (0, "cancelled", 0))
    assert "unknown" not in run["status"]["cancellation"] or run["status"]["cancellation"]["unknown"] == ""
    check_dataset(kubectl, namespace, "halfway", "--part", str(landed))
