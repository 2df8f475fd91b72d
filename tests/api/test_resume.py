"""A run that does the rest of another, on a real API server: the published stays, the rest goes under the same keys."""

from __future__ import annotations

from typing import Any

import pytest
from kubernetes import client

from tests.api.conftest import Cluster, Json, WaitFor, refusal
from tests.api.operator_process import OperatorProcess
from tests.api.test_runs import condition, drained, in_phase, spec

CHAIN = {"cursor": {}, "size": 10}


def batches_of(text: str) -> set[int]:
    found: set[int] = set()
    for part in text.split(",") if text else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found


def published(run: Json) -> set[int]:
    return batches_of(run["status"]["batches"]["published"])


def env_of(job: Any) -> dict[str, str]:
    return {entry.name: entry.value or "" for entry in job.spec.template.spec.containers[0].env}


def jobs_of(cluster: Cluster, namespace: str, run: Json) -> list[dict[str, str]]:
    """What the Jobs of the run were told."""
    return [env_of(job) for job in cluster.jobs(namespace, f"ingestrun.dev/run-uid={run['metadata']['uid']}")]


def says(cluster: Cluster, namespace: str, name: str) -> tuple[str, str]:
    found = condition(cluster.run(namespace, name), "Succeeded")
    return found["reason"], found["message"]


def ended(cluster: Cluster, namespace: str, *names: str) -> list[Json]:
    """Those runs, once all of them have ended; before, nothing."""
    found = [cluster.run(namespace, name) for name in names]
    return found if all(run["status"].get("phase") in ("Succeeded", "Failed") for run in found) else []


def cut_chain(cluster: Cluster, namespace: str, wait_for: WaitFor, name: str = "old") -> Json:
    """A chain that was cancelled when 5 was published and 4 had failed."""
    played = {"batches": "90", "run-seconds": "0.3", "fail-stage": "hook", "fail-batch": "4", "fail-attempts": "9"}
    cluster.create_run(namespace, spec(played, batches=CHAIN, onBatchFailure="Continue", retries=0), name=name)
    wait_for(lambda: 5 in published(cluster.run(namespace, name)), 90, "batch 5 to be published")
    cluster.cancel(namespace, name)
    return wait_for(drained(cluster, namespace, name), 60, "Drained")


def test_chain_with_a_gap(cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor) -> None:
    old = cut_chain(cluster, namespace, wait_for)
    late = batches_of(old["status"].get("afterEnd", {}).get("published", ""))
    cluster.create_run(namespace, spec({"batches": "16"}, batches=CHAIN, resumeFrom={"name": "old"}), name="new")
    new = wait_for(in_phase(cluster, namespace, "new", "Succeeded"), 120, "Succeeded")
    assert new["status"]["batches"]["published"] == "0-15"
    assert new["status"]["records"] == {"fetched": 160, "rejected": 0, "published": 160}
    assert new["status"]["batches"]["unpublished"] == []
    told = jobs_of(cluster, namespace, new)
    done = {int(env["INGEST_BATCH"]) for env in told if env["INGEST_STAGE"] == "publish"}
    assert 4 in done
    assert done == set(range(16)) - published(old) - late
    assert {env["INGEST_IDEMPOTENCY_KEY"] for env in told} == {f"{old['metadata']['uid']}/{batch}" for batch in done}
    assert cluster.run(namespace, "old")["status"]["resumedBy"]["uid"] == new["metadata"]["uid"]
    (told_so,) = cluster.told(namespace, "ResumedFrom")
    assert told_so.startswith("goes on from run old: ")


def test_partitions_wait_for_the_drain_and_the_second_run_is_refused(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    parts = {"partitions": {"count": 9}}
    cluster.create_run(namespace, spec({"run-seconds": "2"}, batches=parts, parallelism=3), name="old")
    wait_for(lambda: len(published(cluster.run(namespace, "old"))) >= 3, 90, "three batches to be published")
    for name in ("first", "second"):
        cluster.create_run(namespace, spec(batches=parts, resumeFrom={"name": "old"}), name=name)
    wait_for(lambda: says(cluster, namespace, "first")[0] == "WaitingForEnd", 30, "WaitingForEnd")
    assert cluster.run(namespace, "first")["status"]["phase"] == "Pending"
    assert "resumedBy" not in cluster.run(namespace, "old")["status"]
    cluster.cancel(namespace, "old")
    operator.kill()
    operator.start()
    both = wait_for(lambda: ended(cluster, namespace, "first", "second"), 120, "both to end")
    runs = {run["metadata"]["name"]: run for run in both}
    by_phase = {run["status"]["phase"]: name for name, run in runs.items()}
    assert set(by_phase) == {"Succeeded", "Failed"}
    winner, loser = by_phase["Succeeded"], by_phase["Failed"]
    assert says(cluster, namespace, loser)[0] == "ResumeRefused"
    assert f"run old is already resumed by run {winner}" in says(cluster, namespace, loser)[1]
    assert jobs_of(cluster, namespace, runs[loser]) == []
    assert runs[winner]["status"]["batches"]["progress"] == "9/9"
    assert runs[winner]["status"]["records"]["published"] == 90
    old = cluster.run(namespace, "old")
    late = batches_of(old["status"].get("afterEnd", {}).get("published", ""))
    told = jobs_of(cluster, namespace, runs[winner])
    assert {int(env["INGEST_BATCH"]) for env in told} == set(range(9)) - published(old) - late


def test_one_saved_state_where_the_old_run_is_gone_is_gone_on_from_once(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    old = cut_chain(cluster, namespace, wait_for)
    status = old["status"]
    kept = {name: status["batches"][name] for name in ("fetched", "published", "exhausted", "unpublished")}
    saved = {"uid": old["metadata"]["uid"], "batches": kept, "cursor": status["cursor"], "records": status["records"]}
    if "afterEnd" in status:
        saved["afterEnd"] = status["afterEnd"]
    cluster.custom.delete_namespaced_custom_object("ingestrun.dev", "v1alpha1", namespace, "ingestruns", "old")
    by_name = spec({"batches": "16"}, batches=CHAIN, resumeFrom={"name": "old"})
    wait_for(lambda: not cluster.runs(namespace), 30, "the old run to go")
    cluster.create_run(namespace, by_name, name="lost")
    wait_for(in_phase(cluster, namespace, "lost", "Failed"), 30, "Failed")
    assert says(cluster, namespace, "lost") == (
        "ResumeSourceNotFound",
        "there is no run old: name one that exists, or give resumeFrom.savedState if its was kept",
    )
    for name in ("one", "two"):
        cluster.create_run(namespace, {**by_name, "resumeFrom": {"savedState": saved}}, name=name)
    runs = wait_for(lambda: ended(cluster, namespace, "one", "two"), 120, "both to end")
    by_phase = {run["status"]["phase"]: run for run in runs}
    new, loser = by_phase["Succeeded"], by_phase["Failed"]
    assert new["status"]["batches"]["published"] == "0-15"
    assert new["status"]["records"]["published"] == 160
    assert new["status"]["resumedFrom"] == {"originUid": old["metadata"]["uid"]}
    reason, message = says(cluster, namespace, loser["metadata"]["name"])
    assert reason == "ResumeRefused"
    assert message.startswith(f"run {new['metadata']['name']} goes on from the saved state, and has not ended: ")
    assert jobs_of(cluster, namespace, loser) == []


def test_saved_state_of_a_run_that_is_still_there_is_claimed_there(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec(batches=CHAIN, cancel=True), name="old")
    old = wait_for(drained(cluster, namespace, "old"), 60, "Drained")
    uid = old["metadata"]["uid"]
    for name in ("one", "two"):
        resume = {"savedState": {"uid": uid}}
        cluster.create_run(namespace, spec({"batches": "3"}, batches=CHAIN, resumeFrom=resume), name=name)
    runs = wait_for(lambda: ended(cluster, namespace, "one", "two"), 120, "both to end")
    by_phase = {run["status"]["phase"]: run["metadata"] for run in runs}
    assert cluster.run(namespace, "old")["status"]["resumedBy"]["uid"] == by_phase["Succeeded"]["uid"]
    assert says(cluster, namespace, by_phase["Failed"]["name"])[0] == "ResumeRefused"


def test_another_source_is_refused_before_anything_is_started(
    cluster: Cluster, namespace: str, operator: OperatorProcess, wait_for: WaitFor
) -> None:
    cluster.create_run(namespace, spec(batches=CHAIN, cancel=True), name="old")
    wait_for(drained(cluster, namespace, "old"), 60, "Drained")
    other = {"image": "example/other:1"}
    cluster.create_run(namespace, spec(batches=CHAIN, fetch=other, resumeFrom={"name": "old"}), name="new")
    wait_for(in_phase(cluster, namespace, "new", "Failed"), 30, "Failed")
    assert says(cluster, namespace, "new") == (
        "ResumeRefused",
        "spec.fetch.image is not that of run old: a resumed run reads and publishes the same",
    )
    assert cluster.jobs(namespace) == []


@pytest.mark.parametrize(
    ("resume", "fragment"),
    [
        ({"name": "self"}, "name another run, because a run cannot resume itself"),
        ({}, "set exactly one of name"),
        ({"name": "a", "savedState": {"uid": "b"}}, "set exactly one of name"),
        (
            {"savedState": {"uid": "b", "cursor": "7"}},
            "take cursor and unpublished out, because this run has partitions",
        ),
        ({"savedState": {"batches": {"published": "0-3"}}}, "spec.resumeFrom.savedState.uid: Required value"),
        ({"savedState": {"uid": "b", "batches": {"published": "x"}}}, "should match"),
        ({"savedState": {"uid": "b", "batches": {"active": 3}}}, "unknown field"),
    ],
)
def test_what_the_api_server_refuses(resume: Json, fragment: str, cluster: Cluster, namespace: str, crd: Json) -> None:
    with pytest.raises(client.ApiException) as caught:
        cluster.create_run(
            namespace, spec(batches={"partitions": {"count": 3}}, resumeFrom=resume), name="self", dry_run=True
        )
    assert fragment in refusal(caught.value)


def test_it_is_fixed_at_creation(cluster: Cluster, namespace: str, crd: Json) -> None:
    cluster.create_run(namespace, spec(suspend=True, resumeFrom={"name": "other"}), name="run")
    for change in ({"name": "another"}, None):
        with pytest.raises(client.ApiException) as caught:
            cluster.patch_spec(namespace, "run", resumeFrom=change)
        assert "spec.resumeFrom" in refusal(caught.value)
        assert "fixed at creation" in refusal(caught.value)
