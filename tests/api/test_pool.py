"""A pool of workers in front of a real API server: simulated workers ask over HTTP, KWOK plays their pods.

Where a test needs one request after another in an order of its own, the test itself is the worker, with what the
worker's pod was told. All else is done by the `Fleet` that the races use as well.
"""

from __future__ import annotations

import base64
import json
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
from kubernetes import client
from kubernetes.client import ApiException

from ingestrun.controller.http.tokens import SECRET_FIELD, SECRET_NAME, issue_for_worker
from ingestrun.kube.protocol import RunKey
from ingestrun.model.pool import BODY_MAX_BYTES
from tests.api.conftest import GROUP, PLURAL, VERSION, Cluster, Json, WaitFor, refusal
from tests.api.operator_process import OperatorProcess, api_settings, free_port
from tests.api.test_runs import Audit, condition, drained, in_phase
from tests.race.pool_workers import HOLD, ROWS, Fleet, Habits, bound_claim, pool_spec

SOON: Final = 10.0
"""Seconds within which a long poll that would last longer is answered by what it waits for, on a busy machine."""
MODES: Final[dict[str, Json]] = {
    "chain": {"cursor": {}, "size": ROWS},
    "partitions": {"partitions": {"count": 12}},
}


@pytest.fixture
def operator(cluster: Cluster, crd: Json, namespace: str, tmp_path: Path) -> Iterator[OperatorProcess]:
    """The operator of this checkout, which serves the pool on one port for all of the test; it leads by a lease.

    The Secret of its key, and the claim that the pods mount, are in the test's namespace.
    """
    assert crd
    key = client.V1Secret(metadata=client.V1ObjectMeta(name=SECRET_NAME), type="Opaque")
    cluster.core.create_namespaced_secret(namespace, key)
    process = OperatorProcess(
        kubeconfig=cluster.kubeconfig,
        context=cluster.context,
        namespace=namespace,
        log=tmp_path / "operator.log",
        settings={"INGESTRUN_LEASE_NAMESPACE": namespace, **api_settings(free_port())},
    )
    with bound_claim(cluster, namespace):
        process.start()
        yield process
        process.stop()


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An HTTP answer."""

    status: int
    body: Json
    headers: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Worker:
    """A worker that the test plays: it asks what it is told to, with the environment of its pod."""

    env: Mapping[str, str]
    job: str

    def ask(self, what: str, body: Json | bytes, *, token: str | None = None, url: str | None = None) -> Answer:
        """Ask once; with another token or base URL where one is given."""
        token = self.env["INGEST_POOL_TOKEN"] if token is None else token
        request = urllib.request.Request(
            f"{url or self.env['INGEST_POOL_URL']}/{what}",
            data=body if isinstance(body, bytes) else json.dumps(body).encode(),
            headers={"Content-Type": "application/json", **({"Authorization": f"Bearer {token}"} if token else {})},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as answer:
                return Answer(status=answer.status, body=json.load(answer), headers=dict(answer.headers))
        except urllib.error.HTTPError as error:
            return Answer(status=error.code, body=json.loads(error.read()), headers=dict(error.headers))

    def told(self, what: str, body: Json) -> Json:
        """The answer to a request that is right."""
        answer = self.ask(what, body)
        assert answer.status == 200, answer
        return answer.body

    def claim(self, *reports: Json, wait: float = 20) -> Json:
        """Report, and ask for a batch."""
        return self.told("claim", {"v": "v1", "reports": reports, "waitSeconds": wait})

    def publish(self, claim: Json) -> Json:
        """Ask for the permission to publish."""
        return self.told(
            "publish", {"v": "v1", **held(claim), "fetched": fetched(claim), "written": ROWS, "rejected": 0}
        )


def held(claim: Json) -> Json:
    """What names the attempt."""
    return {"batch": claim["batch"], "attempt": claim["attempt"]}


def fetched(claim: Json, *, of: int = 3) -> Json:
    """The result of its fetch; a chain has `of` batches."""
    if claim.get("partition"):
        return {"read": ROWS, "exhausted": True}
    following = int(claim.get("cursor") or 0) + 1
    return {"read": ROWS, "nextCursor": str(following), "exhausted": following >= of}


def done(claim: Json) -> Json:
    """The report of a batch that is published."""
    return {**held(claim), "outcome": "done", "fetched": fetched(claim), "written": ROWS, "rejected": 0}


def workers_of(cluster: Cluster, namespace: str, name: str, number: int, wait_for: WaitFor) -> list[Worker]:
    """The workers of a run, once their pods run, by number."""
    selector = f"ingestrun.dev/run={name},ingestrun.dev/stage=worker"

    def running() -> list[Worker]:
        pods = [pod for pod in cluster.pods(namespace, selector) if pod.status.phase == "Running"]
        assert len(pods) == number, [(pod.metadata.name, pod.status.phase) for pod in pods]
        found = [
            Worker(
                env={entry.name: entry.value or "" for entry in pod.spec.containers[0].env},
                job=pod.metadata.labels["batch.kubernetes.io/job-name"],
            )
            for pod in pods
        ]
        return sorted(found, key=lambda worker: int(worker.env["INGEST_WORKER"]))

    return wait_for(running, 30, f"{number} running workers of {name}")


def let_go(cluster: Cluster, namespace: str) -> None:
    """All held pods end well."""
    for pod in cluster.pods(namespace, "ingestrun.dev/stage=worker"):
        cluster.core.patch_namespaced_pod(pod.metadata.name, namespace, {"metadata": {"annotations": {HOLD: None}}})


def started(
    cluster: Cluster, namespace: str, wait_for: WaitFor, *, workers: int, batches: Json, **changes: Any
) -> list[Worker]:
    """The running workers of a new run `geo`; a chain's first batch needs one alone."""
    cluster.create_run(namespace, pool_spec(workers=workers, batches=batches, **changes), name="geo")
    return workers_of(cluster, namespace, "geo", workers, wait_for)


def stored_statuses(entries: list[Json], name: str) -> list[Json]:
    """The statuses of a run as the API server stored them, in that order."""
    versions: dict[int, Json] = {}
    for entry in entries:
        stored = entry.get("responseObject") or {}
        if stored.get("kind") == "IngestRun" and stored["metadata"]["name"] == name and entry["verb"] != "get":
            versions[int(stored["metadata"]["resourceVersion"])] = stored.get("status") or {}
    return [versions[number] for number in sorted(versions)]


def grown_after_end(entries: list[Json], name: str) -> list[str]:
    """Claims and permissions that were not there before, in a status that says the run has ended."""
    found, before = [], Counter[str]()
    for status in stored_statuses(entries, name):
        now = Counter({kind: status.get("batches", {}).get(kind, "") for kind in ("claimed", "publishing")})
        if status.get("phase") in ("Succeeded", "Failed", "Cancelled"):
            found += [f"{kind} {before[kind]} -> {now[kind]}" for kind in now if now[kind] not in ("", before[kind])]
        before = now
    return found


# ---- runs to their end


@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_to_its_end_with_exact_counts(
    mode: str, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    count = 12
    with Fleet(cluster, [namespace], Habits(batch_seconds=0.1, repeat=0.2), chain_batches=count) as fleet:
        cluster.create_run(namespace, pool_spec(workers=4, batches=MODES[mode]), name="geo")
        run = wait_for(in_phase(cluster, namespace, "geo", "Succeeded"), 60, "Succeeded")
        run = wait_for(drained(cluster, namespace, "geo"), 60, "Drained")
        ledger = fleet.ledger
    status = run["status"]
    assert (status["batches"]["claimed"], status["batches"]["published"]) == (f"0-{count - 1}", f"0-{count - 1}")
    assert status["records"] == {"fetched": ROWS * count, "rejected": 0, "published": ROWS * count}
    assert Counter(commit.batch for commit in ledger.commits) == dict.fromkeys(range(count), 1)
    assert ledger.errors == []
    assert "workers" not in status
    assert "publishing" not in status["batches"]
    assert status["batches"]["checkpoints"] == []
    assert not [job.metadata.name for job in cluster.jobs(namespace) if job.status.active]
    stored = stored_statuses(audit(namespace), "geo")
    # Whoever has committed had a stored permission, and each claim was stored with its holder.
    permitted = {batch for each in stored for batch in _indexes(each.get("batches", {}).get("publishing", ""))}
    holders = {entry["batch"] for each in stored for entry in each.get("workers", ()) if "batch" in entry}
    assert permitted == holders == set(range(count))


def _indexes(ranges: str) -> set[int]:
    spans = (part.partition("-") for part in ranges.split(",") if part)
    return {index for first, _, last in spans for index in range(int(first), int(last or first) + 1)}


def test_the_columns_and_the_status_show_batches_in_flight(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    first, second = started(cluster, namespace, wait_for, workers=2, batches={"partitions": {"count": 5}})
    claims = [first.claim()["claim"], second.claim()["claim"]]
    assert first.publish(claims[0])["granted"] is True
    assert first.claim(done(claims[0]))["claim"]["batch"] == 2

    def row() -> dict[str, Any]:
        table = cluster.table(namespace)
        (found,) = table["rows"]
        return dict(zip((c["name"] for c in table["columnDefinitions"]), found["cells"], strict=True))

    assert {key: row()[key] for key in ("Phase", "Progress", "Published", "Active")} == {
        "Phase": "Running",
        "Progress": "1/5",
        "Published": ROWS,
        "Active": 2,
    }
    status = cluster.run(namespace, "geo")["status"]
    assert status["execution"] == {"mode": "Pool", "started": 2}
    assert status["workers"] == [{"worker": 0, "batch": 2}, {"worker": 1, "batch": 1}]


# ---- refusals at creation, and by the API server itself

OWN: Final[Json] = {"image": "registry.example/own:1"}
WORKSPACE: Final[Json] = {"persistentVolumeClaim": {"claimName": "data"}}
SOURCE: Final[Json] = {"http": {"url": "http://example/data", "pagination": {"page": {}}}}
SINK: Final[Json] = {"parquet": {"path": "out"}}
BUILT_IN: Final[Json] = {"source": SOURCE, "sink": SINK, "workspace": WORKSPACE, "batches": {"cursor": {}}}
POOL: Final[Json] = {"execution": {"mode": "Pool"}}
SMALL: Final[Json] = {"limits": {"memory": "64Mi"}}
REFUSED: Final[dict[str, tuple[Json, str]]] = {
    "a fetch of one's own": (
        {"fetch": OWN, "sink": SINK, "workspace": WORKSPACE, "batches": {"cursor": {}}, **POOL},
        "set execution.mode to JobPerStage, or leave the containers of your own out",
    ),
    "a publish of one's own": (
        {"source": SOURCE, "publish": OWN, "workspace": WORKSPACE, "batches": {"cursor": {}}, **POOL},
        "set execution.mode to JobPerStage, or leave the containers of your own out",
    ),
    "a hook of one's own": (
        {**BUILT_IN, "hooks": [{"name": "check", "container": OWN}], **POOL},
        "set execution.mode to JobPerStage, or leave the containers of your own out",
    ),
    "workers without a pool": ({**BUILT_IN, "execution": {"workers": 3}}, "or set mode to Pool"),
    "a worker's batches without a pool": (
        {**BUILT_IN, "execution": {"mode": "JobPerStage", "maxBatchesPerWorker": 3}},
        "or set mode to Pool",
    ),
    "a worker's resources without a pool": ({**BUILT_IN, "execution": {"resources": SMALL}}, "or set mode to Pool"),
    "resources of the source in a pool": (
        {**BUILT_IN, "source": {**SOURCE, "resources": SMALL}, **POOL},
        "set execution.resources in place of the stages' own",
    ),
    "resources of the sink in a pool": (
        {**BUILT_IN, "sink": {**SINK, "resources": SMALL}, **POOL},
        "set execution.resources in place of the stages' own",
    ),
    "resources of a hook in a pool": (
        {
            **BUILT_IN,
            "hooks": [{"name": "check", "validate": {"columns": [{"name": "id"}]}, "resources": SMALL}],
            **POOL,
        },
        "set execution.resources in place of the stages' own",
    ),
    "another mode than there is": ({**BUILT_IN, "execution": {"mode": "Swarm"}}, "supported values"),
    "no worker": ({**BUILT_IN, "execution": {"mode": "Pool", "workers": 0}}, "greater than or equal to 1"),
}


def refused(act: Callable[[], object], fragment: str) -> None:
    with pytest.raises(ApiException) as caught:
        act()
    assert caught.value.status == 422, refusal(caught.value)
    assert fragment in refusal(caught.value)


@pytest.mark.usefixtures("crd")
@pytest.mark.parametrize("case", REFUSED)
def test_what_a_pool_cannot_do_is_refused_at_creation(case: str, cluster: Cluster, namespace: str) -> None:
    spec, sentence = REFUSED[case]
    refused(lambda: cluster.create_run(namespace, spec, dry_run=True), sentence)


@pytest.mark.usefixtures("crd")
def test_a_pool_is_taken_and_stays_one(cluster: Cluster, namespace: str) -> None:
    spec = {**BUILT_IN, "execution": {"mode": "Pool", "workers": 3, "maxBatchesPerWorker": 9, "resources": SMALL}}
    cluster.create_run(namespace, spec, name="geo")
    for change in ({"mode": "JobPerStage"}, {"workers": 4}, {"maxBatchesPerWorker": None}, {"resources": None}):
        refused(lambda change=change: cluster.patch_spec(namespace, "geo", execution=change), "spec.execution")  # type: ignore[misc]
    cluster.patch_spec(namespace, "geo", parallelism=7)


CLAIMING: Final = "an ended run claims no batch"
PERMITTING: Final = "an ended run gives no permission to publish"
ENDS: Final = ("Succeeded", "Failed", "Cancelled")
RUNNING: Final[Json] = {"phase": "Running", "batches": {"claimed": "0-2", "publishing": "1"}}


@pytest.mark.usefixtures("crd")
@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("at_once", [True, False], ids=["in the write that ends it", "in an ended run"])
@pytest.mark.parametrize(
    ("batches", "sentence"),
    [
        ({"claimed": "0-3"}, CLAIMING),
        ({"claimed": "0-2,7"}, CLAIMING),
        ({"publishing": "1-2"}, PERMITTING),
        ({"publishing": "2"}, PERMITTING),
        ({"claimed": "0-3", "publishing": "1,3"}, CLAIMING),
    ],
)
def test_the_api_server_refuses_a_claim_or_permission_of_an_ended_run(
    end: str, at_once: bool, batches: Json, sentence: str, cluster: Cluster, namespace: str
) -> None:
    cluster.create_run(namespace, {**BUILT_IN, **POOL}, name="geo")
    cluster.patch_status(namespace, "geo", RUNNING)
    if not at_once:
        cluster.patch_status(namespace, "geo", {"phase": end})
    refused(lambda: cluster.patch_status(namespace, "geo", {"phase": end, "batches": batches}), sentence)
    assert cluster.run(namespace, "geo")["status"]["batches"] == RUNNING["batches"]


@pytest.mark.usefixtures("crd")
def test_a_first_claim_in_the_write_that_ends_a_run_is_refused_too(cluster: Cluster, namespace: str) -> None:
    cluster.create_run(namespace, {**BUILT_IN, **POOL}, name="geo")
    for batches, sentence in (({"claimed": "0"}, CLAIMING), ({"publishing": "0"}, PERMITTING)):
        ending = {"phase": "Cancelled", "batches": batches}
        refused(lambda ending=ending: cluster.patch_status(namespace, "geo", ending), sentence)  # type: ignore[misc]


@pytest.mark.usefixtures("crd")
@pytest.mark.parametrize("end", ENDS)
def test_the_api_server_takes_what_is_right(end: str, cluster: Cluster, namespace: str) -> None:
    """Claims while the run goes on, an end that keeps them, a report, a drain that empties `publishing`, a resume."""
    cluster.create_run(namespace, {**BUILT_IN, **POOL}, name="geo")
    cluster.patch_status(namespace, "geo", RUNNING)
    cluster.patch_status(namespace, "geo", {"batches": {"claimed": "0-3", "publishing": "1-2"}})
    cluster.patch_status(namespace, "geo", {"phase": end})
    cluster.patch_status(namespace, "geo", {"afterEnd": {"published": "1"}})
    cluster.patch_status(namespace, "geo", {"batches": {"publishing": None}})
    assert cluster.run(namespace, "geo")["status"]["batches"] == {"claimed": "0-3"}

    # A run that takes over is cancelled, or found to have nothing left, in the very write in which it takes over.
    cluster.create_run(namespace, {**BUILT_IN, **POOL, "resumeFrom": {"name": "geo"}}, name="rest")
    taken = {"phase": end, "resumedFrom": {"name": "geo", "originUid": "u"}, "batches": {"claimed": "0-3"}}
    cluster.patch_status(namespace, "rest", taken)
    refused(lambda: cluster.patch_status(namespace, "rest", {"batches": {"claimed": "0-4"}}), CLAIMING)


# ---- who may ask, and what is no request


def test_who_may_ask_and_what(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, tmp_path: Path
) -> None:
    worker, colleague = started(cluster, namespace, wait_for, workers=2, batches={"partitions": {"count": 5}})
    cluster.create_run(namespace, pool_spec(workers=1, batches={"partitions": {"count": 1}}), name="other")
    (stranger,) = workers_of(cluster, namespace, "other", 1, wait_for)
    claim: Json = {"v": "v1", "waitSeconds": 0}
    held_batch = worker.claim()["claim"]
    token, uid = worker.env["INGEST_POOL_TOKEN"], worker.env["INGEST_RUN_UID"]
    secret: Any = cluster.core.read_namespaced_secret(SECRET_NAME, namespace)
    key = base64.b64decode(secret.data[SECRET_FIELD])
    run, later = RunKey(namespace=namespace, name="geo"), int(time.time()) + 3600

    def status(what: str = "claim", body: Json | bytes = claim, *, token: str | None = None, url: str = "") -> int:
        answer = worker.ask(what, body, token=token, url=url or None)
        assert answer.status == 200 or answer.body["detail"], answer
        return answer.status

    # The token: of another run, of another worker, none, another kind, one that has expired.
    assert status(token=stranger.env["INGEST_POOL_TOKEN"]) == 403
    version, expiry, of, _, mac = token.split(".")
    assert (version, of) == ("w1", uid)
    assert status(token=f"{version}.{expiry}.{of}.1.{mac}") == 403
    assert status(token=issue_for_worker(b"x" * 32, run, uid=uid, worker=0, expiry=later)) == 403
    assert status(url=stranger.env["INGEST_POOL_URL"]) == 403
    assert status(token="") == status(token="nonsense") == 401
    assert status(token=worker.env["INGEST_CANCELLATION_TOKEN"]) == 401
    assert status(token=issue_for_worker(key, run, uid=uid, worker=0, expiry=int(time.time()) - 60)) == 401
    # The body.
    assert status(body=b"{") == status(body=b"[]") == status(body={"v": "v2"}) == 422
    assert status("publish", {"v": "v1", "batch": -1}) == 422
    assert status(body={**claim, "reports": [done(held_batch)] * 9}) == 422
    assert status(body=b" " * (BODY_MAX_BYTES + 1)) == 413
    # The run and the worker; what a worker does not hold is not given.
    unknown = RunKey(namespace=namespace, name="nobody")
    nobody = worker.env["INGEST_POOL_URL"].replace("/geo/", "/nobody/")
    assert status(url=nobody, token=issue_for_worker(key, unknown, uid=uid, worker=0, expiry=later)) == 404
    assert status(token=issue_for_worker(key, run, uid="of-another-life", worker=0, expiry=later)) == 404
    assert status(token=issue_for_worker(key, run, uid=uid, worker=77, expiry=later)) == 409
    assert colleague.publish(held_batch)["granted"] is False
    assert worker.publish({**held_batch, "attempt": 1})["granted"] is False
    assert "publishing" not in cluster.run(namespace, "geo")["status"]["batches"]
    assert worker.claim()["claim"] == held_batch

    cluster.custom.delete_namespaced_custom_object(GROUP, VERSION, namespace, PLURAL, "other")

    def gone() -> bool:
        answer = stranger.ask("claim", claim)
        assert (answer.status, answer.body.get("detail")) == (404, "the run is gone"), answer
        return True

    wait_for(gone, 30, "404 for a run that is deleted")
    logs = (tmp_path / "operator.log").read_text()
    assert token not in logs
    assert mac not in logs


def test_a_standby_sends_workers_on(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, tmp_path: Path
) -> None:
    operator.stop()
    port = free_port()
    leader, standby = (
        OperatorProcess(
            kubeconfig=cluster.kubeconfig,
            context=cluster.context,
            namespace=namespace,
            log=tmp_path / f"replica-{number}.log",
            settings={"INGESTRUN_LEASE_NAMESPACE": namespace, **api_settings(port + number)},
        )
        for number in range(2)
    )
    leader.start(elect=True)
    try:
        standby.start(elect=True, leads=False)
        (worker,) = started(cluster, namespace, wait_for, workers=1, batches={"partitions": {"count": 2}})
        path = worker.env["INGEST_POOL_URL"].removeprefix(f"http://127.0.0.1:{port}")
        other = f"http://127.0.0.1:{port + 1}{path}"

        def answers() -> bool:
            try:
                return bool(worker.ask("claim", {"v": "v1"}, url=other))
            except OSError:
                return False  # it is about to start

        wait_for(answers, 30, "the standby to answer")
        answer = worker.ask("claim", {"v": "v1"}, url=other)
        assert (answer.status, float(answer.headers["Retry-After"])) == (503, 0.1)
        assert answer.body["detail"] == "this replica does not lead: ask again"
        assert "workers" in cluster.run(namespace, "geo")["status"]
        assert worker.claim()["claim"]["batch"] == 0
        leader.stop()
        wait_for(lambda: worker.ask("claim", {"v": "v1"}, url=other).status == 200, 60, "the standby to lead")
        patient = {"v": "v1", "waitSeconds": 20}
        assert worker.ask("claim", patient, url=other).body["claim"]["batch"] == 0
    finally:
        leader.stop()
        standby.stop()


# ---- requests that come twice


def test_what_comes_twice_counts_once(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    (worker,) = started(cluster, namespace, wait_for, workers=1, batches={"cursor": {}, "size": ROWS})
    claim = worker.claim()["claim"]
    assert (claim["batch"], claim["attempt"], claim["cursor"]) == (0, 0, "")
    assert worker.claim()["claim"] == claim
    told = {"v": "v1", **held(claim), "fetched": fetched(claim)}
    assert worker.told("fetched", told)["accepted"] is True
    assert worker.told("fetched", told)["accepted"] is True
    assert worker.publish(claim)["granted"] is True
    assert worker.publish(claim)["granted"] is True
    following = worker.claim(done(claim))["claim"]
    assert (following["batch"], following["cursor"]) == (1, "1")
    assert worker.claim(done(claim))["claim"] == following
    assert worker.claim(done(claim), done(claim))["claim"] == following
    status = cluster.run(namespace, "geo")["status"]
    assert (status["batches"]["published"], status["batches"]["claimed"]) == ("0", "0-1")
    assert status["records"] == {"fetched": ROWS, "rejected": 0, "published": ROWS}
    assert worker.publish(claim)["granted"] is False


# ---- cancel


def test_a_cancel_reaches_busy_workers_and_tells_what_landed(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    """One has only a claim, one permission, one has landed and tells it late; one waits for a retry, in a long poll."""
    lander, working, permitted, idle = started(
        cluster,
        namespace,
        wait_for,
        workers=4,
        batches={"partitions": {"count": 4}},
        backoff={"initialSeconds": 300, "maxSeconds": 300},
    )
    claims = [worker.claim()["claim"] for worker in (lander, working, permitted, idle)]
    for worker, claim in ((lander, claims[0]), (permitted, claims[2])):
        assert worker.publish(claim)["granted"] is True
    failure = {"outcome": "failed", "stage": "fetch", "message": "no luck", "permanent": False}
    assert idle.claim({**held(claims[3]), **failure})["wait"] is True  # stored, and the retry is not due
    assert {"worker": 3} in cluster.run(namespace, "geo")["status"]["workers"]
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(idle.claim, wait=30)
        cluster.cancel(namespace, "geo", "wrong source")
        began = time.monotonic()
        assert waiting.result()["cancelled"] == "the run is Cancelled"
        assert time.monotonic() - began < SOON
    wait_for(in_phase(cluster, namespace, "geo", "Cancelled"), 30, "Cancelled")
    assert working.publish(claims[1])["cancelled"] == "the run is Cancelled"
    assert working.claim()["cancelled"] == "the run is Cancelled"
    assert permitted.publish(claims[2])["cancelled"] == "the run is Cancelled"
    for _ in range(2):
        assert lander.claim(done(claims[0]))["cancelled"] == "the run is Cancelled"
    status = cluster.run(namespace, "geo")["status"]
    assert status["batches"]["published"] == ""
    assert status["records"]["published"] == 0
    assert status["batches"]["publishing"] == "0,2"
    assert condition(cluster.run(namespace, "geo"), "Drained")["status"] == "False"
    let_go(cluster, namespace)
    run = wait_for(drained(cluster, namespace, "geo"), 60, "Drained")
    record = run["status"]["cancellation"]
    assert (record["published"], record["notPublished"], record["unknown"]) == ("0", "1,3", "2")
    assert run["status"]["afterEnd"] == {"published": "0", "records": {"published": ROWS, "rejected": 0}}
    assert (run["status"]["batches"]["published"], run["status"]["records"]["published"]) == ("", 0)
    assert grown_after_end(audit(namespace), "geo") == []


def test_a_fleet_in_full_swing_is_cancelled(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor, audit: Audit
) -> None:
    count = 200
    with Fleet(cluster, [namespace], Habits(batch_seconds=0.1, repeat=0.2, freeze=0.3)) as fleet:
        spec = pool_spec(workers=10, batches={"partitions": {"count": count}})
        cluster.create_run(namespace, spec, name="geo")
        wait_for(lambda: len(fleet.ledger.commits) > 30, 60, "the pool to be busy")
        cluster.cancel(namespace, "geo")
        wait_for(in_phase(cluster, namespace, "geo", "Cancelled"), 30, "Cancelled")
        run = wait_for(drained(cluster, namespace, "geo"), 60, "Drained")
        commits, told = list(fleet.ledger.commits), fleet.ledger.told_cancelled
    status, record = run["status"], run["status"]["cancellation"]
    landed = _indexes(status["batches"]["published"]) | _indexes(record["published"])
    assert len(commits) < count
    assert {commit.batch for commit in commits} == landed
    assert len(commits) == len(landed)
    # A worker that lost the answer with its permission ends without a word: only such a batch is unknown.
    assert not _indexes(record["unknown"]) & landed
    assert told["geo"]
    entries = audit(namespace)
    assert grown_after_end(entries, "geo") == []
    ended = next(each for each in stored_statuses(entries, "geo") if each.get("phase") == "Cancelled")
    assert ended["records"] == status["records"]
    assert ended["batches"]["published"] == status["batches"]["published"]


def test_terminate_ends_the_workers(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    first, second = started(cluster, namespace, wait_for, workers=2, batches={"partitions": {"count": 4}})
    claims = [first.claim()["claim"], second.claim()["claim"]]
    assert first.publish(claims[0])["granted"] is True
    cluster.patch_spec(namespace, "geo", cancel=True, cancellation={"policy": "Terminate"})
    run = wait_for(drained(cluster, namespace, "geo"), 60, "Drained, and nobody lets the pods go")
    record = run["status"]["cancellation"]
    # What had permission may have landed before the SIGTERM: its worker has not said so.
    assert (record["published"], record["notPublished"], record["unknown"]) == ("", "1", "0")


# ---- pauses and deaths


def test_suspend_sends_the_workers_home_and_back(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    count = 60
    with Fleet(cluster, [namespace], Habits(batch_seconds=0.1)) as fleet:
        cluster.create_run(namespace, pool_spec(workers=4, batches={"partitions": {"count": count}}), name="geo")
        wait_for(lambda: len(fleet.ledger.commits) > 8, 60, "the pool to be busy")
        cluster.patch_spec(namespace, "geo", suspend=True)

        def at_home() -> bool:
            status = cluster.run(namespace, "geo")["status"]
            assert status["phase"] == "Suspended", status["phase"]
            assert "workers" not in status, status["workers"]
            return not [job for job in cluster.jobs(namespace) if job.status.active]

        wait_for(at_home, 60, "the workers to have ended")
        paused = len(fleet.ledger.commits)
        published = len(_indexes(cluster.run(namespace, "geo")["status"]["batches"]["published"]))
        assert published == paused < count
        cluster.patch_spec(namespace, "geo", suspend=None)
        run = wait_for(in_phase(cluster, namespace, "geo", "Succeeded"), 60, "Succeeded")
        assert Counter(commit.batch for commit in fleet.ledger.commits) == dict.fromkeys(range(count), 1)
    assert run["status"]["records"]["published"] == ROWS * count


@pytest.mark.parametrize("mode", MODES)
def test_nothing_is_lost_or_doubled_when_the_operator_is_killed(
    mode: str, cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    count = 40
    batches = MODES["chain"] if mode == "chain" else {"partitions": {"count": count}}
    with Fleet(cluster, [namespace], Habits(batch_seconds=0.1, repeat=0.2), chain_batches=count) as fleet:
        cluster.create_run(namespace, pool_spec(workers=4, batches=batches), name="geo")
        for part in (count // 5, count // 2):
            wait_for(lambda part=part: len(fleet.ledger.commits) >= part, 60, f"{part} batches")  # type: ignore[misc]
            operator.kill()
            operator.start()
        run = wait_for(in_phase(cluster, namespace, "geo", "Succeeded"), 90, "Succeeded")
        assert Counter(commit.batch for commit in fleet.ledger.commits) == dict.fromkeys(range(count), 1)
        assert {told.attempt for told in fleet.ledger.told} == {0}
    assert run["status"]["records"] == {"fetched": ROWS * count, "rejected": 0, "published": ROWS * count}


def test_a_deleted_workers_batch_goes_to_another(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    """By `kubectl delete pod`. What comes from the worker afterwards is not taken."""
    first, second = started(cluster, namespace, wait_for, workers=2, batches={"partitions": {"count": 2}})
    lost, kept = first.claim()["claim"], second.claim()["claim"]
    assert first.publish(lost)["granted"] is True
    (pod,) = cluster.pods(namespace, f"batch.kubernetes.io/job-name={first.job}")
    cluster.core.delete_namespaced_pod(pod.metadata.name, namespace)

    def given_up() -> bool:
        workers = cluster.run(namespace, "geo")["status"].get("workers", [])
        return all(entry["worker"] != 0 for entry in workers)

    wait_for(given_up, 60, "the run not to count on the worker any more")
    zombie = first.ask("claim", {"v": "v1", "reports": [done(lost)]})
    assert (zombie.status, zombie.body["detail"]) == (409, "the run does not count on this worker any more")
    assert second.publish(kept)["granted"] is True

    wait_for(lambda: "claim" in second.claim(done(kept), wait=2), 60, "the batch to be handed to the other worker")
    again = second.claim()["claim"]
    assert (again["batch"], again["attempt"], again["idempotencyKey"]) == (lost["batch"], 1, lost["idempotencyKey"])
    assert second.publish(again)["granted"] is True
    second.claim(done(again))
    let_go(cluster, namespace)
    run = wait_for(in_phase(cluster, namespace, "geo", "Succeeded"), 60, "Succeeded")
    assert run["status"]["records"]["published"] == 2 * ROWS
