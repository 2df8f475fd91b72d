"""The recorder of a run's log lines and Events. It takes no decision, and no decision depends on it."""

from __future__ import annotations

import asyncio
import contextvars
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from datetime import datetime
from typing import Any, Final

import structlog

from ingestrun.controller.logs import about_run
from ingestrun.controller.state.memory import RunMemory
from ingestrun.kube.errors import Forbidden, Invalid, KubeError, QuotaExceeded, WebhookUnavailable
from ingestrun.kube.protocol import Cluster
from ingestrun.model import names
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase
from ingestrun.planner.actions import EndPod, Plan
from ingestrun.planner.jobs.sidecars import sidecar_event
from ingestrun.planner.status import conditions as c
from ingestrun.planner.status.events import Event, warning

logger = structlog.get_logger("ingestrun")

Json = dict[str, Any]

CANCELLED_LINE: Final = "ingest run cancelled, skipping"
"""The line that operators search their logs for. Source: the first seed document."""
REPORTING_CONTROLLER: Final = f"{names.GROUP}/operator"

MAX_WAITING: Final = 10_000
"""The queue's limit. It is reached only when the API server has been unreachable for long; Events are dropped then,
because they only inform people."""
REFUSALS: Final = (Forbidden, Invalid, QuotaExceeded, WebhookUnavailable)
"""Errors by which the API server tells that it will refuse the same request again, until somebody changes something."""
PHASE_EVENTS: Final = frozenset({"Started", "Suspended", "Resumed", *(phase.value for phase in Phase if phase.ended)})
"""Reasons of the Events about a change of phase, which has a line of its own."""
_LOGGED_OTHERWISE: Final = frozenset({"StageFailed", "BatchSkipped", "StageSkipped", "Expired"})
_WORD: Final = re.compile("([A-Z])")
DELAY_SECONDS: Final = 0.5
"""Least seconds that each piece of work waits."""
PAUSE_RECHECK_SECONDS: Final = 0.05


class EventRecorder:
    """Recorder that posts the Events of runs and writes the log lines of a pass.

    What has an Event has a line, so that the log tells everything that a user is told. The lines name
    no run: the pass has bound it to the context (`logs.about_run`).
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

    async def tell(self, before: IngestRun, stored: IngestRun, plan: Plan) -> None:
        """Log and post what a plan has changed, now that its status is stored."""
        self._log_failures(before.status, stored.status)
        phase_changed = self._log_phase(before.status, stored.status, plan.events)
        self._log_events(event for event in plan.events if not (phase_changed and event.reason in PHASE_EVENTS))
        await self.post(stored, plan.events)

    async def tell_once(self, run: IngestRun, memory: RunMemory, event: Event, *, trouble: str | None = None) -> None:
        """Log and post a trouble, unless it was told since the run's last pass that went well.

        The Event's reason names the trouble if `trouble` does not.
        """
        if (trouble or event.reason) in memory.told:
            return
        memory.told |= {trouble or event.reason}
        self._log_events((event,))
        await self.post(run, (event,))

    async def tell_failure(self, run: IngestRun, memory: RunMemory, error: Exception) -> None:
        """Tell on the run why a pass has failed, once for each kind of error, if somebody has to do something about it.

        A server that does not answer is not worth an Event, which would not reach it either.
        """
        if isinstance(error, REFUSALS):
            note = f"the API server refuses a request about this run, which is repeated: {error}"
            event = warning("RequestRefused", note, action="Retry")
        elif isinstance(error, KubeError):
            return
        else:
            # Without its text, in which a value of the run's spec may stand.
            note = (
                f"{type(error).__name__} in the operator, whose log has more: the pass is repeated, nothing is started"
            )
            event = warning("PassFailed", note, action="Retry")
        await self.tell_once(run, memory, event, trouble=type(error).__name__)

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
                    logger.warning(
                        "an Event could not be posted", reason=body["reason"], why=body["note"], error=str(error)
                    )

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

    def _log_failures(self, before: IngestRunStatus, after: IngestRunStatus) -> None:
        """Write one line for each failed attempt that has come into the status."""
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

    def _log_phase(self, before: IngestRunStatus, after: IngestRunStatus, events: Iterable[Event]) -> bool:
        """Write one line for a change of phase, with the note of its Event. Returns whether the phase has changed."""
        phase = after.phase
        if phase is before.phase or phase is None:
            return False
        succeeded = after.condition(c.SUCCEEDED)
        note = next((event.note for event in events if event.reason in PHASE_EVENTS), None)
        log = logger.warning if phase is Phase.FAILED else logger.info
        log(
            f"ingest run {phase.value.lower()}",
            reason=succeeded.reason if succeeded else phase.value,
            why=note if note is not None else succeeded.message if succeeded else "",
            published=after.records.published,
        )
        return True

    def _log_events(self, events: Iterable[Event]) -> None:
        """Write one line for each Event, save those whose occasion has a line with more in it."""
        for event in events:
            if event.reason not in _LOGGED_OTHERWISE:
                log = logger.warning if event.type == "Warning" else logger.info
                log(_WORD.sub(r" \1", event.reason).strip().lower(), reason=event.reason, why=event.note)


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
        self._waiting: asyncio.Queue[tuple[float, Awaitable[None], contextvars.Context]] = asyncio.Queue(MAX_WAITING)

    def put(self, work: Awaitable[None]) -> None:
        """Add work to be awaited later; if it fails, the line about that is about the run that is bound here."""
        due = asyncio.get_running_loop().time() + self._delay
        try:
            self._waiting.put_nowait((due, work, contextvars.copy_context()))
        except asyncio.QueueFull:
            logger.warning("too many Events wait to be posted: dropped")
            _drop(work)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            due, work, context = await self._waiting.get()
            try:
                await self._wait_until(due)
            except asyncio.CancelledError:
                _drop(work)
                raise
            try:
                await work
            except Exception:
                context.run(logger.warning, "Events could not be posted", exc_info=True)
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
