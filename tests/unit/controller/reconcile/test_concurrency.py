"""Runs of one concurrency key: in whatever order things happen, no two of them run at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, Killed, World, manifest

from ingestrun.kube.errors import KubeError, NotFound, Unavailable, Unknown
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.names import LABEL_RUN_UID, LABEL_STAGE
from ingestrun.planner.run.concurrency import ConcurrentRun


@pytest.fixture
def world() -> World:
    return World()


def key(name: str) -> RunKey:
    return RunKey(namespace=KEY.namespace, name=name)


def create(world: World, name: str, policy: str | None, *, group: str = "geo", **spec: Any) -> Object:
    """A run of one batch without hooks; of the key `geo` unless told otherwise."""
    concurrency = {"key": group} | ({"policy": policy} if policy else {})
    body = manifest(**{"batches": {"partitions": {"count": 1}}, "hooks": None, "concurrency": concurrency, **spec})
    body["metadata"]["name"] = name
    return world.cluster.user_create_run(body)


def status(world: World, name: str) -> dict[str, Any]:
    found: dict[str, Any] = world.cluster.run(key(name))["status"]
    return found


def phase(world: World, name: str) -> str | None:
    return status(world, name).get("phase")


def condition(world: World, name: str, kind: str) -> dict[str, Any]:
    return next((c for c in status(world, name)["conditions"] if c["type"] == kind), {})


def jobs_of(world: World, name: str) -> list[Object]:
    uid = world.cluster.run(key(name))["metadata"]["uid"]
    return [job for job in world.cluster.jobs() if job["metadata"]["labels"][LABEL_RUN_UID] == uid]


async def start(world: World, name: str, policy: str | None, **spec: Any) -> Object:
    """A run of the key whose first pod runs; its Job."""
    create(world, name, policy, **spec)
    await world.settle()
    (job,) = jobs_of(world, name)
    world.cluster.start_pod(job["metadata"]["name"])
    await world.settle()
    return job


def assert_alone(world: World) -> None:
    """By the server's own history: no run began while another of its key had begun and was not over.

    Nor did one create any further Job beside another, unless that one says Allow.
    """
    runs: dict[str, Object] = {}
    begun: set[str] = set()
    for change in world.cluster.changes:
        meta = change.obj["metadata"]
        if change.kind == "IngestRun":
            if change.type == "DELETED":
                runs.pop(meta["uid"], None)
            else:
                runs[meta["uid"]] = change.obj
        elif change.kind == "Job" and change.type == "ADDED" and meta["labels"][LABEL_STAGE] != "on-cancel":
            uid = meta["labels"][LABEL_RUN_UID]
            mine = runs[uid]["spec"]["concurrency"]
            if mine.get("policy", "Allow") == "Allow":
                continue
            for other in runs.values():
                theirs, rival = other["spec"]["concurrency"], ConcurrentRun.read(other)
                if rival.uid == uid or theirs["key"] != mine["key"]:
                    continue
                beside = rival.started and not rival.over
                late = uid in begun and theirs.get("policy", "Allow") == "Allow"
                assert late or not beside, f"{meta['name']} was created beside {rival.name}"
            begun.add(uid)


async def test_allow_runs_side_by_side(world: World) -> None:
    await start(world, "one", None)
    await start(world, "two", "Allow")
    assert (phase(world, "one"), phase(world, "two")) == ("Running", "Running")
    assert [call for call in world.cluster.calls("list", "ingestruns") if call.namespace] == []


async def test_forbidden_run_ends_at_once_and_names_the_other(world: World) -> None:
    await start(world, "one", "Forbid")
    create(world, "two", "Forbid")
    create(world, "else", "Forbid", group="other")
    await world.settle()
    assert phase(world, "one") == phase(world, "else") == "Running"
    assert phase(world, "two") == "Failed"
    said = condition(world, "two", "Succeeded")
    assert said["reason"] == "ConcurrencyForbidden"
    assert said["message"] == (
        "run one of the concurrency key geo is active, and concurrency.policy is Forbid: nothing was started"
    )
    assert jobs_of(world, "two") == []
    assert "startTime" not in status(world, "two")
    await world.play()
    create(world, "three", "Forbid")
    await world.play()
    assert (phase(world, "one"), phase(world, "three")) == ("Succeeded", "Succeeded")
    assert_alone(world)


@pytest.mark.parametrize("policy", [None, "Allow", "Forbid", "Replace"])
@pytest.mark.parametrize("state", ["suspended", "unstarted", "full", "waiting"])
async def test_forbid_counts_whatever_is_active(world: World, policy: str | None, state: str) -> None:
    if state == "waiting":
        await start(world, "zero", None)
    if state == "full":
        world.cluster.job_quota["default"] = 0
    if state == "waiting" and policy == "Forbid":
        world.cluster.user_patch_spec(key("zero"), {"cancel": True})
        await world.settle()
    create(world, "one", policy, suspend=True if state in ("suspended", "unstarted") else None)
    if state != "unstarted":
        await world.settle()
    create(world, "two", "Forbid")
    await world.settle()
    assert condition(world, "two", "Succeeded")["reason"] == "ConcurrencyForbidden"


async def test_forbid_waits_for_one_that_has_ended_and_drains(world: World) -> None:
    """Cancel the old one, create the new one, in one go: it is not refused, and not started beside the old pods."""
    job = await start(world, "one", "Forbid", onCancel={"image": "example/clean:1"})
    world.cluster.user_patch_spec(key("one"), {"cancel": True})
    create(world, "two", "Forbid")
    await world.settle()
    assert phase(world, "two") == "Pending"
    assert condition(world, "two", "Reconciling")["reason"] == "WaitingForDrain"
    assert "run one" in condition(world, "two", "Reconciling")["message"]
    world.work(job)
    await world.settle()
    assert condition(world, "one", "Drained")["status"] == "True"
    assert phase(world, "two") == "Pending", "the clean-up still runs"
    (clean_up,) = world.active_jobs()
    world.work(clean_up)
    await world.settle()
    assert phase(world, "two") == "Running"
    await world.play()
    assert phase(world, "two") == "Succeeded"
    assert_alone(world)


@pytest.mark.parametrize("restarted", [False, True])
async def test_replace_cancels_the_older_and_starts_when_it_is_drained(world: World, restarted: bool) -> None:
    """After a restart the fence's label goes first: it must not be taken for somebody's request."""
    job = await start(world, "one", "Replace")
    if restarted:
        world.restart()
    create(world, "two", "Replace")
    await world.settle()
    record = status(world, "one")["cancellation"]
    assert phase(world, "one") == "Cancelled"
    assert record["reason"] == "replaced by two"
    assert record["requestedBy"] == "ingestrun-operator on behalf of run two"
    assert condition(world, "one", "Cancelled")["reason"] == "Replaced"
    assert condition(world, "one", "Succeeded")["reason"] == "Replaced"
    assert phase(world, "two") == "Pending"
    waiting = condition(world, "two", "Reconciling")
    assert waiting["reason"] == "WaitingForReplaced"
    assert "run one" in waiting["message"]
    told = [event for event in world.cluster.events() if event["reason"] == "WaitingForReplaced"]
    assert [(event["regarding"]["name"], event["note"]) for event in told] == [("two", waiting["message"])]
    assert jobs_of(world, "two") == []
    world.work(job)
    await world.settle()
    assert condition(world, "one", "Drained")["status"] == "True"
    assert phase(world, "two") == "Running"
    await world.play()
    assert phase(world, "two") == "Succeeded"
    assert_alone(world)


@pytest.mark.parametrize("state", ["suspended", "full", "retrying"])
@pytest.mark.parametrize("policy", [None, "Forbid", "Replace"])
async def test_replace_from_every_state_of_the_older(world: World, state: str, policy: str | None) -> None:
    if state == "full":
        world.cluster.job_quota["default"] = 0
    create(world, "one", policy, suspend=True if state == "suspended" else None)
    await world.settle()
    if state == "retrying":
        world.work(jobs_of(world, "one")[0], exit_code=1)
        await world.settle()
    create(world, "two", "Replace")
    await world.settle()
    assert phase(world, "one") == "Cancelled"
    world.cluster.job_quota.clear()
    await world.play()
    assert phase(world, "two") == "Succeeded"
    assert_alone(world)


async def test_three_in_a_row_only_the_newest_runs(world: World) -> None:
    job = await start(world, "one", "Replace")
    create(world, "two", "Replace")
    await world.settle()
    world.now += timedelta(seconds=5)
    create(world, "three", "Replace")
    await world.settle()
    assert [phase(world, name) for name in ("one", "two", "three")] == ["Cancelled", "Cancelled", "Pending"]
    assert status(world, "two")["cancellation"]["reason"] == "replaced by three"
    world.work(job)
    await world.play()
    assert phase(world, "three") == "Succeeded"
    assert jobs_of(world, "two") == []
    assert_alone(world)


async def test_newer_one_that_is_cancelled_or_suspended_first_replaces_nothing(world: World) -> None:
    await start(world, "one", "Replace")
    create(world, "two", "Replace", cancel=True)
    create(world, "three", "Replace", suspend=True)
    await world.settle()
    assert [phase(world, name) for name in ("one", "two", "three")] == ["Running", "Cancelled", "Suspended"]
    world.cluster.user_patch_spec(key("three"), {"suspend": None})
    await world.settle()
    assert (phase(world, "one"), phase(world, "three")) == ("Cancelled", "Pending")


async def test_newer_one_that_is_suspended_while_it_waits_replaces_nothing(world: World) -> None:
    await start(world, "one", "Replace")
    create(world, "two", "Replace")
    world.asked.pop(key("one"), None)
    await world.reconciler.reconcile(key("two"), "test")
    assert condition(world, "two", "Reconciling")["reason"] == "WaitingForReplaced"
    world.cluster.user_patch_spec(key("two"), {"suspend": True})
    await world.reconciler.reconcile(key("one"), "test")
    assert phase(world, "one") == "Running"


async def test_newer_one_that_is_cancelled_while_it_waits_starts_nothing(world: World) -> None:
    job = await start(world, "one", "Replace")
    create(world, "two", "Replace")
    await world.settle()
    world.cluster.user_patch_spec(key("two"), {"cancel": True})
    await world.settle()
    world.work(job)
    await world.play()
    assert (phase(world, "one"), phase(world, "two")) == ("Cancelled", "Cancelled")
    assert jobs_of(world, "two") == []


async def test_no_run_is_cancelled_for_one_that_the_server_knows_to_be_cancelled(world: World) -> None:
    """The watch has not shown yet that the newer one does not wait any more: it is read first."""
    await start(world, "one", "Replace")
    create(world, "two", "Replace")
    world.asked.pop(key("one"), None)
    while "conditions" not in status(world, "two"):
        assert await world.reconciler.reconcile(key("two"), "test") is None
    assert world.asked.keys() >= {key("one")}
    world.deaf.add("IngestRun")
    world.cluster.user_patch_spec(key("two"), {"cancel": True})
    await world.reconciler.reconcile(key("one"), "test")
    assert phase(world, "one") == "Running"


async def test_forbid_while_another_waits_for_a_replace(world: World) -> None:
    job = await start(world, "one", "Replace")
    create(world, "two", "Replace")
    await world.settle()
    create(world, "three", "Forbid")
    await world.settle()
    assert phase(world, "three") == "Failed"
    assert "run two" in condition(world, "three", "Succeeded")["message"]
    world.work(job)
    await world.play()
    assert phase(world, "two") == "Succeeded"


async def test_deleted_run_makes_room(world: World) -> None:
    await start(world, "one", "Replace")
    create(world, "two", "Replace")
    await world.settle()
    world.cluster.user_delete_run(key("one"))
    await world.play()
    assert phase(world, "two") == "Succeeded"


async def test_run_without_a_key_costs_no_call(world: World) -> None:
    world.create(batches={"partitions": {"count": 1}}, hooks=None)
    await world.play()
    assert world.phase == "Succeeded"
    plain = len(world.cluster.history)
    assert world.cluster.calls("list", "ingestruns") == []
    other = World()
    create(other, "one", "Forbid")
    await other.play()
    assert len(other.cluster.history) == plain + 1


async def test_claim_whose_answer_was_lost_holds_the_others_back(world: World) -> None:
    """It may still arrive at the server: until that is settled no other run of the key begins."""
    world.cluster._uid = descending()  # type: ignore[method-assign]
    create(world, "two", "Forbid")
    late = Unknown("no answer")
    world.cluster.fail_next("patch", "ingestruns/status", late, when="late", match=lambda call: call.name == "two")
    with pytest.raises(KubeError):
        await world.reconciler.reconcile(key("two"), "test")
    create(world, "one", "Forbid")
    assert ConcurrentRun.read(world.cluster.run(key("one"))).uid < ConcurrentRun.read(world.cluster.run(key("two"))).uid
    with pytest.raises(Unavailable, match="what run two has written, which concerns this one, is not known yet"):
        await world.reconciler.reconcile(key("one"), "test")
    world.cluster.deliver_late()
    await world.play()
    assert phase(world, "two") == "Succeeded"
    assert_alone(world)


# ---- every interleaving -------------------------------------------------------------------------------------------


async def finish(world: World) -> None:
    """Play on to the end; a Job's pod may have been deleted meanwhile."""
    await world.play(rounds=300)


async def length_of(policies: tuple[str, str]) -> int:
    world = World()
    create(world, "one", policies[0])
    create(world, "two", policies[1])
    await finish(world)
    return len(world.cluster.history)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("policy", ["Forbid", "Replace"])
async def test_killed_around_every_call_only_one_runs(policy: str, stage: str) -> None:
    for number in range(await length_of((policy, policy))):
        world = World()
        create(world, "one", policy)
        create(world, "two", policy)

        async def on_call(call: Call, world: World = world, number: int = number) -> None:
            if call.index == number and call.stage == stage:
                world.cluster.on_call = None
                world.restart()
                raise Killed

        world.cluster.on_call = on_call
        await finish(world)
        assert_alone(world)
        assert_one_done(world, policy)


def assert_one_done(world: World, policy: str) -> None:
    ends = sorted(str(phase(world, name)) for name in ("one", "two"))
    assert ends in (["Failed", "Succeeded"] if policy == "Forbid" else ["Cancelled", "Succeeded"], ["Succeeded"] * 2)


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("policy", ["Forbid", "Replace"])
async def test_second_created_around_every_call_of_the_first(policy: str, stage: str) -> None:
    """In the same second, with a UID that is smaller or greater: whichever comes first in the order."""
    world = World()
    create(world, "one", policy)
    await finish(world)
    for number in range(len(world.cluster.history)):
        for smaller in (False, True):
            world = World()
            if smaller:
                world.cluster._uid = descending()  # type: ignore[method-assign]
            create(world, "one", policy)
            at_call(world, number, stage, partial(create, world, "two", policy))
            await finish(world)
            assert_alone(world)
            if phase_or_none(world, "two") is not None:
                assert_one_done(world, policy)


def descending() -> Callable[[], str]:
    """UIDs that go down, so that of the runs of one second the later one comes first in the order."""
    left = iter(range(10**6, 0, -1))

    def uid() -> str:
        return f"00000000-0000-3000-8000-{next(left):012x}"

    return uid


def phase_or_none(world: World, name: str) -> str | None:
    try:
        return phase(world, name)
    except NotFound:
        return None


def at_call(world: World, number: int, stage: str, act: Callable[[], object]) -> None:
    async def on_call(call: Call) -> None:
        if call.index == number and call.stage == stage:
            world.cluster.on_call = None
            act()

    world.cluster.on_call = on_call


@pytest.mark.parametrize("stage", ["before", "after"])
@pytest.mark.parametrize("policy", ["Forbid", "Replace"])
async def test_whole_pass_of_a_second_within_a_call_of_the_first(policy: str, stage: str) -> None:
    """The second comes first in the order, and gets as far as it can while the first one's call is under way."""
    for number in range(12):
        world = World()
        world.cluster._uid = descending()  # type: ignore[method-assign]
        create(world, "one", policy)
        passes: list[asyncio.Task[float | None]] = []

        async def on_call(
            call: Call, world: World = world, number: int = number, passes: list[asyncio.Task[float | None]] = passes
        ) -> None:
            if call.index == number and call.stage == stage:
                world.cluster.on_call = None
                create(world, "two", policy)
                passes.append(asyncio.ensure_future(world.reconciler.reconcile(key("two"), "test")))
                for _ in range(200):
                    await asyncio.sleep(0)

        world.cluster.on_call = on_call
        await world.reconciler.reconcile(key("one"), "test")
        world.cluster.on_call = None
        await asyncio.gather(*passes)
        await finish(world)
        assert_alone(world)
        if passes:
            assert_one_done(world, policy)
    assert not passes, "there are more calls than were tried"


class Scheduler:
    """Lets the calls of passes that are under way at once through one at a time, in the order that `choices` say."""

    def __init__(self, world: World, choices: list[int]) -> None:
        self.waiting: list[asyncio.Event] = []
        self.choices = iter(choices)
        world.cluster.on_call = self.on_call

    async def on_call(self, call: Call) -> None:
        gate = asyncio.Event()
        self.waiting.append(gate)
        await gate.wait()

    async def run(self, *passes: Awaitable[object]) -> None:
        tasks = [asyncio.ensure_future(each) for each in passes]
        while not all(task.done() for task in tasks):
            for _ in range(8):
                await asyncio.sleep(0)
            if self.waiting:
                self.waiting.pop(next(self.choices, 0) % len(self.waiting)).set()
        for task in tasks:
            error = task.exception()
            assert error is None or isinstance(error, KubeError), error


@settings(max_examples=100, deadline=None)
@given(
    choices=st.lists(st.integers(0, 2), max_size=60),
    policies=st.tuples(*[st.sampled_from(["Forbid", "Replace"])] * 3),
    down=st.booleans(),
)
def test_passes_interleaved_call_by_call_only_one_runs(
    choices: list[int], policies: tuple[str, ...], down: bool
) -> None:
    async def scenario() -> None:
        world = World()
        names = ("one", "two", "three")
        if down:
            world.cluster._uid = descending()  # type: ignore[method-assign]
        for name, policy in zip(names, policies, strict=True):
            body = create(world, name, policy)
            assert body
        world.asked.clear()
        scheduler = Scheduler(world, choices)
        for _ in range(2):
            await scheduler.run(*(world.reconciler.reconcile(key(name), "test") for name in names))
        world.cluster.on_call = None
        for name in names:
            world.asked[key(name)] = "test"
        await finish(world)
        assert_alone(world)
        ends = [phase(world, name) for name in names]
        assert ends.count("Succeeded") >= 1
        assert set(ends) <= {"Succeeded", "Failed", "Cancelled"}

    asyncio.run(scenario())


ACTIONS = st.one_of(
    st.tuples(st.just("create"), st.sampled_from(["Allow", "Forbid", "Replace", "Replace"])),
    st.tuples(st.sampled_from(["cancel", "suspend", "resume", "delete"]), st.integers(0, 5)),
    st.tuples(st.sampled_from(["work", "fail", "restart", "wait", "step", "settle"]), st.none()),
)


def act(world: World, action: str, what: Any, made: list[str]) -> None:
    """One thing that users, the kubelet or fate do; what is refused or impossible is left out."""
    if action == "create":
        made.append(f"run-{len(made)}")
        create(world, made[-1], what, onCancel={"image": "example/clean:1"} if len(made) % 2 else None)
    elif action == "restart":
        world.restart()
    elif action == "wait":
        world.now += timedelta(seconds=7)
    elif action in ("work", "fail"):
        for job in world.active_jobs()[:1]:
            world.work(job, **({"exit_code": 1} if action == "fail" else {}))
    elif made and phase_or_none(world, made[what % len(made)]) not in ("Succeeded", "Failed"):
        name = key(made[what % len(made)])
        patch: dict[str, dict[str, Any]] = {
            "cancel": {"cancel": True},
            "suspend": {"suspend": True},
            "resume": {"suspend": None},
        }
        with suppress(NotFound):
            if action == "delete":
                world.cluster.user_delete_run(name)
            else:
                world.cluster.user_patch_spec(name, patch[action])


@settings(max_examples=50, deadline=None)
@given(actions=st.lists(ACTIONS, min_size=4, max_size=40))
def test_whatever_users_do_runs_of_a_key_never_overlap_and_all_end(actions: list[tuple[str, Any]]) -> None:
    async def scenario() -> None:
        world = World()
        made: list[str] = []
        for action, what in actions:
            if action == "step":
                await world.step()
            elif action == "settle":
                await world.settle()
            else:
                act(world, action, what, made)
        for name in made:
            with suppress(NotFound):
                world.cluster.user_patch_spec(key(name), {"suspend": None})
        await finish(world)
        assert_alone(world)
        ends = {name: phase_or_none(world, name) for name in made}
        assert set(ends.values()) <= {"Succeeded", "Failed", "Cancelled", None}, ends

    asyncio.run(scenario())
