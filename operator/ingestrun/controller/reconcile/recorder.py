"""The recorder of a run's log lines and Events. It takes no decision, and no decision depends on it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from datetime import datetime
from typing import Any, Final

import structlog

from ingestrun.controller.logs import about_run
from ingestrun.controller.state.memory import RunMemory
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster
from ingestrun.model import names
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase
from ingestrun.planner.actions import EndPod, Plan
from ingestrun.planner.jobs.sidecars import sidecar_event
from ingestrun.planner.status.events import Event

logger = structlog.get_logger("ingestrun")

Json = dict[str, Any]

CANCELLED_LINE: Final = "ingest run cancelled, skipping"
"""The line that operators search their logs for. Source: the first seed document."""
REPORTING_CONTROLLER: Final = f"{names.GROUP}/operator"

MAX_WAITING: Final = 10_000
"""The queue's limit. It is reached only when the API server has been unreachable for long; Events are dropped then,
because they only inform people."""
DELAY_SECONDS: Final = 0.5
"""Least seconds that each piece of work waits."""
PAUSE_RECHECK_SECONDS: Final = 0.05


class EventRecorder:
    """Recorder that posts the Events of runs and writes the log lines of a pass.

    The lines name no run: the pass has bound it to the context (`logs.about_run`).
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        instance: str,
        clock: Callable[[], datetime],
        defer: Callable[[Awaitable[None]], None] | None,
    ) -> None:
        """Hand the posting to `defer`, such as `EventQueue.put`; with None it is awaited at once."""
        self._cluster = cluster
        self._instance = instance
        self._clock = clock
        self._defer = defer

    async def post(self, run: IngestRun, events: Sequence[Event]) -> None:
        """Post Events. No pass waits for the posting if it can be deferred."""
        if not events:
            return
        now = self._clock()
        # Of thousands that wait to be posted only the bodies are kept, and not the run, which is ten times as large.
        bodies = [event_body(run, event, now=now, instance=self._instance) for event in events]
        posting = self._post(bodies)
        if self._defer is not None:
            self._defer(posting)
        else:
            await posting

    async def _post(self, bodies: Sequence[Json]) -> None:
        run = bodies[0]["regarding"]
        # Bound once more, because the queue posts in a task of its own, long after the pass.
        with about_run(name=run["name"], namespace=run["namespace"], uid=run["uid"]):
            for body in bodies:
                try:
                    await self._cluster.create_event(body)
                except KubeError as error:
                    logger.warning("an Event could not be posted", reason=body["reason"], error=str(error))

    def log_skips(self, memory: RunMemory, plan: Plan, *, trigger: str) -> None:
        """Write one line for each start that a cancel has prevented, each once."""
        for skip in plan.skips:
            if skip not in memory.skipped:
                logger.info(CANCELLED_LINE, batch=skip.batch, stage=skip.stage, attempt=skip.attempt, trigger=trigger)
        memory.skipped |= set(plan.skips)

    async def report_end(self, run: IngestRun, end: EndPod, memory: RunMemory) -> None:
        """Write one line for each pod that is ended, and post one Event for all those with the same containers."""
        logger.info("sidecar ended, its stage is over", pod=end.name, containers=end.containers)
        if end.containers not in memory.sidecars_told:
            memory.sidecars_told |= {end.containers}
            await self.post(run, [sidecar_event(end)])

    def log_failures(self, before: IngestRunStatus, after: IngestRunStatus, plan: Plan) -> None:
        """Write one line for each failed attempt that has come into the status, and for each raise of memory."""
        known = {failure.id for failure in before.failures}
        for failure in after.failures:
            if failure.id not in known:
                logger.warning(
                    "stage failed",
                    batch=failure.batch,
                    stage=failure.stage,
                    attempt=failure.attempt,
                    reason=failure.reason,
                    why=failure.message,
                )
        for event in plan.events:
            if event.reason == "MemoryRaised":
                logger.info("memory raised", why=event.note)

    def log_phase(self, before: IngestRunStatus, after: IngestRunStatus) -> None:
        """Write one line for a change of phase."""
        phase = after.phase
        if phase is before.phase or phase is None:
            return
        succeeded = after.condition("Succeeded")
        log = logger.warning if phase is Phase.FAILED else logger.info
        log(
            f"ingest run {phase.value.lower()}",
            why=succeeded.message if succeeded else "",
            published=after.records.published,
        )


def event_body(run: IngestRun, event: Event, *, now: datetime, instance: str) -> Json:
    """Return the JSON of an Event (events.k8s.io/v1).

    Its name is left to the server, so an Event that is repeated after a restart is a second Event.
    """
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.metadata.name[:200]}-", "namespace": run.metadata.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": REPORTING_CONTROLLER,
        "reportingInstance": instance[:128],
        "action": event.action,
        "reason": event.reason,
        "note": event.note,
        "type": event.type,
        "regarding": {
            "apiVersion": f"{names.GROUP}/{names.VERSION}",
            "kind": names.KIND,
            "name": run.metadata.name,
            "namespace": run.metadata.namespace,
            "uid": run.metadata.uid,
            "resourceVersion": run.metadata.resource_version,
        },
    }


class EventQueue:
    """Queue that awaits its work items one after another, in order. A failure is logged and does not stop the queue.

    It gives way to the work that users wait for: when twenty runs are cancelled at once, their Events are posted
    afterwards.
    """

    def __init__(self, *, paused: Callable[[], bool] = lambda: False, delay_seconds: float = DELAY_SECONDS) -> None:
        """Begin no work item while `paused` returns True."""
        self._paused = paused
        self._delay = delay_seconds
        self._waiting: asyncio.Queue[tuple[float, Awaitable[None]]] = asyncio.Queue(MAX_WAITING)

    def put(self, work: Awaitable[None]) -> None:
        """Add work to be awaited later."""
        try:
            self._waiting.put_nowait((asyncio.get_running_loop().time() + self._delay, work))
        except asyncio.QueueFull:
            logger.warning("too many Events wait to be posted: dropped")
            _drop(work)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            due, work = await self._waiting.get()
            try:
                await self._wait_until(due)
            except asyncio.CancelledError:
                _drop(work)
                raise
            try:
                await work
            except Exception:
                logger.warning("Events could not be posted", exc_info=True)
            finally:
                self._waiting.task_done()

    async def _wait_until(self, due: float) -> None:
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        while self._paused():  # noqa: ASYNC110  (no event marks the end of a pause, and no pass waits for this work)
            await asyncio.sleep(PAUSE_RECHECK_SECONDS)

    async def finish(self, *, seconds: float) -> None:
        """Give the waiting work this many seconds to be done, and drop the rest."""
        try:
            async with asyncio.timeout(seconds):
                await self._waiting.join()
        except TimeoutError:
            while not self._waiting.empty():
                _drop(self._waiting.get_nowait()[1])


def _drop(work: Awaitable[None]) -> None:
    if isinstance(work, Coroutine):
        coroutine: Coroutine[Any, Any, None] = work
        coroutine.close()
