"""A run that does the rest of an ended one: nothing is lost or doubled, and what can't be done is refused at once."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from random import Random
from typing import Any

import pytest
from tests.fakes.world import KEY, Source, World, environment, manifest

from ingestrun.kube.errors import KubeError, Unknown
from ingestrun.kube.protocol import Object, RunKey
from ingestrun.model.ranges import IndexRanges

PAGE = 70
"""Where the source's pages end: a fetch may return less than it was asked for."""


@dataclass(frozen=True)
class Published:
    key: str
    run_uid: str
    batch: int
    start: int
    read: int
    rejected: int


@dataclass
class Records(Source):
    """A source of numbered records, told apart one by one. Every third batch has a row that the hook rejects."""

    log: list[Published] = field(default_factory=list)
    held: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)

    def run(self, job: Object) -> dict[str, Any]:
        env = environment(job)
        stage, place = env["INGEST_STAGE"], (env["INGEST_RUN_UID"], env["INGEST_BATCH"])
        batch = int(env["INGEST_BATCH"])
        more: dict[str, Any] = {}
        if stage == "fetch" and "INGEST_PARTITIONS" in env:
            self.held[place] = (10 * batch, 10)
            more = {"exhausted": True}
        elif stage == "fetch":
            start = int(env["INGEST_CURSOR"] or 0)
            read = min(int(env["INGEST_LIMIT"]), self.total - start, PAGE - start % PAGE)
            self.held[place] = (start, read)
            more = {"nextCursor": str(start + read), "exhausted": start + read >= self.total}
        start, read = self.held[place]
        rejected = 1 if batch % 3 == 0 and read else 0
        if stage == "hook":
            more = {"written": read - rejected, "rejected": rejected}
        if stage == "publish":
            self.log.append(Published(env["INGEST_IDEMPOTENCY_KEY"], place[0], batch, start, read, rejected))
            read -= rejected
        return {"v": "v1", "outcome": "done", "read": read, "written": read, "rejected": 0, **more}


class Runs(World):
    """Several runs in one world."""

    def __init__(self) -> None:
        super().__init__()
        self.source: Records = Records()

    def begin(self, name: str, *, after: str | None = None, saved: dict[str, Any] | None = None, **spec: Any) -> Object:
        if after is not None:
            spec["resumeFrom"] = {"name": after}
        if saved is not None:
            spec["resumeFrom"] = {"savedState": saved}
        body = manifest(**spec)
        return self.cluster.user_create_run({**body, "metadata": {"name": name, "namespace": KEY.namespace}})

    def of(self, name: str) -> dict[str, Any]:
        status: dict[str, Any] = self.cluster.run(key(name))["status"]
        return status

    def stop(self, name: str) -> None:
        self.cluster.user_patch_spec(key(name), {"cancel": True})

    def says(self, name: str, kind: str = "Succeeded") -> tuple[str, str]:
        found = next(c for c in self.of(name)["conditions"] if c["type"] == kind)
        return found["reason"], found["message"]

    def jobs_of(self, name: str) -> list[Object]:
        uid = self.cluster.run(key(name))["metadata"]["uid"]
        return [job for job in self.cluster.jobs() if job["metadata"]["labels"]["ingestrun.dev/run-uid"] == uid]

    async def until_published(self, name: str, number: int, **how: Any) -> None:
        """Play until the run has that many batches published."""
        for _ in range(200):
            await self.settle()
            if len(IndexRanges.parse(self.of(name)["batches"]["published"])) >= number:
                return
            self.work(self.active_jobs()[0], **how)
        raise AssertionError(self.of(name))


def key(name: str) -> RunKey:
    return RunKey(namespace=KEY.namespace, name=name)


@pytest.fixture
def runs() -> Runs:
    return Runs()


def saved_state(body: Object) -> dict[str, Any]:
    """As the jq line of docs/resume.md makes it."""
    status = body["status"]
    batches = {name: status["batches"][name] for name in ("fetched", "published", "exhausted", "unpublished")}
    uid = status.get("resumedFrom", {}).get("originUid") or body["metadata"]["uid"]
    state = {"uid": uid, "batches": batches, "records": status["records"]}
    return state | {name: status[name] for name in ("cursor", "afterEnd") if name in status}


def left_of(state: dict[str, Any]) -> Any:
    late = IndexRanges.parse(state.get("afterEnd", {}).get("published", ""))
    batches = state["batches"]
    return (
        IndexRanges.parse(batches["published"]) | late,
        batches["unpublished"],
        batches["exhausted"],
        state.get("cursor"),
    )


FATES = ["done", "done", "done", "done", "fail", "permanent", "garbage", "missing", "deleted", "deadline"]


def meet(world: Runs, job: Object, fate: str) -> None:
    name = job["metadata"]["name"]
    if fate == "deleted":
        world.cluster.expire_job(name)
    elif fate == "deadline":
        world.cluster.exceed_deadline(name)
    elif fate == "done":
        world.work(job)
    else:
        if fate == "missing" and environment(job)["INGEST_STAGE"] == "publish":
            world.source.run(job)  # it has published, and nobody will know
        how: dict[str, dict[str, Any]] = {
            "fail": {"exit_code": 1},
            "permanent": {"exit_code": 65},
            "garbage": {"result": "<html>"},
            "missing": {"result": ""},
        }
        world.work(job, **how[fate])


async def one_run(world: Runs, name: str, random: Random, *, steps: int | None) -> None:
    """Let chance work on the run; after `steps` it is cancelled, with some of its pods started. Until it is drained."""
    for step in range(600):
        if random.random() < 0.05:
            world.restart()
        await world.settle()
        assert len(json.dumps(world.cluster.run(key(name)))) < 16 * 1024
        phase = world.of(name).get("phase")
        jobs = world.active_jobs()
        if step == steps and phase not in ("Succeeded", "Failed"):
            for job in jobs:
                if random.random() < 0.7:
                    world.cluster.start_pod(job["metadata"]["name"])
            world.stop(name)
        elif jobs:
            job = random.choice(jobs)
            ours = job["metadata"]["ownerReferences"][0]["name"] == name
            meet(world, job, random.choice(FATES) if ours and steps is not None else "done")
        elif world.due:
            world.now = max(world.now, min(world.due.values()))
        if ended(world, name):
            return
    else:
        raise AssertionError(f"no end: {world.of(name)}")


def ended(world: Runs, name: str) -> bool:
    return any(c["type"] == "Drained" and c["status"] == "True" for c in world.of(name).get("conditions", ()))


@pytest.mark.parametrize("seed", range(40))
async def test_every_record_is_published_once_however_often_a_run_is_cut_off_and_resumed(seed: int) -> None:
    await cut_off_and_resumed(Random(seed))


async def cut_off_and_resumed(random: Random) -> None:
    world = Runs()
    partitions, saved, early = random.random() < 0.4, random.random() < 0.4, random.random() < 0.5
    limit = random.choice([None, random.randint(1, 500)]) if not partitions else None
    batches: dict[str, Any] = {"partitions": {"count": 7}} if partitions else {"cursor": {}, "size": 60}
    if limit is not None:
        batches["limit"] = limit
    policy = random.choice(["FailRun", "Continue"])
    spec: dict[str, Any] = {"batches": batches, "onBatchFailure": policy, "retries": 1, "parallelism": 3}
    world.begin("run-0", **spec)
    last, before = "run-0", None
    cuts = [*(random.randint(0, 30) for _ in range(random.randint(1, 3))), None]
    for number, cut in enumerate(cuts):
        name, following = f"run-{number}", f"run-{number + 1}"
        if early and not saved and cut is not None:
            world.begin(following, after=name, **spec)
        await one_run(world, name, random, steps=cut)
        if world.says(name)[0] == "ResumeRefused":
            assert "nothing is left" in world.says(name)[1], world.says(name)
            break
        last = name
        if cut is not None and saved:
            state = saved_state(world.cluster.run(key(name)))
            # The first one's UID is asked for in the end; of two that ended alike it can't be told whose state it is.
            if number > 0 and random.random() < 0.5 and left_of(state) != before:
                world.cluster.user_delete_run(key(name))
            before = left_of(state)
            world.begin(following, saved=state, **spec)
        elif cut is not None and not early:
            world.begin(following, after=name, **spec)
    judge_end(world, last, expected=70 if partitions else min(limit or 450, 450))


def judge_end(world: Runs, last: str, *, expected: int) -> None:
    """Every record under one key, none under two, and the counts say so; nothing published was published again."""
    spans: dict[str, set[tuple[int, int]]] = {}
    for entry in world.source.log:
        spans.setdefault(entry.key, set()).add((entry.start, entry.read))
    assert all(len(found) == 1 for found in spans.values()), spans
    assert {key.partition("/")[0] for key in spans} == {world.cluster.run(key("run-0"))["metadata"]["uid"]}
    position = 0
    for start, read in sorted(span for found in spans.values() for span in found):
        assert start == position, sorted(spans.items(), key=str)
        position += read
    assert position == expected
    rejected = sum({entry.key: entry.rejected for entry in world.source.log}.values())
    status = world.of(last)
    late = status.get("afterEnd", {}).get("records", {"published": 0, "rejected": 0})
    assert status["records"]["fetched"] == expected
    assert status["records"]["published"] + late["published"] == expected - rejected
    assert status["records"]["rejected"] + late["rejected"] == rejected
    begun: dict[str, IndexRanges] = {}
    for change in world.cluster.changes:
        status = change.obj.get("status") or {}
        if change.kind == "IngestRun" and "resumedFrom" in status:
            published = IndexRanges.parse(status["batches"]["published"])
            begun.setdefault(change.obj["metadata"]["uid"], published)
    repeated = [entry for entry in world.source.log if entry.batch in begun.get(entry.run_uid, IndexRanges())]
    assert repeated == []


async def test_gaps_of_a_chain_are_done_again_and_then_the_chain_goes_on(runs: Runs) -> None:
    """0-3 and 5 are published, 4 has failed, and the chain stands behind 5."""
    runs.begin("old", batches={"cursor": {}, "size": 100}, onBatchFailure="Continue", retries=0, parallelism=3)
    while runs.of("old").get("batches", {}).get("published") != "0-3,5":
        await runs.settle()
        job = min(runs.active_jobs(), key=lambda job: int(environment(job)["INGEST_BATCH"]))
        env = environment(job)
        broken = env["INGEST_BATCH"] == "4" and env["INGEST_STAGE"] == "hook"
        runs.work(job, **({"exit_code": 65} if broken else {}))
        await runs.settle()
    (gap,) = [gap for gap in runs.of("old")["batches"]["unpublished"] if gap["batch"] == 4]
    runs.stop("old")
    await runs.play()
    before = runs.of("old")["records"]
    runs.begin("new", after="old", batches={"cursor": {}, "size": 100}, parallelism=1)
    await runs.settle()
    (again,) = runs.jobs_of("new")
    told = environment(again)
    origin = runs.cluster.run(key("old"))["metadata"]["uid"]
    assert (told["INGEST_BATCH"], told["INGEST_STAGE"]) == ("4", "fetch")
    assert (told["INGEST_CURSOR"], told["INGEST_LIMIT"]) == (gap["cursor"], str(gap["read"])) == ("280", "70")
    assert told["INGEST_IDEMPOTENCY_KEY"] == f"{origin}/4"
    assert told["INGEST_RUN_UID"] != origin
    assert runs.of("new")["records"] == before
    await runs.play()
    assert runs.says("new")[0] == "Completed"
    assert runs.of("new")["batches"]["unpublished"] == []
    assert runs.of("new")["records"]["fetched"] == 450
    judge_end_of(runs, "old", "new", expected=450)


def judge_end_of(world: Runs, first: str, last: str, *, expected: int) -> None:
    origin = world.cluster.run(key(first))["metadata"]["uid"]
    spans = sorted({(entry.start, entry.read) for entry in world.source.log})
    assert {entry.key.partition("/")[0] for entry in world.source.log} == {origin}
    assert sum(read for _, read in spans) == expected
    assert len(spans) == len({entry.key for entry in world.source.log}) == len(world.source.log)
    assert world.of(last)["phase"] == "Succeeded"


async def test_waits_until_the_other_has_ended_and_its_last_pod_too(runs: Runs) -> None:
    parts = {"partitions": {"count": 4}}
    runs.begin("old", batches=parts, parallelism=2)
    await runs.until_published("old", 1)
    runs.begin("new", after="old", batches=parts)
    await runs.settle()
    assert runs.of("new")["phase"] == "Pending"
    assert runs.says("new") == ("WaitingForEnd", "run old, which this one resumes, has not ended: cancel it, or wait")
    held = runs.active_jobs()[0]
    runs.cluster.start_pod(held["metadata"]["name"])
    runs.stop("old")
    await runs.settle()
    assert runs.says("new", "Reconciling")[0] == "WaitingForDrain"
    assert runs.jobs_of("new") == []
    assert "resumedBy" not in runs.of("old")
    runs.work(held)
    runs.now = min(runs.due.values())
    await runs.play()
    assert runs.of("new")["phase"] == "Succeeded"
    assert runs.of("new")["batches"]["progress"] == "4/4"
    assert runs.of("old")["resumedBy"]["name"] == "new"
    judge_end_of(runs, "old", "new", expected=40)


async def test_a_batch_that_landed_after_a_failure_is_not_done_again(runs: Runs) -> None:
    """A Failed run's last pods may finish as well as a cancelled one's."""
    parts = {"partitions": {"count": 3}}
    runs.begin("old", batches=parts, parallelism=2, retries=0)
    await runs.settle()
    for _ in range(2):  # batch 0 to its publish
        job = next(job for job in runs.active_jobs() if environment(job)["INGEST_BATCH"] == "0")
        runs.work(job)
        await runs.settle()
    publish = next(job for job in runs.active_jobs() if environment(job)["INGEST_STAGE"] == "publish")
    runs.cluster.start_pod(publish["metadata"]["name"])
    runs.work(next(job for job in runs.active_jobs() if environment(job)["INGEST_BATCH"] == "1"), exit_code=65)
    await runs.settle()
    assert runs.of("old")["phase"] == "Failed"
    runs.work(publish)
    await runs.play()
    assert runs.of("old")["afterEnd"] == {"published": "0", "records": {"rejected": 1, "published": 9}}
    assert runs.of("old")["records"]["published"] == 0
    runs.begin("new", after="old", batches=parts)
    await runs.play()
    assert runs.of("new")["records"] == {"fetched": 30, "rejected": 1, "published": 29}
    judge_end_of(runs, "old", "new", expected=30)


async def cut(runs: Runs, name: str = "old", **spec: Any) -> None:
    """A run that was cancelled with one of its batches published."""
    runs.begin(name, **{"batches": {"cursor": {}, "size": 60}, **spec})
    await runs.until_published(name, 1)
    runs.stop(name)
    await runs.play()
    assert ended(runs, name)


async def test_only_one_run_resumes_another_and_that_one_is_resumed_next(runs: Runs) -> None:
    await cut(runs)
    batches = {"cursor": {}, "size": 60}
    runs.begin("first", after="old", batches=batches)
    runs.begin("second", after="old", batches=batches)
    await runs.settle()
    phases = {name: runs.of(name)["phase"] for name in ("first", "second")}
    assert sorted(phases.values()) == ["Failed", "Running"]
    winner, loser = sorted(phases, key=lambda name: phases[name], reverse=True)
    assert runs.says(loser)[0] == "ResumeRefused"
    assert f"is already resumed by run {winner}" in runs.says(loser)[1]
    assert runs.jobs_of(loser) == []
    runs.stop(winner)
    await runs.play()
    runs.begin("third", after=winner, batches=batches)
    await runs.play()
    assert runs.of("third")["resumedFrom"]["name"] == winner
    judge_end_of(runs, "old", "third", expected=450)


async def test_a_claim_that_a_cancel_kept_from_being_used_is_let_go(runs: Runs) -> None:
    await cut(runs)
    batches = {"cursor": {}, "size": 60}
    runs.begin("first", after="old", batches=batches)
    while "resumedBy" not in runs.of("old"):
        runs.cluster.on_call = stopping(runs, "first", after="old")
        await runs.settle()
    runs.cluster.on_call = None
    await runs.play()
    assert runs.of("first")["phase"] == "Cancelled"
    assert "resumedFrom" not in runs.of("first")
    runs.begin("wrong", after="first", batches=batches)
    await runs.settle()
    assert runs.says("wrong")[1] == ("run first ended before it had taken anything over: resume from run old instead")
    runs.begin("second", after="old", batches=batches)
    await runs.play()
    assert runs.of("old")["resumedBy"]["name"] == "second"
    judge_end_of(runs, "old", "second", expected=450)


def stopping(runs: Runs, name: str, *, after: str) -> Any:
    """Cancel the run right after its claim was put into the other one."""

    async def on_call(call: Any) -> None:
        if call.stage == "after" and call.resource == "ingestruns/status" and call.name == after:
            runs.stop(name)

    return on_call


async def test_dying_or_an_answer_lost_at_any_call_changes_nothing(runs: Runs) -> None:
    """Each call of a take-over in turn is the last of its process, or is answered by nobody."""
    number, calls = 0, 1
    while number < calls:
        world = Runs()
        await cut(world)
        seen = 0

        async def on_call(call: Any) -> None:
            nonlocal seen
            if call.stage == "before":
                seen += 1
            if seen == number + 1 and call.stage == ("before" if number % 2 else "after"):  # noqa: B023
                seen += 1
                raise Unknown("no answer")

        world.cluster.on_call = on_call
        world.begin("new", after="old", batches={"cursor": {}, "size": 60})
        begun = len(world.cluster.history)
        for _ in range(20):
            try:
                if not await world.step():
                    break
            except KubeError:
                world.restart()
            if seen > number:
                world.restart()
        calls = len(world.cluster.history) - begun
        world.cluster.on_call = None
        await world.play()
        judge_end_of(world, "old", "new", expected=450)
        number += 1
    assert number > 5


OWN = {"image": "example/worker:1"}
SOURCE = {"http": {"url": "https://example.org/a", "pagination": {"page": {}}}}
BUILT_IN: dict[str, Any] = {
    "fetch": None,
    "publish": None,
    "source": SOURCE,
    "sink": {"parquet": {"path": "out"}},
    "workspace": {"persistentVolumeClaim": {"claimName": "ingest"}},
}


@pytest.mark.parametrize(
    ("old", "new", "field"),
    [
        ({}, {"batches": {"partitions": {"count": 9}}}, "batches.cursor"),
        ({}, {"batches": {"cursor": {"start": "7"}, "size": 60}}, "batches.cursor.start"),
        ({}, {"fetch": {"image": "example/other:1"}}, "fetch.image"),
        ({}, {"fetch": {**OWN, "env": [{"name": "A", "value": "1"}]}}, "fetch.env"),
        ({}, {"publish": {**OWN, "args": ["--to=elsewhere"]}}, "publish.args"),
        ({}, {**BUILT_IN, "publish": OWN, "sink": None}, "fetch"),
        (BUILT_IN, {**BUILT_IN, "source": {"http": {**SOURCE["http"], "url": "https://b"}}}, "source.http.url"),
        (BUILT_IN, {**BUILT_IN, "sink": {"parquet": {"path": "elsewhere"}}}, "sink.parquet.path"),
    ],
)
async def test_runs_that_do_not_read_and_publish_the_same_are_refused(
    runs: Runs, old: dict[str, Any], new: dict[str, Any], field: str
) -> None:
    await cut(runs, **old)
    runs.begin("new", after="old", **{"batches": {"cursor": {}, "size": 60}, **new})
    await runs.play()
    assert runs.of("new")["phase"] == "Failed"
    assert runs.says("new") == (
        "ResumeRefused",
        f"spec.{field} is not that of run old: a resumed run reads and publishes the same",
    )
    assert runs.jobs_of("new") == []
    assert "resumedBy" not in runs.of("old")


async def test_what_may_be_why_the_old_run_failed_can_be_mended(runs: Runs) -> None:
    await cut(runs, **BUILT_IN)
    mended = {
        **BUILT_IN,
        "source": {"http": {**SOURCE["http"], "timeoutSeconds": 300}, "resources": {"limits": {"memory": "4Gi"}}},
        "hooks": [{"name": "mended", "container": OWN}],
        "batches": {"cursor": {}, "size": 30},
    }
    runs.begin("new", after="old", **mended)
    await runs.play()
    assert runs.of("new")["phase"] == "Succeeded"
    assert runs.of("new")["records"]["fetched"] == 450


async def test_a_larger_limit_goes_on_where_a_run_has_succeeded(runs: Runs) -> None:
    runs.begin("old", batches={"cursor": {}, "size": 60, "limit": 100})
    await runs.play()
    assert runs.of("old")["phase"] == "Succeeded"
    runs.begin("same", after="old", batches={"cursor": {}, "size": 60, "limit": 100})
    await runs.settle()
    assert runs.says("same") == (
        "ResumeRefused",
        "nothing is left of run old: 3 batches are published, and none is missing",
    )
    runs.begin("more", after="old", batches={"cursor": {}, "size": 60, "limit": 250})
    await runs.play()
    assert runs.of("more")["records"]["fetched"] == 250
    judge_end_of(runs, "old", "more", expected=250)


async def test_a_run_that_is_not_there_cannot_be_resumed(runs: Runs) -> None:
    runs.begin("new", after="gone", batches={"cursor": {}})
    await runs.settle()
    assert runs.of("new")["phase"] == "Failed"
    assert runs.says("new")[0] == "ResumeSourceNotFound"
    assert runs.jobs_of("new") == []


async def test_two_runs_that_wait_for_each_other_are_refused(runs: Runs) -> None:
    runs.begin("one", after="two", batches={"cursor": {}})
    runs.begin("two", after="one", batches={"cursor": {}})
    await runs.play()
    assert {runs.of(name)["phase"] for name in ("one", "two")} == {"Failed"}
    assert "is itself to resume this one" in runs.says("two")[1] + runs.says("one")[1]
    assert runs.cluster.jobs() == []


async def test_saved_state_does_without_the_old_run(runs: Runs) -> None:
    await cut(runs)
    body = runs.cluster.run(key("old"))
    runs.cluster.user_delete_run(key("old"))
    runs.begin("new", saved=saved_state(body), batches={"cursor": {}, "size": 60})
    await runs.play()
    assert runs.of("new")["phase"] == "Succeeded"
    assert runs.of("new")["resumedFrom"] == {"originUid": body["metadata"]["uid"]}
    assert {entry.key.partition("/")[0] for entry in runs.source.log} == {body["metadata"]["uid"]}
    assert runs.of("new")["records"]["fetched"] == sum(entry.read for entry in runs.source.log) == 450


@pytest.mark.parametrize(
    ("batches", "state", "sentence"),
    [
        ("chain", {"batches": {"published": "0-3"}}, "the saved state has no cursor: copy it as well"),
        ("chain", {"cursor": "9", "batches": {"fetched": "0-5", "published": "0-3,5"}}, "where batch 4 of the saved"),
        ("chain", {"cursor": "9", "batches": {"published": "3,1"}}, "batches.published of the saved state: the index"),
        ("chain", {"batches": {"unpublished": [{"batch": 1, "read": 5}] * 2}}, "the saved state has a batch twice"),
        ("parts", {"batches": {"published": "0-6"}}, "nothing is left of the saved state: 7 batches are published"),
        ("parts", {"batches": {"published": "0-7"}}, "the saved state has batch 7, and this run has 7 batches"),
        ("parts", {"cursor": "9"}, "the saved state is that of a cursor chain, and this run has partitions"),
        ("parts", {"afterEnd": {"published": "1-0"}}, "afterEnd.published of the saved state: the index ranges"),
    ],
)
async def test_a_saved_state_that_does_not_fit_is_refused(
    runs: Runs, batches: str, state: dict[str, Any], sentence: str
) -> None:
    cutting: dict[str, Any] = {"cursor": {}} if batches == "chain" else {"partitions": {"count": 7}}
    runs.begin("new", saved={"uid": "abc", **state}, batches=cutting)
    await runs.settle()
    assert runs.says("new")[0] == "ResumeRefused"
    assert runs.says("new")[1].startswith(sentence)
    assert runs.cluster.jobs() == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"read": 59, "written": 59}, "read 59 records where the run that is resumed read 60"),
        ({"nextCursor": "61"}, "ended at another cursor than in the run that is resumed"),
    ],
)
async def test_a_gap_that_no_longer_ends_where_the_next_batch_began_is_not_published(
    runs: Runs, changed: dict[str, Any], what: str
) -> None:
    runs.begin("old", batches={"cursor": {}, "size": 60}, parallelism=3)
    await runs.settle()
    runs.work(runs.active_jobs()[0])
    await runs.settle()
    runs.stop("old")
    await runs.play()
    runs.begin("new", after="old", batches={"cursor": {}, "size": 60}, onBatchFailure="Continue")

    def each(job: Object) -> dict[str, Any]:
        env = environment(job)
        if (env["INGEST_BATCH"], env["INGEST_STAGE"]) != ("0", "fetch"):
            return {}
        return {"result": json.dumps({**runs.source.run(job), **changed})}

    await runs.play(each=each)
    assert runs.says("new")[0] == "CompletedWithFailedBatches"
    assert runs.of("new")["batches"]["failed"] == "0"
    assert runs.of("new")["failures"][0]["reason"] == "SourceChanged"
    assert what in runs.of("new")["failures"][0]["message"]
    assert 0 not in {entry.batch for entry in runs.source.log}


async def test_gaps_beyond_the_room_make_a_resume_refused_never_a_loss(runs: Runs) -> None:
    """Cursors of the greatest length, and all that is fetched stays in flight."""
    runs.begin("old", batches={"cursor": {}, "size": 1}, parallelism=20)
    for number in range(12):
        await runs.settle()
        fetch = next(job for job in runs.active_jobs() if environment(job)["INGEST_STAGE"] == "fetch")
        cursor = f"{number:03d}" + "c" * 509
        runs.work(
            fetch, result=json.dumps({"v": "v1", "outcome": "done", "read": 1, "written": 1, "nextCursor": cursor})
        )
    await runs.settle()
    gaps = runs.of("old")["batches"]["unpublished"]
    assert [gap["batch"] for gap in gaps] == list(range(6))
    runs.stop("old")
    await runs.play()
    runs.begin("new", after="old", batches={"cursor": {}, "size": 1})
    await runs.settle()
    assert runs.says("new")[0] == "ResumeRefused"
    assert runs.says("new")[1].startswith("where batch 6-11 of run old began is not known")
    assert runs.jobs_of("new") == []


async def test_suspended_at_creation_takes_nothing_over(runs: Runs) -> None:
    await cut(runs)
    runs.begin("new", after="old", suspend=True, batches={"cursor": {}, "size": 60})
    await runs.play()
    assert runs.of("new")["phase"] == "Suspended"
    assert "resumedBy" not in runs.of("old")
    runs.cluster.user_patch_spec(key("new"), {"suspend": None})
    await runs.play()
    judge_end_of(runs, "old", "new", expected=450)


async def test_a_take_over_costs_two_reads_and_one_write_more(runs: Runs) -> None:
    await cut(runs)
    before = len(runs.cluster.history)
    runs.begin("new", after="old", batches={"cursor": {}, "size": 60})
    await runs.settle()
    first = [call for call in runs.cluster.history[before:] if call.name == "old"]
    calls = [("get", "ingestruns"), ("patch", "ingestruns/status"), ("get", "ingestruns")]
    assert [(call.verb, call.resource) for call in first] == calls
    await runs.play()
    assert [call for call in runs.cluster.history[before:] if call.name == "old"] == first
    without = Runs()
    without.create()
    await without.settle()
    assert without.cluster.calls("get", "ingestruns") == []


async def test_what_is_done_again_keeps_to_the_parallelism(runs: Runs) -> None:
    parts = {"partitions": {"count": 9}}
    runs.begin("old", batches=parts, parallelism=6, retries=0, onBatchFailure="Continue")
    await runs.settle()
    for job in runs.active_jobs()[:4]:
        runs.work(job, exit_code=65)
    await runs.settle()
    runs.stop("old")
    await runs.play()
    assert len(IndexRanges.parse(runs.of("old")["batches"]["claimed"])) == 9
    # Something has to be behind the gaps: a batch that was published last.
    state = saved_state(runs.cluster.run(key("old")))
    state["batches"] |= {"fetched": "8", "published": "8"}
    runs.cluster.user_delete_run(key("old"))
    runs.begin("new", saved=state, batches=parts, parallelism=2)
    await runs.settle()
    assert runs.of("new")["batches"]["replay"] == "2-7"
    assert runs.of("new")["batches"]["active"] == 2
    assert {environment(job)["INGEST_BATCH"] for job in runs.active_jobs()} == {"0", "1"}
    await runs.play()
    assert runs.of("new")["batches"]["published"] == "0-8"
