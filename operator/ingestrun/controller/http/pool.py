"""The pool over HTTP: workers claim batches, report, and ask for permission to publish.

Only the replica that leads answers, because a claim is a status write of a pass. A request waits in the run's memory,
where the next pass finds it; all that wait together are answered by one write.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from datetime import datetime
from typing import Any, Final, TypeVar

from aiohttp import web
from pydantic import ValidationError

from ingestrun.controller.http.tokens import CheckKey, ForeignTokenError, TokenError, verify_worker
from ingestrun.controller.state.cache import RunCache
from ingestrun.kube.errors import KubeError, NotFound
from ingestrun.kube.protocol import Cluster, RunKey
from ingestrun.model import pool
from ingestrun.model.pool import ClaimAnswer, ClaimRequest, ErrorAnswer, FetchedRequest, Message, PublishRequest
from ingestrun.model.run import has_ended
from ingestrun.model.status import Phase
from ingestrun.planner.pool.late_reports import answers_after_end
from ingestrun.planner.pool.requests import Answer, Replaced, Request, WorkerRequest

POOL_PATH: Final = "/api/v1/namespaces/{namespace}/ingestruns/{name}/pool"
ANSWER_SECONDS: Final = 20.0
"""Time within which a result or a wish to publish is answered; then the worker asks again."""
STANDBY_SECONDS: Final = 0.1
"""Retry-After of a replica that does not lead: a new connection may reach the one that does."""
LATER_SECONDS: Final = 1.0
"""Retry-After of a replica that could not answer."""

M = TypeVar("M", bound=Message)


class PoolInbox:
    """Inbox of the replica that leads: hands requests to the passes, and awaits their answers."""

    def __init__(self, cluster: Cluster, cache: RunCache, look: Callable[[RunKey], None]) -> None:
        """Ask for a look at a run by `look`."""
        self._cluster = cluster
        self._cache = cache
        self._look = look

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
        self._look(key)
        try:
            return await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            return None
        finally:
            memory.requests.pop(request, None)


class PoolRoutes:
    """Routes of the pool. `inbox` is there while this replica leads."""

    def __init__(self, key: CheckKey, *, clock: Callable[[], datetime]) -> None:
        self._key = key
        self._clock = clock
        self.inbox: PoolInbox | None = None

    def add_to(self, router: web.UrlDispatcher) -> None:
        """Add the routes to those of a server."""
        router.add_post(f"{POOL_PATH}/{pool.CLAIM}", self._claim)
        router.add_post(f"{POOL_PATH}/{pool.FETCHED}", self._handler(FetchedRequest))
        router.add_post(f"{POOL_PATH}/{pool.PUBLISH}", self._handler(PublishRequest))

    async def _claim(self, request: web.Request) -> web.Response:
        return await self._serve(request, ClaimRequest)

    def _handler(
        self, model: type[FetchedRequest] | type[PublishRequest]
    ) -> Callable[[web.Request], Coroutine[Any, Any, web.Response]]:
        async def handle(request: web.Request) -> web.Response:
            return await self._serve(request, model)

        return handle

    async def _serve(
        self, request: web.Request, model: type[ClaimRequest] | type[FetchedRequest] | type[PublishRequest]
    ) -> web.Response:
        key = RunKey(namespace=request.match_info["namespace"], name=request.match_info["name"])
        if self._key.value is None:
            return _error(503, "no-key", "the operator has no key yet, and can accept no token", LATER_SECONDS)
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            now = self._clock().timestamp()
            uid, worker = verify_worker(self._key.value, key, token if scheme.lower() == "bearer" else "", now=now)
        except ForeignTokenError as error:
            return _error(403, "forbidden", str(error))
        except TokenError as error:
            return _error(401, "unauthorized", str(error))
        except KubeError:
            return _error(503, "unavailable", "the API server's time is not known yet", LATER_SECONDS)
        inbox = self.inbox
        if inbox is None:
            return _error(503, "standby", "this replica does not lead: ask again", STANDBY_SECONDS)
        try:
            body = model.model_validate_json(await request.read())
        except ValidationError as error:
            return _error(422, "invalid", pool.first_fault(error))
        except web.HTTPRequestEntityTooLarge:
            return _error(413, "too-large", f"a request has {pool.BODY_MAX_BYTES} bytes at most")
        return await _answer(inbox, key, uid, worker, body)


async def _answer(inbox: PoolInbox, key: RunKey, uid: str, worker: int, body: Request) -> web.Response:
    seconds = body.wait_seconds if isinstance(body, ClaimRequest) else ANSWER_SECONDS
    try:
        answer = await inbox.ask(key, uid, WorkerRequest(worker, body), seconds=seconds)
    except NotFound:
        return _error(404, "gone", "the run is gone")
    except KubeError:
        return _error(503, "unavailable", "the run could not be read from the API server", LATER_SECONDS)
    if isinstance(answer, Replaced):
        return _error(409, "replaced", answer.message)
    if answer is None and isinstance(body, ClaimRequest) and not body.reports:
        answer = ClaimAnswer(wait=True)
    if answer is None:
        return _error(503, "unavailable", "the operator has not got to it yet: ask again", LATER_SECONDS)
    return web.Response(body=answer.render(), content_type="application/json", headers={"Cache-Control": "no-store"})


def _error(status: int, error: str, message: str, retry_after: float | None = None) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    if retry_after is not None:
        headers["Retry-After"] = f"{retry_after:g}"
    body = ErrorAnswer(error=error, message=message[: pool.MESSAGE_MAX_CHARS]).render()
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)
