"""Telling people: the operator's log lines about runs, and the Events. Nothing here decides; nobody waits for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Sequence
from datetime import datetime
from typing import Final

import structlog

from ingestrun.control.events import event_body
from ingestrun.engine.announce import Announcement
from ingestrun.engine.decisions import Plan
from ingestrun.kube.errors import KubeError
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model.run import IngestRun
from ingestrun.model.status import IngestRunStatus, Phase

logger = structlog.get_logger("ingestrun")

CANCELLED_LINE: Final = "ingest run cancelled, skipping"
"""The line that operators search their logs for. Source: the first seed document."""


class Teller:
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
        self._skipped: dict[str, set[tuple[int, str, int]]] = {}

    def skipped(self, uid: str) -> Collection[tuple[int, str, int]]:
        """What a cancel has kept from starting so far: batch, stage, attempt."""
        return self._skipped.get(uid, ())

    def forget(self, uid: str) -> None:
        """Drop what is kept of a run."""
        self._skipped.pop(uid, None)

    async def tell(self, run: IngestRun, told: Sequence[Announcement]) -> None:
        """Post Events: for people, so nothing waits for them where they can be deferred."""
        if self._defer is not None and told:
            self._defer(self._post(run, told))
        else:
            await self._post(run, told)

    async def _post(self, run: IngestRun, told: Sequence[Announcement]) -> None:
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
            identity = (skip.batch, skip.stage, skip.attempt)
            if identity in known:
                continue
            known.add(identity)
            logger.info(
                CANCELLED_LINE, run=key.name, namespace=key.namespace, uid=run.metadata.uid, batch=skip.batch,
                stage=skip.stage, attempt=skip.attempt, trigger=trigger,
            )  # fmt: skip

    def log_failures(self, key: RunKey, before: IngestRunStatus, run: IngestRun, planned: Plan) -> None:
        """One line for each failed attempt that has come into the status, and for each raise of memory."""
        known = {failure.key for failure in before.failures}
        for failure in run.status.failures:
            if failure.key not in known:
                logger.warning(
                    "stage failed", run=key.name, namespace=key.namespace, uid=run.metadata.uid, batch=failure.batch,
                    stage=failure.stage, attempt=failure.attempt, reason=failure.reason, why=failure.message,
                )  # fmt: skip
        for told in planned.tell:
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
