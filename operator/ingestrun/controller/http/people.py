"""People's API: runs to read, to cancel and to clean up over HTTP, with the rights that one has by kubectl.

Every replica answers. A cancel is a patch of the spec in the caller's name; the status is the leader's to write, so the
answer waits until it has been.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final

import structlog
from aiohttp import web

from ingestrun.controller.http.callers import Caller, Callers, refusal
from ingestrun.controller.http.canceller import (
    EndedError,
    Judge,
    LeftAloneError,
    RunCanceller,
    Settled,
    phase_of,
)
from ingestrun.controller.http.problems import Problem
from ingestrun.controller.http.rate_limit import Rate
from ingestrun.controller.http.requests import (
    MOST_RUNS,
    BulkCancelRequest,
    CancelRequest,
    CleanUpRequest,
    ListQuery,
    namespace_of,
    read_body,
    read_query,
    refuse_query,
    run_of,
    uid_of,
)
from ingestrun.controller.http.server import Handler, RouteTable
from ingestrun.kube.errors import Denied, Expired, Forbidden, Invalid, KubeError, NotFound
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model.run import cancel_requested, has_ended
from ingestrun.model.status import Phase
from ingestrun.model.stillness import last_progress, may_be_stale

logger = structlog.get_logger("ingestrun.http")

NAMESPACE: Final = "/api/v1/namespaces/{namespace}"
RUNS: Final = NAMESPACE + "/ingestruns"
RUN: Final = RUNS + "/{name}"
BY_UID: Final = "/api/v1/ingest-runs/{uid}"
WAIT_SECONDS: Final = 10.0
"""Time for which a cancel waits for the operator."""
UID_SECONDS: Final = 5.0
"""Time for which a list of all runs' UIDs serves those who name a run by it."""
CANCEL_VERBS: Final = ("patch", "update")
"""Verbs of which one is enough to cancel, as it is by kubectl."""


class PeopleApi(RouteTable):
    """Route table of the API for people and their scripts. `clock` is the API server's."""

    seconds = 60.0

    def __init__(
        self,
        cluster: Cluster,
        callers: Callers,
        *,
        clock: Callable[[], datetime],
        rate: Rate = RouteTable.rate,
        wait_seconds: float = WAIT_SECONDS,
        uid_seconds: float = UID_SECONDS,
    ) -> None:
        self.rate = rate
        self._cluster = cluster
        self._callers = callers
        self._canceller = RunCanceller(cluster)
        self._clock = clock
        self._wait_seconds = wait_seconds
        self._uids = UidIndex(cluster, seconds=uid_seconds)

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the routes; `openapi.json` describes them."""
        get = {
            RUNS: self._list,
            RUN: self._get,
            BY_UID: self._get_by_uid,
        }
        post = {
            f"{NAMESPACE}/cancel": self._cancel_many,
            f"{NAMESPACE}/clean-up": self._clean_up,
            f"{RUN}/cancel": self._cancel,
            f"{BY_UID}/cancel": self._cancel_by_uid,
        }
        for path, handler in get.items():
            yield web.get(path, answering_problems(handler), allow_head=False)
        for path, handler in post.items():
            yield web.post(path, answering_problems(handler))

    # ---- reading

    async def _list(self, request: web.Request) -> web.Response:
        caller, namespace = await self._callers.authenticate(request), namespace_of(request)
        query = read_query(request, ListQuery)
        await self._callers.require(caller, "list", namespace=namespace)
        page = await self._cluster.list_run_page(
            namespace=namespace,
            limit=query.limit,
            selector=query.label_selector or "",
            fields=_phase_selector(query.phase) if query.phase is not None else "",
            token=query.token,
        )
        meta = page.get("metadata") or {}
        body: dict[str, Any] = {"items": [_shown(run) for run in page.get("items") or ()]}
        if meta.get("continue"):
            body["continue"] = meta["continue"]
        return web.json_response(body)

    async def _get(self, request: web.Request) -> web.Response:
        caller, key = await self._callers.authenticate(request), run_of(request)
        refuse_query(request)
        await self._callers.require(caller, "get", namespace=key.namespace, name=key.name)
        return web.json_response(_shown(await self._cluster.get_run(key)))

    async def _get_by_uid(self, request: web.Request) -> web.Response:
        caller, uid = await self._callers.authenticate(request), uid_of(request)
        refuse_query(request)
        key = await self._by_uid(caller, uid, "get")
        run = await self._cluster.get_run(key)
        if run["metadata"]["uid"] != uid:
            raise _no_such_uid()
        return web.json_response(_shown(run))

    async def _by_uid(self, caller: Caller, uid: str, *verbs: str) -> RunKey:
        """Return which run has the UID. Raises Problem (404) also if the caller may do none of `verbs` with it."""
        key = await self._uids.find(uid)
        if key is None or not await self._callers.may_any(caller, verbs, namespace=key.namespace, name=key.name):
            raise _no_such_uid()
        return key

    # ---- cancelling one

    async def _cancel(self, request: web.Request) -> web.Response:
        caller, key = await self._callers.authenticate(request), run_of(request)
        refuse_query(request)
        body = await read_body(request, CancelRequest)
        await self._callers.require(caller, *CANCEL_VERBS, namespace=key.namespace, name=key.name)
        return await self._cancelled(caller, key, body)

    async def _cancel_by_uid(self, request: web.Request) -> web.Response:
        caller, uid = await self._callers.authenticate(request), uid_of(request)
        refuse_query(request)
        body = await read_body(request, CancelRequest)
        key = await self._by_uid(caller, uid, *CANCEL_VERBS)
        return await self._cancelled(caller, key, body, uid=uid)

    async def _cancelled(
        self, caller: Caller, key: RunKey, body: CancelRequest, *, uid: str | None = None
    ) -> web.Response:
        try:
            asked = await self._ask(caller, key, body, uid=uid)
        except EndedError as error:
            raise _conflict(error) from None
        settled = await self._settle({key: asked}, cascade=_cascades(asked))
        one = settled[key]
        if one.run is None:
            raise Problem(404, f"the run {key.name} is gone")
        if has_ended(one.run) and not one.cancelled:
            raise _conflict(EndedError(one.run))
        said = _outcome(key, one)
        answer = {
            "status": said["status"],
            "message": _summary([said]),
            "run": _shown(one.run),
            "cancelled_runs": said["cancelled_runs"],
            "pending_runs": said["pending_runs"],
        }
        return web.json_response(answer, status=200 if one.cancelled and one.done else 202)

    async def _ask(
        self, caller: Caller, key: RunKey, body: CancelRequest, *, uid: str | None = None, judge: Judge | None = None
    ) -> Object:
        """Ask for the cancel in the caller's name. Raises as `RunCanceller.ask`."""
        asked = await self._canceller.ask(key, by=caller.name, cancellation=body.cancellation(), uid=uid, judge=judge)
        logger.info("cancel requested over HTTP", run=key.name, namespace=key.namespace, by=caller.name)
        return asked

    async def _settle(self, asked: Mapping[RunKey, Object], *, cascade: bool) -> Mapping[RunKey, Settled]:
        return await self._canceller.settle(asked, cascade=cascade, seconds=self._wait_seconds)

    # ---- cancelling many

    async def _cancel_many(self, request: web.Request) -> web.Response:
        caller, namespace = await self._callers.authenticate(request), namespace_of(request)
        refuse_query(request)
        body = await read_body(request, BulkCancelRequest)
        left = 0
        if body.names is not None:
            await self._require_any(caller, namespace, body.names)
            keys = [RunKey(namespace=namespace, name=name) for name in dict.fromkeys(body.names)]
        else:
            runs = await self._select(caller, namespace, body.label_selector)
            keys = [RunKey.of(run) for run in runs if not has_ended(run)]
            left = max(0, len(keys) - MOST_RUNS)
        return await self._answer_for_many(caller, keys[:MOST_RUNS], body, dry_run=body.dry_run, left=left)

    async def _clean_up(self, request: web.Request) -> web.Response:
        caller, namespace = await self._callers.authenticate(request), namespace_of(request)
        refuse_query(request)
        body = await read_body(request, CleanUpRequest)
        runs = await self._select(caller, namespace, body.label_selector)
        patience = timedelta(seconds=body.stale_seconds)

        async def judge(run: Object) -> str | None:
            if not may_be_stale(run, cancelled=cancel_requested(run)):
                return f"it is {phase_of(run)}" if has_ended(run) else "it is suspended, or about to end"
            jobs: Sequence[Object] = ()
            if self._clock() - last_progress(run) >= patience:  # else there is nothing that its Jobs could add
                jobs = await self._cluster.list_jobs(namespace=namespace, run_uid=run["metadata"]["uid"])
            still = self._clock() - last_progress(run, jobs)
            return None if still >= patience else f"it made progress {int(still.total_seconds())} s ago"

        now = self._clock()
        candidates = [
            run
            for run in runs
            if may_be_stale(run, cancelled=cancel_requested(run)) and now - last_progress(run) >= patience
        ]
        reason = body.reason or f"no progress for {body.stale_seconds} s"
        return await self._answer_for_many(
            caller,
            [RunKey.of(run) for run in candidates[:MOST_RUNS]],
            body.model_copy(update={"reason": reason}),
            dry_run=body.dry_run,
            left=max(0, len(candidates) - MOST_RUNS),
            judge=judge,
        )

    async def _require_any(self, caller: Caller, namespace: str, names: Sequence[str]) -> None:
        """Refuse the whole request to a caller who may cancel none of the runs. Raises Problem (403)."""
        if await self._callers.may_any(caller, CANCEL_VERBS, namespace=namespace):
            return
        for name in names:
            if await self._callers.may_any(caller, CANCEL_VERBS, namespace=namespace, name=name):
                return
        raise Problem(403, refusal(caller, CANCEL_VERBS[0], namespace=namespace))

    async def _select(self, caller: Caller, namespace: str, selector: str | None) -> list[Object]:
        """Return the runs of these labels, page by page, for a caller who may list them. Raises Problem, KubeError."""
        await self._callers.require(caller, "list", namespace=namespace)
        found: list[Object] = []
        token = ""
        while True:
            page = await self._cluster.list_run_page(
                namespace=namespace, limit=MOST_RUNS, selector=selector or "", token=token
            )
            found += page.get("items") or ()
            token = (page.get("metadata") or {}).get("continue") or ""
            if not token:
                return found

    async def _answer_for_many(
        self,
        caller: Caller,
        keys: Sequence[RunKey],
        body: CancelRequest,
        *,
        dry_run: bool,
        left: int,
        judge: Judge | None = None,
    ) -> web.Response:
        """Ask for the cancel of each, wait for all, and answer with a result for each."""
        asked: dict[RunKey, Object] = {}
        attempt = partial(self._attempt, caller, body, asked, dry_run=dry_run, judge=judge)
        refused = dict(zip(keys, await asyncio.gather(*map(attempt, keys)), strict=True))
        settled = await self._settle(asked, cascade=body.cascade is True) if asked else {}
        results = [refused[key] or _outcome(key, settled[key]) for key in keys]
        answer = {"message": _summary(results), "results": results, "remaining": left}
        return web.json_response(answer)

    async def _attempt(
        self,
        caller: Caller,
        body: CancelRequest,
        asked: dict[RunKey, Object],
        key: RunKey,
        *,
        dry_run: bool,
        judge: Judge | None,
    ) -> Mapping[str, Any] | None:
        """Ask for the cancel of one run of many, and add it to `asked`; or return what stands against it."""
        try:
            if not await self._may_cancel(caller, key):
                return _result(
                    key, "forbidden", refusal(caller, CANCEL_VERBS[0], namespace=key.namespace, name=key.name)
                )
            if not dry_run:
                asked[key] = await self._ask(caller, key, body, judge=judge)
                return None
            run = await self._cluster.get_run(key)
            if has_ended(run):
                raise EndedError(run)
            why = await judge(run) if judge is not None else None
            if why is not None:
                raise LeftAloneError(why)
            return _result(key, "would-cancel", "it would be cancelled (dry run)")
        except EndedError as error:
            return _result(key, "conflict", str(error), phase=phase_of(error.run))
        except LeftAloneError as error:
            return _result(key, "skipped", f"left alone: {error}")
        except NotFound:
            return _result(key, "not-found", f"there is no run {key.name}")
        except KubeError as error:
            return _result(key, "error", problem_of(error).detail)

    async def _may_cancel(self, caller: Caller, key: RunKey) -> bool:
        """Tell whether the caller may cancel the run; who may cancel all of the namespace is not asked for each."""
        if await self._callers.may_any(caller, CANCEL_VERBS, namespace=key.namespace):
            return True
        return await self._callers.may_any(caller, CANCEL_VERBS, namespace=key.namespace, name=key.name)


class UidIndex:
    """The runs by their UIDs, by a list of all that is made at most every few seconds, and only if somebody asks."""

    def __init__(self, cluster: Cluster, *, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._cluster = cluster
        self._seconds = seconds
        self._clock = clock
        self._made_at = float("-inf")
        self._listing = asyncio.Lock()
        self._keys: dict[str, RunKey] = {}

    async def find(self, uid: str) -> RunKey | None:
        """Return which run has the UID; a run that is younger than a few seconds may be unknown. Raises KubeError."""
        async with self._listing:
            if uid not in self._keys and self._clock() - self._made_at >= self._seconds:
                found = await self._cluster.list_runs(lambda run: (run["metadata"]["uid"], RunKey.of(run)))
                self._keys, self._made_at = dict(found), self._clock()
        return self._keys.get(uid)


def answering_problems(handler: Callable[[web.Request], Awaitable[web.Response]]) -> Handler:
    """Return the handler with the API server's errors as problems."""

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except KubeError as error:
            raise problem_of(error) from error

    return answer


def problem_of(error: KubeError) -> Problem:
    """Return the problem that an error of the API server is for who calls us."""
    match error:
        case Expired():
            return Problem(410, "the continue token is too old: begin the list anew")
        case NotFound():
            return Problem(404, str(error))
        case Denied():
            return Problem(403, str(error))
        case Invalid():
            return Problem(422, str(error))
        case Forbidden():
            return Problem(503, f"the operator itself may not do this: {error}")
    return Problem(503, f"the API server could not be asked: {error}", headers={"Retry-After": "1"})


def _phase_selector(phase: Phase) -> str:
    """Return the field selector for a phase. A run that no operator has seen yet has none, and counts as Pending."""
    if phase != Phase.PENDING:
        return f"status.phase={phase.value}"
    return ",".join(f"status.phase!={other.value}" for other in Phase if other != Phase.PENDING)


def _shown(run: Object) -> Object:
    """Return the run without what nobody reads."""
    meta = {name: value for name, value in run["metadata"].items() if name != "managedFields"}
    return {**run, "metadata": meta}


def _cascades(run: Object) -> bool:
    return ((run.get("spec") or {}).get("cancellation") or {}).get("cascade") is True


def _no_such_uid() -> Problem:
    return Problem(404, "there is no run of this UID that you may see")


def _conflict(error: EndedError) -> Problem:
    record = (error.run.get("status") or {}).get("cancellation")
    more = {"cancellation": record} if record else {}
    return Problem(409, str(error), phase=phase_of(error.run), run=_shown(error.run), cancelled_runs=[], **more)


def _result(key: RunKey, status: str, message: str, **more: Any) -> Mapping[str, Any]:
    return {"name": key.name, "status": status, "message": message, "cancelled_runs": [], "pending_runs": []} | more


def _outcome(key: RunKey, settled: Settled) -> Mapping[str, Any]:
    """Return the result of a cancel that was asked for."""
    if settled.run is None:
        return _result(key, "not-found", f"the run {key.name} is gone")
    if settled.cancelled:
        below, pending = list(settled.below), list(settled.pending_below)
        status = "pending" if pending else "cancelled"
        told = {"cancelled_runs": [key.name, *below], "pending_runs": pending}
        return _result(key, status, "it is Cancelled", phase=Phase.CANCELLED.value, **told)
    if has_ended(settled.run):
        return _result(key, "conflict", str(EndedError(settled.run)), phase=phase_of(settled.run))
    sentence = "the cancel is requested, and the operator has not got to it yet"
    return _result(key, "pending", sentence, phase=phase_of(settled.run), pending_runs=[key.name])


def _summary(results: Sequence[Mapping[str, Any]]) -> str:
    """Return what has become of all, in a line."""
    cancelled = len({name for result in results for name in result["cancelled_runs"]})
    pending = len({name for result in results for name in result["pending_runs"]})
    would = sum(result["status"] == "would-cancel" for result in results)
    others = sum(result["status"] not in ("cancelled", "pending", "would-cancel") for result in results)
    told = f"Would cancel {would} run(s)" if would else f"Cancelled {cancelled} run(s)"
    told += f", {pending} more requested" if pending else ""
    return f"{told}, {others} not" if others else told
