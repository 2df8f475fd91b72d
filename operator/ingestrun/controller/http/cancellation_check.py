"""The cancellation check: pods ask by HTTP whether their run is cancelled.

Every replica answers, the standby as well, from a live read of the run, which all requests within a second share.
The check has its own connection, so that the requests of a thousand pods do not delay the reconciler's calls.
With `?wait=SECONDS` an answer waits for the cancel. It comes at once on the leader, which is told by its watch
(`CancellationCheck.wake`), and within a second on a standby, which reads for all that wait together.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

from aiohttp import web

from ingestrun.controller.http.callers import Callers
from ingestrun.controller.http.pool import POOL_PATH
from ingestrun.controller.http.problems import Problem
from ingestrun.controller.http.rate_limit import Rate
from ingestrun.controller.http.server import RouteTable
from ingestrun.controller.http.tokens import (
    CheckKey,
    ForeignTokenError,
    TokenError,
    is_token_of_check,
    issue,
    issue_for_worker,
    verify,
)
from ingestrun.kube.errors import KubeError, NotFound
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model.lineage import cancelled_with_cascade, parents_of
from ingestrun.model.run import IngestRun, cancel_requested, has_ended
from ingestrun.model.status import Phase
from ingestrun.planner.actions import CreateJob
from ingestrun.planner.jobs.manifest import CheckEndpoint

PATH: Final = "/api/v1/namespaces/{namespace}/ingestruns/{name}/cancellation-check"
CACHE_SECONDS: Final = 1.0
MOST_WAIT_SECONDS: Final = 30.0
"""Longest wait for a cancel; proxies cut off what is silent for a minute."""
TOKEN_WAIT_SECONDS: Final = 30 * 24 * 3600
"""Time after its Job's creation within which a pod's deadline has to begin for the token to be valid to the pod's end.

The deadline counts from the time at which a node accepts the pod, and the wait for that has no bound. A pod that waited
longer asks in vain and goes on, as without an answer: it can be cancelled like any other, but does not stop by itself.
"""


class CancellationCheck(RouteTable):
    """Route table of the check: the endpoint, its key, and the values about both that Jobs get.

    `clock` is the API server's, because one replica judges the tokens that another has issued.
    """

    rate = Rate(per_second=200, burst=1000)
    """For the 100 pods of a run whose Jobs were created within one second: they share a token."""
    seconds = MOST_WAIT_SECONDS + 15.0

    def __init__(
        self,
        cluster: Cluster,
        key: CheckKey,
        *,
        url: str,
        clock: Callable[[], datetime],
        ca: Callable[[], str | None] = lambda: "",
        callers: Callers | None = None,
        cache_seconds: float = CACHE_SECONDS,
    ) -> None:
        """Prepare the table; pods are told of no check while the key or `ca` is None.

        `ca` is the PEM of the CA that verifies the server; empty: one that pods know; None: not known yet.
        `callers` are people, who may ask by a token of the cluster if they may read the run.
        """
        self._cluster = cluster
        self._key = key
        self._url = url.rstrip("/")
        self._clock = clock
        self._ca = ca
        self._callers = callers
        self._cache_seconds = cache_seconds
        self._looks: dict[tuple[RunKey, str], asyncio.Task[Object]] = {}
        self._waiting: dict[RunKey, set[asyncio.Event]] = {}
        self._finishing = False
        self._keeping: asyncio.Task[None] | None = None

    def check_for(self, run: IngestRun, create: CreateJob) -> CheckEndpoint | None:
        """Return the endpoint for a Job; None while there is no key, or no certificate.

        See `planner.jobs.manifest.CheckEndpointFor`.
        """
        ca = self._ca()
        if self._key.value is None or ca is None:
            return None
        meta = run.metadata
        key = meta.key
        expiry = int(self._clock().timestamp()) + TOKEN_WAIT_SECONDS + create.attempt.step.deadline_seconds
        endpoint = CheckEndpoint(
            url=self._url + PATH.format(namespace=key.namespace, name=key.name),
            token=issue(self._key.value, key, uid=meta.uid, expiry=expiry),
            ca=ca,
        )
        if not create.worker:
            return endpoint
        worker = create.attempt.batch
        return replace(
            endpoint,
            pool_url=self._url + POOL_PATH.format(namespace=key.namespace, name=key.name),
            pool_token=issue_for_worker(self._key.value, key, uid=meta.uid, worker=worker, expiry=expiry),
        )

    def wake(self, key: RunKey) -> None:
        """Look at the run anew for all who wait for its cancel: something that matters to them has happened."""
        for entry in [entry for entry in self._looks if entry[0] == key]:
            del self._looks[entry]  # it may have begun before
        for event in self._waiting.get(key, ()):
            event.set()

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route."""
        return [web.get(PATH, self._answer, allow_head=False)]

    async def open(self) -> None:
        """Get the key before the first Job, because a Job that is created without a token can never ask."""
        await self._key.try_refresh()
        self._keeping = asyncio.create_task(self._key.keep(), name="check-key")

    async def finish(self) -> None:
        """Answer all who wait with what is known."""
        self._finishing = True
        for events in self._waiting.values():
            for event in events:
                event.set()

    async def close(self) -> None:
        """Stop keeping the key, and reading."""
        tasks: list[asyncio.Task[Any]] = [*self._looks.values(), *([self._keeping] if self._keeping else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.Response:
        key = RunKey(namespace=request.match_info["namespace"], name=request.match_info["name"])
        wait = _seconds(request.query.get("wait", "0"))
        if wait is None:
            return _error_response(400, "bad-request", "wait is the number of seconds to wait for a cancel")
        if self._key.value is None:
            return _error_response(503, "no-key", "the operator has no key yet, and can accept no token")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        uid: str | None = None
        try:
            if self._callers is not None and token and not is_token_of_check(token):
                await self._review(self._callers, request, key)
            else:
                now = self._clock().timestamp()
                uid = verify(self._key.value, key, token if scheme.lower() == "bearer" else "", now=now)
        except ForeignTokenError as error:
            return _error_response(403, "forbidden", str(error))
        except TokenError as error:
            return _error_response(401, "unauthorized", str(error))
        except Problem as problem:
            return _error_response(problem.status, _WORDS[problem.status], problem.detail)
        except KubeError:
            return _error_response(503, "unavailable", "the API server's time is not known yet: ask again")
        try:
            return web.json_response(await self._said(key, uid, wait))
        except NotFound as error:
            return _error_response(404, "gone", str(error))
        except KubeError:
            return _error_response(503, "unavailable", "the run could not be read from the API server: ask again")

    async def _review(self, callers: Callers, request: web.Request, key: RunKey) -> None:
        """Let people ask who may read the run. Raises Problem."""
        try:
            caller = await callers.authenticate(request)
            await callers.require(caller, "get", namespace=key.namespace, name=key.name)
        except KubeError:
            raise Problem(503, "the API server could not be asked about you: ask again") from None

    async def _said(self, key: RunKey, uid: str | None, wait: float) -> Mapping[str, Any]:
        """Return the answer; with `wait` not before it is final, or the time is over. Raises KubeError."""
        loop = asyncio.get_running_loop()
        until = loop.time() + wait
        event = asyncio.Event()
        self._waiting.setdefault(key, set()).add(event)
        try:
            while True:
                event.clear()  # before the read, so that what happens during the read is not missed
                said = await self._say(key, uid)
                left = until - loop.time()
                if left <= 0 or self._finishing or said["cancelled"] or said["completed"] or said["failed"]:
                    return said
                try:
                    async with asyncio.timeout(min(left, max(self._cache_seconds, 0.05))):
                        await event.wait()
                except TimeoutError:
                    continue
        finally:
            self._waiting[key].discard(event)
            if not self._waiting[key]:
                del self._waiting[key]

    async def _say(self, key: RunKey, uid: str | None) -> Mapping[str, Any]:
        """Return the answer as it is now. Raises KubeError, and NotFound with a sentence for the pod."""
        try:
            run = await self._look(key, uid or "")
        except NotFound:
            raise NotFound("the run is gone") from None
        if uid is not None and run["metadata"]["uid"] != uid:
            raise NotFound("the run is gone: another has its name now")
        said = answer(run)
        if not said["cancelled"] and not has_ended(run) and await self._cancelled_above(run):
            return answer(run, cancelled_above=True)
        return said

    async def _cancelled_above(self, run: Object) -> bool:
        """Tell whether a parent is Cancelled with `cascade`, because the run's own status will follow in a moment.

        A cancel that is only requested above does not count, because a pod may stop only if its run's cancel is
        inevitable, or its result is a failure. A parent that is gone or can't be read does not count. The
        children of one run share one read of it, as its own pods do.
        """
        for above in parents_of(run):
            try:
                parent = await self._look(above, "")
            except KubeError:
                continue
            if cancelled_with_cascade(parent):
                return True
        return False

    async def _look(self, key: RunKey, uid: str) -> Object:
        """Read the run, once for all requests at the same time or within the next second. Raises KubeError.

        Reads are shared by the UID as well, so that a run that was deleted and created again is not "gone" to its new
        pods for a second. Without a UID, the run that has the name is read.
        """
        entry = (key, uid)
        task = self._looks.get(entry)
        if task is None:
            task = self._looks[entry] = asyncio.create_task(self._cluster.get_run(key))
            task.add_done_callback(lambda task: self._looked(entry, task))
        return await asyncio.shield(task)

    def _looked(self, entry: tuple[RunKey, str], task: asyncio.Task[Object]) -> None:
        if not task.cancelled():
            task.exception()  # mark it retrieved, because the asking pod may have hung up
        asyncio.get_running_loop().call_later(self._cache_seconds, self._forget_look, entry, task)

    def _forget_look(self, entry: tuple[RunKey, str], task: asyncio.Task[Object]) -> None:
        if self._looks.get(entry) is task:
            del self._looks[entry]


def answer(run: Object, *, cancelled_above: bool = False) -> Mapping[str, Any]:
    """Return the check's answer about a run.

    A run also counts as cancelled if its cancel is requested but not in the status yet, or if it is being deleted,
    because the further work of a pod would be lost; and with `cancelled_above`.

    `execution_id`, `status` and `event_type` are what NoETL's check calls them, for its workers.
    """
    meta, status = run["metadata"], run.get("status") or {}
    phase = status.get("phase") or Phase.PENDING.value
    asked = cancel_requested(run) and not has_ended(run)
    cancelled = phase == Phase.CANCELLED or asked or "deletionTimestamp" in meta or cancelled_above
    word = Phase.CANCELLED.value if cancelled else "Completed" if phase == Phase.SUCCEEDED else phase
    return {
        "id": meta["uid"],
        "namespace": meta["namespace"],
        "name": meta["name"],
        "phase": phase,
        "cancelled": cancelled,
        "completed": phase == Phase.SUCCEEDED,
        "failed": phase == Phase.FAILED,
        "execution_id": meta["uid"],
        "status": word.upper(),
        "event_type": f"execution.{word.lower()}",
    }


_WORDS: Final = {401: "unauthorized", 403: "forbidden", 429: "too-many-requests", 503: "unavailable"}


def _seconds(text: str) -> float | None:
    """Read a wait; one that is too long is as long as it may be. Return None if it is no number of seconds."""
    try:
        seconds = float(text)
    except ValueError:
        return None
    return min(seconds, MOST_WAIT_SECONDS) if math.isfinite(seconds) and seconds >= 0 else None


def _error_response(status: int, error: str, message: str) -> web.Response:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    return web.json_response({"error": error, "message": message}, status=status, headers=headers)
