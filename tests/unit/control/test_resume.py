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
    batches = {name: status["batches"][name] for name in ("fetched", "published", "exhausted", "gaps")}
    uid = status.get("resumedFrom", {}).get("originUid") or body["metadata"]["uid"]
    state = {"uid": uid, "batches": batches, "records": status["records"]}
    return state | {name: status[name] for name in ("cursor", "afterEnd") if name in status}


FATES = ["done", "done", "done", "done", "fail", "permanent", "garbage", "missing", "deleted", "deadline"]


def meet(world: Runs, job: Object, fate: str) -> None:
    name = job["metadata"]["name"]
    if fate == "deleted":
        world.cluster.expire_job(name)
    elif fate == "deadline":
        world.cluster.fail_job(name)
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


@pytest.mark.parametrize("seed", range(80))
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
    last = "run-0"
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
            world.begin(following, saved=saved_state(world.cluster.run(key(name))), **spec)
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
