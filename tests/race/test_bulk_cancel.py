"""Many runs cancelled at once: each has its own record, none is left out, repeating it changes nothing."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.api.conftest import Cluster, Json
from tests.race.account import Operator
from tests.race.bulk import LABEL, Bulk
from tests.race.checker import check, latency_ms

RUNS = 500
BY_SELECTOR = 20


@pytest.fixture
def bulk(
    cluster: Cluster, operator_kubeconfig: Path, audit_path: Path, namespace: str, tmp_path: Path
) -> Iterator[Bulk]:
    """An operator under its own account, and an empty namespace."""
    operator = Operator(
        kubeconfig=operator_kubeconfig, context=cluster.context, namespaces=[namespace], log=tmp_path / "operator.log"
    )
    watched = Bulk(cluster, namespace, audit_path)
    operator.start()
    yield watched
    operator.stop()


def records(bulk: Bulk) -> dict[str, tuple[int, str, Json]]:
    """What a repeated cancel must leave as it is. (The operator goes on to say how far the drain is.)"""
    return {
        name: (run["metadata"]["generation"], run["status"]["completionTime"], run["status"]["cancellation"])
        for name, run in bulk.runs("bulk").items()
    }


def test_500_runs_at_once_each_with_its_own_record(bulk: Bulk, say: Callable[[str], None]) -> None:
    names = bulk.start(RUNS, pods=1, label="bulk")
    seconds = bulk.cancel(names)
    bulk.await_cancelled("bulk", RUNS)
    for name, run in bulk.runs("bulk").items():
        record = run["status"]["cancellation"]
        assert (record["reason"], record["activeBatches"]) == (f"bulk {name}", 1)
        assert record["requestedBy"]
        assert run["status"]["completionTime"]
    before = records(bulk)

    bulk.cancel(names)
    assert records(bulk) == before, "a repeated cancel has changed a run"

    histories = bulk.histories()
    assert sorted(histories) == names
    assert all(len(history.creates) == 1 for history in histories.values())
    judged = {"job-after-end", "cancel-ignored", "counters-moved", "record-wrong", "condition-wrong", "unclaimed-job"}
    found = [finding for history in histories.values() for finding in check(history) if finding.rule in judged]
    assert not found, "\n".join(map(str, found))
    latencies = [latency for history in histories.values() if (latency := latency_ms(history)) is not None]
    assert len(latencies) == RUNS
    say(f"\n{RUNS} runs patched in {seconds:.1f} s, all Cancelled")


def test_cancel_by_label_selector_as_documented(bulk: Bulk, cluster: Cluster, namespace: str) -> None:
    """The command of docs/proof.md, twice; the runs of another team go on."""
    bulk.start(BY_SELECTOR, pods=1, label="red")
    bulk.start(2, pods=1, label="blue")
    kubectl = f"kubectl --kubeconfig {cluster.kubeconfig} --context {cluster.context} -n {namespace}"
    command = (
        f"{kubectl} get ingestruns -l {LABEL}=red -o name"
        f""" | xargs {kubectl} patch --type merge -p '{{"spec":{{"cancel":true}}}}'"""
    )
    for answer in ("patched", "patched (no change)"):
        done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert sorted(done.stdout.splitlines()) == sorted(
            f"ingestrun.ingestrun.dev/{name} {answer}" for name in bulk.runs("red")
        )
        # kubectl calls it a change when the operator has written between its GET and its PATCH.
        bulk.await_cancelled("red", BY_SELECTOR)
        bulk.await_idle()
    assert {run["status"]["phase"] for run in bulk.runs("blue").values()} == {"Running"}
    bulk.let_go("red")
    bulk.await_drained("red", BY_SELECTOR)
    histories = bulk.histories()
    assert [str(finding) for name in bulk.runs("red") for finding in check(histories[name])] == []
