"""Which image a Job runs: what can be pinned, and what is done with it."""

from __future__ import annotations

from typing import Any

import pytest
from tests.fakes.cluster import Call
from tests.fakes.world import KEY, World, environment

from ingestrun.model.size_budget import MAX_IMAGE_PINS
from ingestrun.planner.jobs.image_pins import digest_of, repository

A, B, C = (f"sha256:{letter * 64}" for letter in "abc")


@pytest.mark.parametrize(
    ("asked", "image_id", "digest"),
    [
        ("ghcr.io/team/worker:1", f"ghcr.io/team/worker@{A}", A),
        ("ghcr.io/team/worker", f"ghcr.io/team/worker@{A}", A),
        ("team/worker:1", f"docker.io/team/worker@{A}", A),
        ("busybox", f"docker.io/library/busybox@{A}", A),
        ("index.docker.io/busybox:1", f"docker.io/library/busybox@{A}", A),
        ("registry.local:5000/worker:1", f"registry.local:5000/worker@{A}", A),
        ("busybox:1", f"docker-pullable://busybox@{A}", A),
        # What can't be pulled again, or is not what was asked for.
        ("busybox:1", A, None),
        ("busybox:1", "", None),
        ("busybox:1", "docker.io/library/busybox:1", None),
        ("busybox:1", f"docker.io/library/import-2026-11-23@{A}", None),
        ("ghcr.io/team/worker:1", f"mirror.local/team/worker@{A}", None),
        ("localhost:5000/worker:1", f"localhost:5000/worker@{A}", None),
        ("localhost/worker:1", f"localhost/worker@{A}", None),
        ("127.0.0.1:5000/worker:1", f"127.0.0.1:5000/worker@{A}", None),
        ("busybox:1", f"docker.io/library/busybox@sha512:{'a' * 128}", None),
        ("busybox:1", "simulated/busybox:1", None),
        # A digest that was asked for is fixed already.
        (f"busybox@{A}", f"docker.io/library/busybox@{A}", None),
        (f"busybox:1@{A}", f"docker.io/library/busybox@{A}", None),
    ],
)
def test_what_the_kubelet_tells_and_what_it_is_good_for(asked: str, image_id: str, digest: str | None) -> None:
    assert digest_of(asked, image_id) == digest


@pytest.mark.parametrize(
    ("image", "name"),
    [
        ("busybox", "busybox"),
        ("busybox:1", "busybox"),
        ("localhost:5000/a/b:1.2", "localhost:5000/a/b"),
        ("localhost:5000/a/b", "localhost:5000/a/b"),
        (f"a/b:1@{A}", "a/b"),
    ],
)
def test_an_image_without_its_tag(image: str, name: str) -> None:
    assert repository(image) == name


@pytest.fixture
def world() -> World:
    return World()


def images(world: World) -> list[tuple[int, str, str]]:
    """Batch, stage and image of all Jobs that were ever created, in their order."""
    found = []
    for call in world.cluster.calls("create", "jobs"):
        if call.stored and call.body is not None:
            env = environment(call.body)
            container = call.body["spec"]["template"]["spec"]["containers"][0]
            found.append((int(env.get("INGEST_BATCH", -1)), env["INGEST_STAGE"], container["image"]))
    return found


async def test_what_the_first_pod_ran_is_what_all_later_jobs_run(world: World) -> None:
    """The tag moves after the first fetch: no other image than the first one's is ever asked for."""
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create()
    await world.settle()
    world.work(world.active_jobs()[0])
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{B}"
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["images"] == [{"steps": "0-2", "digest": A}]
    first, *others = images(world)
    assert first == (0, "fetch", "example/worker:1")
    assert len(others) == 14
    assert {image for _, _, image in others} == {f"example/worker@{A}"}


async def test_it_costs_no_write_of_its_own(world: World) -> None:
    plain = World()
    plain.create()
    await plain.play()
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create()
    await world.play()
    assert world.status["images"]
    assert len(world.cluster.calls("patch", "ingestruns/status")) == len(
        plain.cluster.calls("patch", "ingestruns/status")
    )
    assert len(world.cluster.history) == len(plain.cluster.history)


async def test_a_pod_that_starts_is_no_reason_to_write(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create()
    await world.settle()
    writes = len(world.cluster.calls("patch", "ingestruns/status"))
    world.cluster.start_pod(world.active_jobs()[0]["metadata"]["name"])
    await world.settle()
    assert len(world.cluster.calls("patch", "ingestruns/status")) == writes
    assert not world.status.get("images")


async def test_what_is_learned_last_holds_for_the_very_next_job(world: World) -> None:
    """The publish of a batch changes nothing in the status; the digest is stored all the same before it is named."""
    world.create(batches={"partitions": {"count": 1}})
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.work(world.active_jobs()[0])
    await world.settle()
    assert images(world)[-1] == (0, "publish", f"example/worker@{A}")
    assert world.status["images"] == [{"steps": "0-2", "digest": A}]


async def test_a_digest_that_is_stored_stays(world: World) -> None:
    """The pod that it was learned from is gone, and the only one left ran another image."""
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create(batches={"partitions": {"count": 3}}, parallelism=2)
    await world.settle()
    first, second = world.active_jobs()
    world.work(first)
    await world.settle()
    for _ in range(2):
        (job,) = [job for job in world.active_jobs() if environment(job)["INGEST_BATCH"] == "0"]
        world.work(job)
        await world.settle()
    assert world.status["batches"]["published"] == "0"
    for job in world.cluster.jobs():
        if environment(job)["INGEST_BATCH"] == "0":
            world.cluster.expire_job(job["metadata"]["name"])
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{B}"
    world.work(second)
    world.restart()
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["images"] == [{"steps": "0-2", "digest": A}]
    assert {image for _, _, image in images(world)[2:]} == {f"example/worker@{A}"}


async def test_a_retry_runs_the_same_image(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create(parallelism=1)
    await world.settle()
    world.work(world.active_jobs()[0], exit_code=1)
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{B}"
    await world.settle()
    world.now = world.due[KEY]
    await world.settle()
    assert images(world)[-1] == (0, "fetch", f"example/worker@{A}")


async def test_a_restart_goes_on_with_the_same_image(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create()
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{B}"
    world.restart()
    await world.play()
    assert {image for _, _, image in images(world)[1:]} == {f"example/worker@{A}"}


async def test_no_job_names_a_digest_that_is_not_stored(world: World) -> None:
    """Or a restart might learn another one, and mix the two."""
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create(retries=5)
    seen = []

    async def look(call: Call) -> None:
        if (call.verb, call.resource, call.stage) == ("create", "jobs", "before") and call.body is not None:
            image = call.body["spec"]["template"]["spec"]["containers"][0]["image"]
            if "@" in image:
                assert world.status["images"] == [{"steps": "0-2", "digest": A}]
                seen.append(image)

    world.cluster.on_call = look
    failed = iter([True] * 3)
    await world.play(each=lambda _: {"exit_code": 1} if next(failed, False) else {})
    assert world.phase == "Succeeded"
    assert len(seen) > 10


async def test_first_pods_that_disagree_are_told_of_once_and_the_first_wins(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create(batches={"partitions": {"count": 4}}, parallelism=2)
    await world.settle()
    first, second = world.active_jobs()
    world.cluster.start_pod(first["metadata"]["name"])
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{B}"
    world.cluster.start_pod(second["metadata"]["name"])
    await world.play()
    assert world.phase == "Succeeded"
    assert world.status["images"] == [{"steps": "0-2", "digest": A}]
    assert {image for _, _, image in images(world)[2:]} == {f"example/worker@{A}"}
    (note,) = [event["note"] for event in world.cluster.events() if event["reason"] == "ImageMoved"]
    assert note.startswith(f"batch 1 ran {B}, all later ones run {A}")


def built_in(**more: Any) -> dict[str, Any]:
    return {
        "fetch": None,
        "publish": None,
        "hooks": [{"name": "check", "validate": {"columns": [{"name": "id"}]}}],
        "source": {"files": {"path": "*.csv"}},
        "sink": {"parquet": {"path": "out"}},
        "workspace": {"persistentVolumeClaim": {"claimName": "data"}},
        **more,
    }


@pytest.mark.parametrize("image_id", ["", f"docker.io/example/worker@{A}"])
async def test_an_upgraded_operator_goes_on_with_the_worker_that_the_run_began_with(
    world: World, image_id: str
) -> None:
    world.cluster.image_ids["example/worker:1"] = image_id
    world.create(**built_in())
    await world.settle()
    world.work(world.active_jobs()[0])
    world.worker = "example/worker:2"
    world.restart()
    await world.play()
    assert world.phase == "Succeeded"
    later = f"example/worker@{A}" if image_id else "example/worker:1"
    assert {image for _, _, image in images(world)[1:]} == {later}
    assert world.status["images"][0]["image"] == "example/worker:1"
    assert world.status["images"][0].get("digest") == (A if image_id else None)
    world.cluster.user_delete_run(KEY)
    world.create(**built_in())
    await world.settle()
    assert images(world)[-1] == (0, "fetch", "example/worker:2"), "a new run begins with the new worker"


async def test_each_image_is_pinned_for_itself_as_far_as_there_is_room(world: World) -> None:
    hooks = [{"name": f"h{n}", "container": {"image": f"example/h{n}:1"}} for n in range(6)]
    for n in range(6):
        world.cluster.image_ids[f"example/h{n}:1"] = f"docker.io/example/h{n}@sha256:{n:064x}"
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{C}"
    world.create(hooks=hooks)
    await world.play()
    assert world.phase == "Succeeded"
    pins = {pin["steps"]: pin["digest"] for pin in world.status["images"]}
    assert len(pins) == MAX_IMAGE_PINS
    assert pins["0,7"] == C
    assert pins["1"] == f"sha256:{0:064x}"
    later = {image for batch, stage, image in images(world) if batch > 2}
    assert f"example/h0@sha256:{0:064x}" in later
    assert "example/h5:1" in later, "there is no room for its digest: it stays with its tag"


async def test_what_is_never_pulled_keeps_its_tag(world: World) -> None:
    """On the node it is known by its tag alone: a digest might end in ErrImageNeverPull."""
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create(publish={"image": "example/worker:1", "imagePullPolicy": "Never"})
    await world.play()
    assert world.phase == "Succeeded"
    assert {image for _, stage, image in images(world) if stage == "publish"} == {"example/worker:1"}
    assert {image for _, stage, image in images(world)[1:] if stage != "publish"} == {f"example/worker@{A}"}


async def test_a_worker_that_is_never_pulled_keeps_its_tag(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.pull_policy = "Never"
    world.start()
    world.create(**built_in())
    await world.play()
    assert world.phase == "Succeeded"
    assert {image for _, _, image in images(world)} == {"example/worker:1"}


async def test_the_clean_up_runs_what_a_stage_with_its_image_ran(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = f"docker.io/example/worker@{A}"
    world.create(onCancel={"image": "example/worker:1"})
    await world.settle()
    world.work(world.active_jobs()[0])
    await world.settle()
    world.cancel()
    await world.play()
    assert images(world)[-1][1:] == ("on-cancel", f"example/worker@{A}")


async def test_a_bare_image_id_changes_nothing(world: World) -> None:
    world.cluster.image_ids["example/worker:1"] = A
    world.create()
    await world.play()
    assert "images" not in world.status or world.status["images"] == []
    assert {image for _, _, image in images(world)} == {"example/worker:1"}
