"""One saved state is gone on from once: whichever runs are left of its row of resumes, and whoever comes second."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from tests.fakes.world import Killed
from tests.unit.controller.reconcile.test_resume import Runs, cut, ended, judge_end_of, key, runs, saved_state

from ingestrun.kube.errors import KubeError, Unavailable, Unknown
from ingestrun.kube.protocol import Object

__all__ = ["runs"]
"""The fixture of test_resume."""

MANAGED_BYTES = 1536
"""What the API server adds, as `make bench-scale` has seen: managed fields, which the cluster in memory has not."""
CHAIN: dict[str, Any] = {"cursor": {}, "size": 60}


def delete(runs: Runs, name: str) -> None:
    runs.cluster.user_delete_run(key(name))


async def state_of_a_run_that_is_gone(runs: Runs) -> dict[str, Any]:
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))
    delete(runs, "old")
    return state


def refusal(runs: Runs, name: str) -> str:
    """The sentence with which that run was refused; nothing of it was started."""
    assert runs.of(name)["phase"] == "Failed"
    reason, message = runs.says(name)
    assert reason == "ResumeRefused"
    assert runs.jobs_of(name) == []
    return message


def judge_whole(runs: Runs) -> None:
    """Every record was published, and no key twice."""
    spans = sorted((entry.start, entry.read) for entry in runs.source.log)
    assert spans[0][0] == 0
    assert all(start + read == after for (start, read), (after, _) in pairwise(spans)), spans
    assert sum(read for _, read in spans) == runs.source.total
    assert len({entry.key for entry in runs.source.log}) == len(spans)


async def test_of_two_runs_with_one_saved_state_one_goes_on(runs: Runs) -> None:
    state = await state_of_a_run_that_is_gone(runs)
    for name in ("one", "two"):
        runs.begin(name, saved=state, batches=CHAIN)
    await runs.play()
    (winner,) = [name for name in ("one", "two") if runs.of(name)["phase"] == "Succeeded"]
    (loser,) = {"one", "two"} - {winner}
    assert refusal(runs, loser) == (
        f"run {winner} goes on from the saved state, and has not ended: once it has, "
        f"resume from it (resumeFrom: {{name: {winner}}})"
    )
    judge_whole(runs)


async def test_two_passes_side_by_side_do_not_both_take_over(runs: Runs) -> None:
    state = await state_of_a_run_that_is_gone(runs)

    async def others_first(call: Any) -> None:
        await asyncio.sleep(0)

    runs.cluster.on_call = others_first
    for name in ("one", "two"):
        runs.begin(name, saved=state, batches=CHAIN)
    await asyncio.gather(*(runs.reconciler.reconcile(key(name), "test") for name in ("one", "two")))
    await runs.play()
    assert sorted(runs.of(name)["phase"] for name in ("one", "two")) == ["Failed", "Succeeded"]
    judge_whole(runs)


async def test_a_named_run_that_is_claimed_and_then_goes_is_not_taken_over_from_memory(runs: Runs) -> None:
    """By then another run may have gone on from its saved state: the watch has not shown yet that it is gone."""
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))

    async def delete_unseen(call: Any) -> None:
        if (call.stage, call.verb, call.name) == ("after", "patch", "old"):
            runs.cluster.on_call = None
            watchers, runs.cluster._watchers = runs.cluster._watchers, []
            delete(runs, "old")
            runs.cluster._watchers = watchers
            runs.begin("saved", saved=state, batches=CHAIN)

    runs.cluster.on_call = delete_unseen
    runs.begin("named", after="old", batches=CHAIN)
    await runs.play()
    assert runs.of("saved")["phase"] == "Succeeded"
    assert (runs.of("named")["phase"], runs.says("named")[0]) == ("Failed", "ResumeSourceNotFound")
    judge_whole(runs)


async def test_a_third_is_refused_when_the_first_has_ended(runs: Runs) -> None:
    state = await state_of_a_run_that_is_gone(runs)
    runs.begin("one", saved=state, batches=CHAIN)
    await runs.play()
    assert runs.of("one")["phase"] == "Succeeded"
    runs.begin("late", saved=state, batches=CHAIN)
    await runs.play()
    assert refusal(runs, "late") == (
        "run one goes on from the saved state, and has ended in another state: "
        "resume from it (resumeFrom: {name: one}), or delete it first"
    )
    judge_whole(runs)


async def test_a_take_over_whose_answer_was_lost_holds_the_other_back(runs: Runs) -> None:
    """It may still arrive: until that is settled, the other neither begins nor is refused."""
    state = await state_of_a_run_that_is_gone(runs)
    runs.begin("one", saved=state, batches=CHAIN)
    late = Unknown("no answer")
    runs.cluster.fail_next("patch", "ingestruns/status", late, when="late", match=lambda call: call.name == "one")
    with pytest.raises(KubeError):
        await runs.reconciler.reconcile(key("one"), "test")
    runs.begin("two", saved=state, batches=CHAIN)
    with pytest.raises(Unavailable, match="what run one has written, which concerns this one, is not known yet"):
        await runs.reconciler.reconcile(key("two"), "test")
    runs.cluster.deliver_late()
    await runs.play()
    assert runs.of("one")["phase"] == "Succeeded"
    assert refusal(runs, "two").startswith("run one goes on from the saved state")
    judge_whole(runs)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("old_stays", [True, False])
async def test_killed_around_every_call_one_goes_on(old_stays: bool, stage: str) -> None:
    calls = 0
    number = -1
    while number < calls:
        runs = Runs()
        runs.source.total = 130
        await cut(runs)
        state = saved_state(runs.cluster.run(key("old")))
        if not old_stays:
            delete(runs, "old")
        runs.begin("one", saved=state, batches=CHAIN)
        if old_stays:
            runs.begin("two", after="old", batches=CHAIN)
        else:
            runs.begin("two", saved=state, batches=CHAIN)
        begun = len(runs.cluster.history)
        killed = False

        async def kill(call: Any, runs: Runs = runs, begun: int = begun, number: int = number) -> None:
            nonlocal killed
            if not killed and call.stage == stage and len(runs.cluster.history) - begun == number:
                killed = True
                raise Killed("SIGKILL")

        runs.cluster.on_call = kill
        for _ in range(3):
            try:
                await runs.play()
            except Killed:
                runs.restart()
        calls = calls or min(20, len(runs.cluster.history) - begun)  # well past the take-over
        phases = {name: runs.of(name)["phase"] for name in ("one", "two")}
        assert sorted(phases.values()) == ["Failed", "Succeeded"], (number, phases)
        judge_whole(runs)
        number += 1


async def test_the_old_run_that_is_still_there_is_claimed_as_if_it_were_named(runs: Runs) -> None:
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))
    runs.begin("new", saved=state, batches=CHAIN)
    await runs.settle()
    assert runs.of("old")["resumedBy"]["name"] == "new"
    assert runs.of("new")["resumedFrom"]["name"] == "old"
    runs.begin("other", after="old", batches=CHAIN)
    await runs.play()
    assert refusal(runs, "other").startswith("run old is already resumed by run new")
    judge_end_of(runs, "old", "new", expected=450)


async def test_the_old_run_that_another_has_resumed_by_name_is_not_resumed_by_its_saved_state(runs: Runs) -> None:
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))
    runs.begin("named", after="old", batches=CHAIN)
    await runs.until_published("named", 3)
    runs.stop("named")
    await runs.play()
    runs.begin("new", saved=state, batches=CHAIN)
    await runs.play()
    assert refusal(runs, "new").startswith("run named goes on from the saved state, and has ended in another state")
    delete(runs, "old")
    runs.begin("again", saved=state, batches=CHAIN)
    await runs.play()
    assert refusal(runs, "again").startswith("run named goes on from the saved state, and has ended in another state")
    # The state of the last one in the row is the one to go on from.
    runs.begin("right", saved=saved_state(runs.cluster.run(key("named"))), batches=CHAIN)
    await runs.play()
    assert runs.of("right")["phase"] == "Succeeded"
    judge_whole(runs)


async def test_a_state_that_may_be_that_of_an_heir_or_of_the_one_before_is_refused_until_that_one_goes(
    runs: Runs,
) -> None:
    """The heir is gone, and may have got further than the state says."""
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))
    runs.begin("heir", after="old", batches=CHAIN)
    await runs.settle()
    runs.stop("heir")
    await runs.play()
    delete(runs, "heir")
    runs.begin("new", saved=state, batches=CHAIN)
    await runs.play()
    assert refusal(runs, "new") == (
        "run old was resumed by run heir, which is gone: resume from that one's saved state, if it was kept; "
        "or delete run old first"
    )
    delete(runs, "old")
    runs.begin("again", saved=state, batches=CHAIN)
    await runs.play()
    assert runs.of("again")["phase"] == "Succeeded"
    judge_whole(runs)


async def test_an_heir_that_is_gone_is_followed_by_the_run_with_its_saved_state(runs: Runs) -> None:
    await cut(runs)
    runs.begin("heir", after="old", batches=CHAIN)
    await runs.until_published("heir", 3)
    runs.stop("heir")
    await runs.play()
    state = saved_state(runs.cluster.run(key("heir")))
    delete(runs, "heir")
    runs.begin("new", saved=state, batches=CHAIN)
    await runs.play()
    judge_end_of(runs, "old", "new", expected=450)


async def test_a_saved_state_that_is_not_the_one_that_its_run_has_ended_in_is_refused(runs: Runs) -> None:
    runs.begin("old", batches=CHAIN)
    await runs.until_published("old", 1)
    early = saved_state(runs.cluster.run(key("old")))
    runs.begin("hasty", saved=early, batches=CHAIN)
    await runs.settle()
    assert refusal(runs, "hasty") == (
        "run old is the one of the saved state, and has not ended: "
        "once it has, resume from it (resumeFrom: {name: old})"
    )
    await runs.until_published("old", 3)
    runs.stop("old")
    await runs.play()
    runs.begin("new", saved=early, batches=CHAIN)
    await runs.play()
    assert refusal(runs, "new") == (
        "run old is the one of the saved state, and has ended in another state: "
        "resume from it (resumeFrom: {name: old}), or delete it first"
    )
    assert "resumedBy" not in runs.of("old")


async def test_another_source_than_that_of_the_old_run_is_refused_by_its_saved_state_too(runs: Runs) -> None:
    await cut(runs)
    other = {"image": "example/other:1"}
    runs.begin("new", saved=saved_state(runs.cluster.run(key("old"))), batches=CHAIN, fetch=other)
    await runs.play()
    assert refusal(runs, "new").startswith("spec.fetch.image is not that of run old")


async def test_waits_until_the_old_run_is_drained(runs: Runs) -> None:
    runs.begin("old", batches=CHAIN)
    await runs.until_published("old", 1)
    held = runs.active_jobs()[0]
    runs.cluster.start_pod(held["metadata"]["name"])
    runs.stop("old")
    await runs.settle()
    runs.begin("new", saved=saved_state(runs.cluster.run(key("old"))), batches=CHAIN)
    await runs.settle()
    assert runs.says("new", "Reconciling")[0] == "WaitingForDrain"
    assert runs.jobs_of("new") == []
    runs.cluster.finish_job(held["metadata"]["name"], exit_code=1)
    await runs.play()
    assert ended(runs, "old")
    judge_end_of(runs, "old", "new", expected=450)


async def test_a_claim_that_was_let_go_by_a_cancel_is_free_again(runs: Runs) -> None:
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))

    async def cancel(call: Any) -> None:
        if (call.stage, call.verb, call.name) == ("after", "patch", "old"):
            runs.cluster.on_call = None
            runs.stop("first")

    runs.cluster.on_call = cancel
    runs.begin("first", saved=state, batches=CHAIN)
    await runs.play()
    assert runs.of("first")["phase"] == "Cancelled"
    assert runs.of("old")["resumedBy"]["name"] == "first"
    runs.begin("second", saved=state, batches=CHAIN)
    await runs.play()
    judge_end_of(runs, "old", "second", expected=450)


async def test_a_run_that_is_being_deleted_is_waited_for(runs: Runs) -> None:
    """By foreground deletion it stays until its Jobs are gone, and they may still publish."""
    await cut(runs)
    body = runs.cluster.run(key("old"))
    going: Object = {**body, "metadata": {**body["metadata"], "deletionTimestamp": "2026-01-01T00:00:00Z"}}
    runs.cluster._store("IngestRun", dict(going), "MODIFIED")
    runs.begin("new", saved=saved_state(body), batches=CHAIN)
    await runs.settle()
    assert runs.says("new", "Reconciling") == (
        "WaitingForDeletion",
        "run old, of the same saved state, is being deleted",
    )
    assert runs.jobs_of("new") == []
    delete(runs, "old")
    runs.now = min(runs.due.values())
    await runs.play()
    assert runs.of("new")["phase"] == "Succeeded"
    judge_whole(runs)


def holes(number: int) -> str:
    """A hundred thousand batches, but for so many that are not published, far apart."""
    return ",".join(f"{at + 1}-{at + 400}" for at in range(0, 401 * number, 401))


@pytest.mark.parametrize("failing", [True, False])
async def test_the_object_stays_below_16_kib_with_the_largest_saved_state(runs: Runs, failing: bool) -> None:
    """As one run may leave it: 80 failed and 100 in flight, each apart; and what is done again fails at length."""
    ranges = holes(180)
    state = {"uid": "abc", "batches": {"fetched": ranges, "published": ranges}}
    changes: dict[str, Any] = {"retries": 0, "onBatchFailure": "Continue", "parallelism": 100}
    runs.begin("new", saved=state, batches={"partitions": {"count": 401 * 180}}, **changes)
    await runs.settle()
    for _ in range(80):
        job = runs.active_jobs()[0]
        if failing:
            runs.work(job, exit_code=1, result="é" * 2000)
        else:
            runs.work(job)
        await runs.settle()
    assert bool(runs.of("new").get("failures")) == failing
    assert runs.cluster.largest_run < 16 * 1024 - MANAGED_BYTES


async def test_a_saved_state_that_leaves_no_room_is_refused(runs: Runs) -> None:
    ranges = holes(240)
    assert len(ranges) < 3072, "what the CRD lets in"
    state = {"uid": "abc", "batches": {"fetched": ranges, "published": ranges}}
    runs.begin("new", saved=state, batches={"partitions": {"count": 401 * 240}})
    await runs.play()
    assert refusal(runs, "new").startswith("the saved state has ")
    assert refusal(runs, "new").endswith(" bytes, and a run's object has room for 5632")
    assert runs.cluster.largest_run < 16 * 1024 - MANAGED_BYTES


async def test_a_saved_state_costs_one_list_and_no_run_without_one_pays(runs: Runs) -> None:
    state = await state_of_a_run_that_is_gone(runs)
    before = len(runs.cluster.history)
    runs.begin("new", saved=state, batches=CHAIN)
    await runs.play()
    lists = [call for call in runs.cluster.history[before:] if (call.verb, call.resource) == ("list", "ingestruns")]
    assert len(lists) == 1
    without = Runs()
    without.create()
    await without.play()
    assert without.cluster.calls("list", "ingestruns") == []


async def test_the_list_of_the_chain_shows_that_the_data_were_restored(runs: Runs) -> None:
    """The run of the saved state is as the backup has it, and not as it was seen since."""
    await cut(runs)
    state = saved_state(runs.cluster.run(key("old")))
    backup = runs.cluster.backup()
    for number in range(100):  # so that no version that is given out from now on has caught up with it
        runs.cluster.user_patch_metadata(key("old"), {"labels": {"n": str(number)}})
    await runs.settle()
    runs.cluster.restore(backup)
    runs.begin("one", saved=state, batches=CHAIN)
    await runs.play()
    assert runs.store.went_back.is_set()
    assert runs.store.run(key("old")) == runs.cluster.run(key("old"))
    assert runs.of("one")["phase"] == "Succeeded"
    judge_whole(runs)
