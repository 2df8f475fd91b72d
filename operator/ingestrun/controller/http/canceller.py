"""Cancels that people ask for over HTTP: a patch of the spec in the caller's name, and a wait for the operator.

The patch carries the resourceVersion of the run that was judged. If the run has changed it is judged again, so that no
run is cancelled that had ended, or was not stale any more, and nobody's name is put in place of another's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Final

from ingestrun.kube.errors import Conflict, Invalid, KubeError, NotFound, Unknown
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model.lineage import cancelled_with_cascade, parents_of
from ingestrun.model.names import ANNOTATION_REQUESTED_BY
from ingestrun.model.run import has_ended
from ingestrun.model.status import Phase

TRIES: Final = 10
"""Reads of a run that changes all the time."""
SIDE_BY_SIDE: Final = 16
FIRST_PAUSE: Final = 0.1
MAX_PAUSE: Final = 1.0

Judge = Callable[[Object], Awaitable[str | None]]
"""Function that looks at a run right before it is cancelled, and returns why it is left alone after all."""


class EndedError(Exception):
    """A run that can't be cancelled, because it has ended; its text says how."""

    def __init__(self, run: Object) -> None:
        super().__init__(ended_sentence(run))
        self.run = run


class LeftAloneError(Exception):
    """A run that is not cancelled, because it is not what it was taken for; its text says why."""


@dataclass(frozen=True, slots=True)
class Settled:
    """The outcome of a cancel: the run as it is, and the runs below it."""

    run: Object | None
    """The run; None: it is gone."""
    below: Sequence[str] = ()
    """The runs below it that are Cancelled by it."""
    pending_below: Sequence[str] = ()
    """The runs below it that will be."""
    below_known: bool = True
    """False: the runs below it belong to the cancel, and could not be listed yet."""

    @property
    def cancelled(self) -> bool:
        """Tell whether the run itself is Cancelled."""
        return self.run is not None and phase_of(self.run) == Phase.CANCELLED

    @property
    def done(self) -> bool:
        """Tell whether nothing is left to wait for."""
        over = self.run is None or has_ended(self.run)
        return over and not self.pending_below and (self.below_known or not self.cancelled)


class RunCanceller:
    """The two steps of a cancel, for one run or many."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._slots = asyncio.Semaphore(SIDE_BY_SIDE)

    async def ask(
        self,
        key: RunKey,
        *,
        by: str,
        cancellation: Mapping[str, Any],
        uid: str | None = None,
        judge: Judge | None = None,
    ) -> Object:
        """Ask for the cancel in the name of `by`; return the run as stored.

        Raises EndedError, LeftAloneError, and KubeError: NotFound also if another run than that of `uid` has the name.
        """
        async with self._slots:
            for _ in range(TRIES):
                run = await self._cluster.get_run(key)
                if uid is not None and run["metadata"]["uid"] != uid:
                    raise NotFound(f"the run {key.name} of that UID is gone: another has its name now")
                if has_ended(run):
                    raise EndedError(run)
                why = await judge(run) if judge is not None else None
                if why is not None:
                    raise LeftAloneError(why)
                version = run["metadata"]["resourceVersion"]
                try:
                    patch = _patch(run, by, cancellation)
                    return await self._cluster.patch_run(key, patch=patch, resource_version=version)
                except (Conflict, Unknown):
                    continue  # a request that is stored already is found there, and asked for once more
                except Invalid:
                    if not has_ended(await self._cluster.get_run(key)):
                        raise
            raise Conflict(f"the run {key.name} changes all the time: ask again")

    async def settle(
        self, asked: Mapping[RunKey, Object], *, cascade: bool, seconds: float
    ) -> Mapping[RunKey, Settled]:
        """Wait until the runs have ended, with `cascade` those below them too, or for so many seconds.

        A read that fails tells nothing, and is tried again: the requests stand all the same.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + seconds
        found = {key: Settled(run, below_known=not cascade) for key, run in asked.items()}
        waiting, pause = list(found), FIRST_PAUSE
        while True:
            found |= dict(
                zip(waiting, await asyncio.gather(*(self._look(key, found[key]) for key in waiting)), strict=True)
            )
            if cascade:
                with suppress(KubeError):
                    found |= await self._with_those_below(found)
            waiting = [key for key, settled in found.items() if not settled.done]
            left = deadline - loop.time()
            if not waiting or left <= 0:
                return found
            await asyncio.sleep(min(pause, left))
            pause = min(MAX_PAUSE, 2 * pause)

    async def _look(self, key: RunKey, known: Settled) -> Settled:
        async with self._slots:
            try:
                return replace(known, run=await self._cluster.get_run(key))
            except NotFound:
                return replace(known, run=None)
            except KubeError:
                return known

    async def _with_those_below(self, found: Mapping[RunKey, Settled]) -> dict[RunKey, Settled]:
        namespaces = sorted({key.namespace for key, settled in found.items() if settled.cancelled})
        runs = {name: await self._cluster.list_runs_in(namespace=name) for name in namespaces}
        return {
            key: Settled(settled.run, *runs_below(key, runs[key.namespace]))
            for key, settled in found.items()
            if settled.cancelled
        }


def _patch(run: Object, by: str, cancellation: Mapping[str, Any]) -> Object:
    """Return the patch that asks for a cancel. A request that stands already keeps the name of its requester."""
    spec: dict[str, Any] = {"cancel": True}
    if cancellation:
        spec["cancellation"] = cancellation
    if (run.get("spec") or {}).get("cancel") is True:
        return {"spec": spec}
    return {"metadata": {"annotations": {ANNOTATION_REQUESTED_BY: by}}, "spec": spec}


def runs_below(root: RunKey, runs: Sequence[Object]) -> tuple[list[str], list[str]]:
    """Return the names of the runs that are Cancelled by the cascade of `root`, and of those that will be."""
    children: dict[RunKey, list[Object]] = {}
    for run in runs:
        for parent in parents_of(run):
            children.setdefault(parent, []).append(run)
    cancelled: list[str] = []
    pending: list[str] = []
    seen, todo = {root}, [root]
    while todo:
        above = todo.pop()
        for run in children.get(above, ()):
            key = RunKey.of(run)
            if key in seen:
                continue
            by_it = cancelled_with_cascade(run) and run["status"]["cancellation"].get("parent") == above.name
            if not by_it and has_ended(run):
                continue  # before, or for a reason of its own: it is left alone, and so are those below it
            seen.add(key)
            todo.append(key)
            (cancelled if by_it else pending).append(key.name)
    return sorted(cancelled), sorted(pending)


def phase_of(run: Object) -> str:
    """Return the run's phase; that of a run that no operator has seen yet is Pending."""
    return (run.get("status") or {}).get("phase") or Phase.PENDING.value


def ended_sentence(run: Object) -> str:
    """Return how a run has ended: of a cancelled one by whom, when and why."""
    phase, name = phase_of(run), run["metadata"]["name"]
    if phase != Phase.CANCELLED:
        return f"the run {name} is already {phase} and cannot be cancelled"
    record = run["status"].get("cancellation") or {}
    by, at, why = record.get("requestedBy"), record.get("acceptedAt"), record.get("reason")
    told = f"the run {name} is already Cancelled"
    told += f", by {by}" if by else ""
    told += f", at {at}" if at else ""
    return f"{told}: {why}" if why else told
