"""Telling people: the operator's log lines about runs, and the Events. Nothing here decides; nobody waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from datetime import datetime
from typing import Any, Final

import structlog

from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model import names
from ingestrun.model.run import IngestRun
from ingestrun.model.status import AttemptId, IngestRunStatus, Phase
from ingestrun.planner.actions import Plan
from ingestrun.planner.status.events import Event

logger = structlog.get_logger("ingestrun")

CANCELLED_LINE: Final = "ingest run cancelled, skipping"
"""The line that operators search their logs for. Source: the first seed document."""


class EventRecorder:
    """Posts Events and writes log lines, each skip once."""

    def __init__(
        self,
        cluster: Cluster,
        *,
        instance: str,
        clock: Callable[[], datetime],
        defer: Callable[[Awaitable[None]], None] | None,
    ) -> None:
        """`defer` takes what can be done later; None: it is done at once."""
        self._cluster = cluster
        self._instance = instance
        self._clock = clock
        self._defer = defer
        self._skipped: dict[str, set[AttemptId]] = {}

    def skipped(self, uid: str) -> Collection[AttemptId]:
        """What a cancel has kept from starting so far: batch, stage, attempt."""
        return self._skipped.get(uid, ())

    def forget(self, uid: str) -> None:
        """Drop what is kept of a run."""
        self._skipped.pop(uid, None)

    async def tell(self, run: IngestRun, told: Sequence[Event]) -> None:
        """Post Events: for people, so nothing waits for them where they can be deferred."""
        if self._defer is not None and told:
            self._defer(self._post(run, told))
        else:
            await self._post(run, told)

    async def _post(self, run: IngestRun, told: Sequence[Event]) -> None:
        for announcement in told:
            try:
                await self._cluster.create_event(
                    event_body(run, announcement, now=self._clock(), instance=self._instance)
                )
            except KubeError as error:
                logger.warning(
                    "an Event could not be posted", run=run.metadata.name, reason=announcement.reason, error=str(error)
                )

    def log_skips(self, key: RunKey, run: IngestRun, planned: Plan, trigger: str) -> None:
        """One line for everything that a cancel has kept from starting, each once."""
        known = self._skipped.setdefault(run.metadata.uid, set()) if planned.skips else set()
        for skip in planned.skips:
            if skip in known:
                continue
            known.add(skip)
            logger.info(
                CANCELLED_LINE, run=key.name, namespace=key.namespace, uid=run.metadata.uid, batch=skip.batch,
                stage=skip.stage, attempt=skip.attempt, trigger=trigger,
            )  # fmt: skip

    def log_failures(self, key: RunKey, before: IngestRunStatus, run: IngestRun, planned: Plan) -> None:
        """One line for each failed attempt that has come into the status, and for each raise of memory."""
        known = {failure.id for failure in before.failures}
        for failure in run.status.failures:
            if failure.id not in known:
                logger.warning(
                    "stage failed", run=key.name, namespace=key.namespace, uid=run.metadata.uid, batch=failure.batch,
                    stage=failure.stage, attempt=failure.attempt, reason=failure.reason, why=failure.message,
                )  # fmt: skip
        for told in planned.events:
            if told.reason == "MemoryRaised":
                logger.info("memory raised", run=key.name, namespace=key.namespace, uid=run.metadata.uid, why=told.note)

    def log_phase(self, key: RunKey, before: IngestRunStatus, run: IngestRun) -> None:
        """One line for each change of phase."""
        phase = run.status.phase
        if phase is before.phase or phase is None:
            return
        said = run.status.condition("Succeeded")
        log = logger.warning if phase is Phase.FAILED else logger.info
        log(
            f"ingest run {phase.value.lower()}", run=key.name, namespace=key.namespace, uid=run.metadata.uid,
            why=said.message if said else "", published=run.status.records.published,
        )  # fmt: skip


# Events (events.k8s.io/v1) about a run: for people; nothing depends on one.

REPORTER: Final = f"{names.GROUP}/operator"


def event_body(run: IngestRun, told: Event, *, now: datetime, instance: str) -> dict[str, Any]:
    """The Event's JSON. Its name is left to the server: an Event repeated after a restart is a second Event."""
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": f"{run.metadata.name[:200]}-", "namespace": run.metadata.namespace},
        "eventTime": now.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": REPORTER,
        "reportingInstance": instance[:128],
        "action": told.action,
        "reason": told.reason,
        "note": told.note,
        "type": told.type,
        "regarding": {
            "apiVersion": f"{names.GROUP}/{names.VERSION}",
            "kind": names.KIND,
            "name": run.metadata.name,
            "namespace": run.metadata.namespace,
            "uid": run.metadata.uid,
            "resourceVersion": run.metadata.resource_version,
        },
    }


# Work that nobody waits for, such as posting Events: one at a time, in order, dropped when there is too much of it.
#
# It gives way to what somebody waits for: when twenty runs are cancelled at once, their twenty Events come after.
#

MOST: Final = 10_000
"""So much may wait. Beyond it the API server has been gone for long, and what is dropped was for people only."""
DELAY_SECONDS: Final = 0.5
"""How long each piece waits, at least."""
LOOK_SECONDS: Final = 0.05


class EventQueue:
    """Awaits what it is given, one after another. What fails is logged."""

    def __init__(self, *, pressed: Callable[[], bool] = lambda: False, delay_seconds: float = DELAY_SECONDS) -> None:
        """While the process is `pressed` nothing is begun."""
        self._pressed = pressed
        self._delay = delay_seconds
        self._waiting: asyncio.Queue[tuple[float, Awaitable[None]]] = asyncio.Queue(MOST)

    def add(self, work: Awaitable[None]) -> None:
        """Have it awaited, later."""
        try:
            self._waiting.put_nowait((asyncio.get_running_loop().time() + self._delay, work))
        except asyncio.QueueFull:
            logger.warning("too much waits in the background: dropped")
            _drop(work)

    async def run(self) -> None:
        """Work until cancelled."""
        while True:
            due, work = await self._waiting.get()
            try:
                await self._turn(due)
            except asyncio.CancelledError:
                _drop(work)
                raise
            try:
                await work
            except Exception:
                logger.warning("background work failed", exc_info=True)
            finally:
                self._waiting.task_done()

    async def _turn(self, due: float) -> None:
        await asyncio.sleep(due - asyncio.get_running_loop().time())
        while self._pressed():  # noqa: ASYNC110  (nobody is told when it ends, and nobody waits for this)
            await asyncio.sleep(LOOK_SECONDS)

    async def finish(self, *, seconds: float) -> None:
        """Give what waits so many seconds to be done; drop the rest."""
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
