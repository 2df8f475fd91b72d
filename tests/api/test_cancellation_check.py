"""The cancellation check of a real operator process in front of a real API server, asked with a real Job's token.

By TLS, as deployed, with the certificate that the operator makes; verified by the CA that the Job names.
"""

from __future__ import annotations

import base64
import json
import os
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Protocol

import pytest
from kubernetes import client

from ingestrun.controller.http import tls
from ingestrun.controller.http.tokens import SECRET_FIELD, SECRET_NAME
from tests.api.conftest import Cluster, Json, WaitFor
from tests.api.operator_process import ROOT, OperatorProcess, api_settings, free_port
from tests.api.test_runs import in_phase, spec

SECONDS_TO_CANCELLED = 10.0
"""An answer is shared for a second; the rest is for a machine that is busy with other tests."""


class Start(Protocol):
    """See `start`."""

    def __call__(self, *, leads: bool = True) -> str: ...


@pytest.fixture
def start(cluster: Cluster, crd: Json, namespace: str, wait_for: WaitFor, tmp_path: Path) -> Iterator[Start]:
    """Starts replicas that answer the check, the first leads; gives the base URL of each.

    The Secrets of their key and of their certificate, and their lease, are in the test's namespace.
    """
    assert crd
    for name in (SECRET_NAME, tls.SECRET_NAME):
        cluster.core.create_namespaced_secret(
            namespace, client.V1Secret(metadata=client.V1ObjectMeta(name=name), type="Opaque")
        )
    processes: list[OperatorProcess] = []

    def make(*, leads: bool = True) -> str:
        port = free_port()
        process = OperatorProcess(
            kubeconfig=cluster.kubeconfig,
            context=cluster.context,
            namespace=namespace,
            log=tmp_path / f"operator-{len(processes)}.log",
            settings={
                "INGESTRUN_LEASE_NAMESPACE": namespace,
                **api_settings(port),
                "INGESTRUN_API_URL": f"https://127.0.0.1:{port}",
                "INGESTRUN_API_TLS": "own",
            },
        )
        processes.append(process)
        process.start(elect=True, leads=leads)
        url = f"https://127.0.0.1:{port}"
        wait_for(lambda: ask(url + "/", "")[0] == 404, 30, "the replica to answer")
        return url

    yield make
    for process in processes:
        process.stop()


def held_run(cluster: Cluster, namespace: str, name: str, wait_for: WaitFor) -> dict[str, str]:
    """Start a run whose first pod runs on until it is deleted; gives what that pod is told."""
    cluster.create_run(namespace, spec({"hold": "true"}), name=name)

    def env() -> dict[str, str]:
        jobs = cluster.jobs(namespace, f"ingestrun.dev/run={name}")
        assert jobs
        return {entry.name: entry.value or "" for entry in jobs[0].spec.template.spec.containers[0].env}

    return wait_for(env, 30, f"the first Job of {name}")


def stored_ca(cluster: Cluster, namespace: str) -> str:
    data = cluster.core.read_namespaced_secret(tls.SECRET_NAME, namespace).data or {}
    return base64.b64decode(data[tls.CA_CERTIFICATE]).decode()


def ask(url: str, token: str, timeout: float = 10, ca: str = "") -> tuple[int, Json]:
    """Ask; the server is verified if a CA is given."""
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"})
    context = ssl.create_default_context(cadata=ca) if ca else ssl._create_unverified_context()
    handlers = urllib.request.ProxyHandler({}), urllib.request.HTTPSHandler(context=context)
    opener = urllib.request.build_opener(*handlers)
    try:
        with opener.open(request, timeout=timeout) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        text = error.read()
        return error.code, json.loads(text) if text.startswith(b"{") else {}
    except (urllib.error.URLError, ConnectionError) as error:
        return 0, {"error": str(error)}


def stored_key(cluster: Cluster, namespace: str) -> bytes:
    data = cluster.core.read_namespaced_secret(SECRET_NAME, namespace).data or {}
    return base64.b64decode(data.get(SECRET_FIELD, b""))


def test_a_pod_asks_about_its_own_run_and_hears_of_the_cancel(
    cluster: Cluster, namespace: str, start: Start, wait_for: WaitFor, tmp_path: Path
) -> None:
    start()
    geo = held_run(cluster, namespace, "geo", wait_for)
    other = held_run(cluster, namespace, "other", wait_for)
    url, token = geo["INGEST_CANCELLATION_URL"], geo["INGEST_CANCELLATION_TOKEN"]
    assert url.endswith(f"/api/v1/namespaces/{namespace}/ingestruns/geo/cancellation-check")

    ca = geo["INGEST_CANCELLATION_CA"]
    assert ca == stored_ca(cluster, namespace)
    status, body = ask(url, token, ca=ca)
    assert (status, body["id"], body["name"]) == (200, geo["INGEST_RUN_UID"], "geo")
    assert ask(url.replace("https:", "http:"), token)[0] == 0, "there is no plain HTTP beside it"
    assert (body["phase"], body["cancelled"], body["completed"], body["failed"]) == ("Running", False, False, False)
    assert ask(url, other["INGEST_CANCELLATION_TOKEN"])[0] == 403
    assert ask(other["INGEST_CANCELLATION_URL"], token)[0] == 403
    assert ask(url, "nonsense")[0] == 401

    cluster.cancel(namespace, "geo")
    began = time.monotonic()
    wait_for(lambda: ask(url, token)[1]["cancelled"], 10, "the check to say cancelled")
    assert time.monotonic() - began < SECONDS_TO_CANCELLED
    wait_for(in_phase(cluster, namespace, "geo", "Cancelled"), 30, "Cancelled")
    wait_for(lambda: ask(url, token)[1]["phase"] == "Cancelled", 10, "the check to show the phase")
    assert ask(other["INGEST_CANCELLATION_URL"], other["INGEST_CANCELLATION_TOKEN"])[1]["cancelled"] is False

    cluster.custom.delete_namespaced_custom_object("ingestrun.dev", "v1alpha1", namespace, "ingestruns", "geo")
    wait_for(lambda: ask(url, token)[0] == 404, 30, "404")
    assert ask(url, token)[1]["error"] == "gone"
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert token not in logs
    assert token.rpartition(".")[2] not in logs


def test_a_long_poll_hears_of_the_cancel_on_either_replica(
    cluster: Cluster, namespace: str, start: Start, wait_for: WaitFor
) -> None:
    """Long before its wait is over; with the names of the check that it is modelled on."""
    first, second = start(), start(leads=False)
    env = held_run(cluster, namespace, "geo", wait_for)
    token, path = env["INGEST_CANCELLATION_TOKEN"], env["INGEST_CANCELLATION_URL"].removeprefix(first)
    with ThreadPoolExecutor() as threads:
        asking = [threads.submit(ask, f"{replica}{path}?wait=30", token, 60) for replica in (first, second)]
        assert all(not asked.done() for asked in asking)
        cluster.cancel(namespace, "geo")
        began = time.monotonic()
        for asked in asking:
            status, body = asked.result()
            assert (status, body["cancelled"]) == (200, True)
            assert (body["status"], body["event_type"]) == ("CANCELLED", "execution.cancelled")
            assert body["execution_id"] == env["INGEST_RUN_UID"]
        assert time.monotonic() - began < SECONDS_TO_CANCELLED


def test_a_standby_answers_too_and_a_new_key_ends_the_old_tokens(
    cluster: Cluster, namespace: str, start: Start, wait_for: WaitFor
) -> None:
    first, second = start(), start(leads=False)
    env = held_run(cluster, namespace, "geo", wait_for)
    path = env["INGEST_CANCELLATION_URL"].removeprefix(first).removeprefix(second)
    for replica in (first, second):
        assert ask(replica + path, env["INGEST_CANCELLATION_TOKEN"], ca=env["INGEST_CANCELLATION_CA"])[0] == 200
    key = stored_key(cluster, namespace)
    assert len(key) == 32

    # As documented for a new key: the data go, and whoever looks next makes another.
    cluster.core.patch_namespaced_secret(SECRET_NAME, namespace, {"data": None})
    third = start(leads=False)
    assert ask(third + path, env["INGEST_CANCELLATION_TOKEN"])[0] == 403
    assert stored_key(cluster, namespace) not in (b"", key)


class _Endless(BaseHTTPRequestHandler):
    """A source whose pages never end."""

    asked = threading.Event()

    def do_GET(self) -> None:
        self.asked.set()
        body = json.dumps([{"id": f"{self.path} {index}"} for index in range(10)]).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def test_the_built_in_worker_stops_when_its_run_is_cancelled(
    cluster: Cluster, namespace: str, start: Start, wait_for: WaitFor, tmp_path: Path
) -> None:
    """The worker's own process, with what its pod would be told."""
    start()
    env = held_run(cluster, namespace, "geo", wait_for)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    source = {"http": {"url": f"http://127.0.0.1:{server.server_port}", "pageSize": 10, "pagination": {"page": {}}}}
    termination = tmp_path / "termination-log"
    worker = subprocess.Popen(
        [sys.executable, "-m", "ingestrun.worker"],
        env={
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT / "operator"),
            **env,
            "INGEST_LIMIT": str(10**9),
            "INGEST_CONFIG": json.dumps(source),
            "INGEST_OUTPUT": str(tmp_path / "output"),
            "INGEST_TERMINATION_MESSAGE_PATH": str(termination),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        wait_for(_Endless.asked.is_set, 30, "the worker to read")
        time.sleep(2.5)  # several questions long: it goes on while the run does
        assert worker.poll() is None
        cluster.cancel(namespace, "geo")
        output, _ = worker.communicate(timeout=60)
    finally:
        worker.kill()
        server.shutdown()
        server.server_close()
    assert worker.returncode == 0, output
    assert "gives no answer" not in output
    result = json.loads(termination.read_text())
    assert result["outcome"] == "cancelled"
    assert result["read"] > 0
    assert result["message"] == f"the run is cancelled, stopped after {result['read']} of 1000000000 rows"
    assert not (tmp_path / "output").exists()
