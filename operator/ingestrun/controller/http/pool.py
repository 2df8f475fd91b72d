"""The pool over HTTP: workers claim batches, report, and ask for permission to publish.

Only the replica that leads answers, because a claim is a status write of a pass. A request waits in the run's memory,
where the next pass finds it; all that wait together are answered by one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Final

from aiohttp import web
from pydantic import ValidationError

from ingestrun.controller.http.problems import Problem
from ingestrun.controller.http.rate_limit import Rate
from ingestrun.controller.http.server import Handler, RouteTable
from ingestrun.controller.http.tokens import CheckKey, ForeignTokenError, TokenError, verify_worker
from ingestrun.controller.state.cache import RunCache
from ingestrun.kube.errors import KubeError, NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model import pool
from ingestrun.model.pool import ClaimAnswer, ClaimRequest, FetchedRequest, PublishRequest
from ingestrun.model.run import has_ended
from ingestrun.model.status import Phase
from ingestrun.planner.pool.late_reports import answers_after_end
from ingestrun.planner.pool.requests import Answer, Replaced, Request, WorkerRequest

POOL_PATH: Final = "/api/v1/namespaces/{namespace}/ingestruns/{name}/pool"
ANSWER_SECONDS: Final = 20.0
"""Time within which a report, a result or a wish to publish is answered; then the worker asks again."""
STANDBY_SECONDS: Final = 0.1
"""Retry-After of a replica that does not lead: a new connection may reach the one that does."""
LATER_SECONDS: Final = 1.0
"""Retry-After of a replica that could not answer."""


class PoolInbox:
    """Inbox of the replica that leads: hands requests to the passes, and awaits their answers."""

    def __init__(self, cluster: Cluster, cache: RunCache, look: Callable[[RunKey], None]) -> None:
        """Ask for a look at a run by `look`."""
        self._cluster = cluster
        self._cache = cache
        self._look = look
        self._waiting: set[asyncio.Future[Answer]] = set()

    async def ask(self, key: RunKey, uid: str, request: WorkerRequest, *, seconds: float) -> Answer | None:
        """Return the answer to a worker of the run with this UID; None if there is none within the time.

        Raises NotFound if the run is gone, KubeError if that could not be found out.
        """
        body = self._cache.run(key)
        if body is None or body["metadata"]["uid"] != uid:
            body = await self._cluster.get_run(key)
            if body["metadata"]["uid"] != uid:
                raise NotFound("another run has its name now")
            self._cache.upsert_run(body)
        if has_ended(body) and (self._cache.is_archived(uid) or not request.reports):
            return answers_after_end(Phase(body["status"]["phase"]), [request])[request]
        memory = self._cache.memories.recall(uid)
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        memory.requests[request] = answer
        self._waiting.add(answer)
        self._look(key)
        try:
            done, _ = await asyncio.wait([answer], timeout=seconds)
            return answer.result() if done and not answer.cancelled() else None
        finally:
            memory.requests.pop(request, None)
            self._waiting.discard(answer)

    def close(self) -> None:
        """Let all who wait go without an answer: they ask the next replica that leads."""
        for answer in self._waiting:
            answer.cancel()


class PoolRoutes(RouteTable):
    """Routes of the pool. `inbox` is there while this replica leads."""

    rate = Rate(per_second=100, burst=400)
    """For one worker, by its token: one with a batch a tenth of a second asks twice for each."""
    seconds = pool.WAIT_MAX_SECONDS + 15.0

    def __init__(self, key: CheckKey, *, clock: Callable[[], datetime]) -> None:
        self._key = key
        self._clock = clock
        self.inbox: PoolInbox | None = None

    def routes(self) -> Iterable[web.RouteDef]:
        """Return one route for each kind of request."""
        yield web.post(f"{POOL_PATH}/{pool.CLAIM}", self._handler(ClaimRequest))
        yield web.post(f"{POOL_PATH}/{pool.FETCHED}", self._handler(FetchedRequest))
        yield web.post(f"{POOL_PATH}/{pool.PUBLISH}", self._handler(PublishRequest))

    async def finish(self) -> None:
        """Let long polls go, because the server stops."""
        if self.inbox is not None:
            self.inbox.close()

    def _handler(self, model: type[ClaimRequest] | type[FetchedRequest] | type[PublishRequest]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            key = RunKey(namespace=request.match_info["namespace"], name=request.match_info["name"])
            uid, worker = self._worker(key, request)
            if self.inbox is None:
                raise _later("this replica does not lead: ask again", STANDBY_SECONDS)
            try:
                body = model.model_validate_json(await request.read())
            except ValidationError as error:
                raise Problem(422, pool.first_fault(error)) from None
            return await _answer(self.inbox, key, uid, WorkerRequest(worker, body))

        return handle

    def _worker(self, key: RunKey, request: web.Request) -> tuple[str, int]:
        """Return the UID of the run and the number of the worker that asks, by its token. Raises Problem."""
        if self._key.value is None:
            raise _later("the operator has no key yet, and can accept no token", LATER_SECONDS)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            now = self._clock().timestamp()
            return verify_worker(self._key.value, key, token if scheme.lower() == "bearer" else "", now=now)
        except ForeignTokenError as error:
            raise Problem(403, str(error)) from None
        except TokenError as error:
            raise Problem(401, str(error)) from None
        except KubeError:
            raise _later("the API server's time is not known yet: ask again", LATER_SECONDS) from None


async def _answer(inbox: PoolInbox, key: RunKey, uid: str, request: WorkerRequest) -> web.Response:
    try:
        answer = await inbox.ask(key, uid, request, seconds=_patience(request.body))
    except NotFound:
        raise Problem(404, "the run is gone", error="gone") from None
    except KubeError:
        raise _later("the run could not be read from the API server: ask again", LATER_SECONDS) from None
    if isinstance(answer, Replaced):
        raise Problem(409, answer.message, error="replaced")
    if answer is None and isinstance(request.body, ClaimRequest) and not request.reports:
        answer = ClaimAnswer(wait=True)
    if answer is None:
        raise _later("the operator has not got to it yet: ask again", LATER_SECONDS)
    return web.Response(body=answer.render(), content_type="application/json")


def _patience(body: Request) -> float:
    """Return the seconds for which a request waits. Reports wait longer than the worker asks, because they are news."""
    if not isinstance(body, ClaimRequest):
        return ANSWER_SECONDS
    return max(body.wait_seconds, ANSWER_SECONDS) if body.reports else body.wait_seconds


def _later(why: str, seconds: float) -> Problem:
    return Problem(503, why, headers={"Retry-After": f"{seconds:g}"})
