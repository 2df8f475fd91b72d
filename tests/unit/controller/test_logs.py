"""The log: which run each line is about, the order of its keys, and kopf's lines in the same stream."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import pytest
import structlog
from structlog.contextvars import merge_contextvars
from tests.fakes.cluster import FakeCluster
from tests.fakes.world import KEY, World

from ingestrun.controller import logs
from ingestrun.controller.logs import about_run, context_of_pass
from ingestrun.controller.reconcile.recorder import EventQueue, EventRecorder
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.errors import Forbidden, Unavailable
from ingestrun.model.run import IngestRun
from ingestrun.planner.status.events import normal

RUN = {"run": "flights", "namespace": "default", "uid": "u-1", "ingest_run_id": "u-1"}


@pytest.fixture
def configured() -> Iterator[None]:
    """Restore the process's logging after a test of `configure()`."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    structlog.reset_defaults()


def context_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {key: line[key] for key in RUN if key in line}


@pytest.mark.usefixtures("configured")
def test_a_json_line_begins_with_what_people_look_for(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(fmt="json", level="info")
    with about_run(name="flights", namespace="default", uid="u-1"):
        structlog.get_logger("test").info("ingest run cancelled, skipping", trigger="run", stage="fetch", batch=7)
    line = json.loads(capsys.readouterr().err)
    assert list(line)[:7] == ["time", "level", "event", "run", "namespace", "batch", "stage"]
    assert line | {"time": ""} == RUN | {
        "time": "",
        "level": "info",
        "event": "ingest run cancelled, skipping",
        "batch": 7,
        "stage": "fetch",
        "trigger": "run",
        "logger": "test",
    }


@pytest.mark.usefixtures("configured")
def test_a_console_line_has_the_same_order(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(fmt="console", level="info")
    with about_run(name="flights", namespace="default", uid="u-1"):
        structlog.get_logger("test").warning("stage failed", attempt=0, stage="fetch", batch=7)
    line = capsys.readouterr().err
    assert re.fullmatch(
        r"\d{4}-\S+Z \[warning *\] stage failed +\[test\] run=flights namespace=default batch=7 stage=fetch .*\n", line
    ), line
    assert "ingest_run_id=u-1" in line
    assert "attempt=0" in line


@pytest.mark.usefixtures("configured")
def test_lines_by_other_libraries_are_in_the_same_form(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure(fmt="json", level="info")
    reference = {"kind": "Job", "name": "flights-0-fetch-0", "namespace": "default", "uid": "j-1"}
    with about_run(name="flights", namespace="default", uid="u-1"):
        logging.getLogger("aiohttp.client").warning("slow: %d s", 9)
    logging.getLogger("kopf.reactor").warning("odd", extra={"k8s_ref": reference})
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("kopf.reactor").exception("failed")
    slow, odd, failed = map(json.loads, capsys.readouterr().err.splitlines())
    assert list(slow)[:5] == ["time", "level", "event", "run", "namespace"]
    assert (slow["event"], context_of(slow)) == ("slow: 9 s", RUN)
    assert list(odd)[:4] == ["time", "level", "event", "namespace"]
    assert (odd["event"], odd["name"], odd["uid"]) == ("odd", "flights-0-fetch-0", "j-1")
    assert "ValueError: no" in failed["exception"]


async def test_every_line_of_a_pass_tells_its_run() -> None:
    world = World()
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as lines:
        uid = world.create(retries=1)["metadata"]["uid"]
        world.cluster.fail_next("create", "jobs", Forbidden("no right"))
        await world.settle()
        world.now = world.due[KEY]
        await world.settle()
        world.work(world.active_jobs()[0], exit_code=1)
        world.cluster.fail_next("create", "events", Unavailable("gone"))
        await world.settle()
        world.cancel(cancellation={"policy": "Terminate"})
        await world.play()
    told = {line["event"] for line in lines}
    assert told >= {
        "job refused",
        "job created",
        "stage failed",
        "an Event could not be posted",
        "ingest run cancelled",
        "ingest run cancelled, skipping",
    }
    for line in lines:
        assert context_of(line) == RUN | {"uid": uid, "ingest_run_id": uid}, line


async def test_an_event_that_is_posted_later_tells_its_run() -> None:
    world = World()
    world.create()
    run = IngestRun.read(world.cluster.run(KEY))
    queue = EventQueue(delay_seconds=0)
    cluster: FakeCluster = world.cluster
    cluster.fail_next("create", "events", Unavailable("gone"))
    recorder = EventRecorder(cluster, instance="test", clock=lambda: world.now, defer=queue.put)
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as lines:
        posting = asyncio.create_task(queue.run())
        await recorder.post(run, [normal("Started", "", action="Start")])
        await queue.finish(seconds=5)
        posting.cancel()
    (line,) = lines
    assert line["event"] == "an Event could not be posted"
    uid = run.metadata.uid
    assert context_of(line) == RUN | {"uid": uid, "ingest_run_id": uid}


async def test_an_event_that_is_posted_later_has_the_time_of_its_decision() -> None:
    world = World()
    world.create()
    run = IngestRun.read(world.cluster.run(KEY))
    decided = world.now
    queue = EventQueue(delay_seconds=0)
    recorder = EventRecorder(world.cluster, instance="test", clock=lambda: world.now, defer=queue.put)
    await recorder.post(run, [normal("Started", "", action="Start")])
    world.now += timedelta(hours=1)
    posting = asyncio.create_task(queue.run())
    await queue.finish(seconds=5)
    posting.cancel()
    (event,) = world.cluster.events()
    assert event["eventTime"] == decided.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@pytest.mark.parametrize("uid", ["u-2", None])
async def test_a_failed_pass_tells_its_own_run_not_the_one_that_has_asked_for_it(uid: str | None) -> None:
    async def handle(key: str, _: str) -> None:
        with about_run(name=key, namespace="default", uid="u-1"):
            if key == "flights":
                queue.add("trains", "room")
        if key == "trains":
            raise Unavailable("gone")

    queue: WorkQueue[str] = WorkQueue(
        handle, concurrency=4, context=lambda key: context_of_pass(name=key, namespace="default", uid=uid)
    )
    with structlog.testing.capture_logs(processors=[merge_contextvars]) as lines:
        queue.add("flights", "run")
        await queue.idle()
    await queue.close()
    (line,) = lines
    assert (line["event"], line["error"]) == ("pass failed", "gone")
    own = {"run": "trains", "namespace": "default"}
    assert context_of(line) == own | ({"uid": uid, "ingest_run_id": uid} if uid is not None else {})
