"""The cancellation check: pods ask by HTTP whether their run is cancelled.

Every replica answers, the standby as well, from a live read of the run, which all requests within a second share.
The check has its own connection, so that the requests of a thousand pods do not delay the reconciler's calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, Final

from aiohttp import web

from ingestrun.controller.http.tokens import CheckKey, ForeignTokenError, TokenError, issue, verify
from ingestrun.kube.errors import KubeError, NotFound
from ingestrun.kube.protocol import Cluster, Object, RunKey
from ingestrun.model.lineage import cancelled_with_cascade, parents_of
from ingestrun.model.run import IngestRun, cancel_requested, has_ended
from ingestrun.model.status import Phase
from ingestrun.planner.jobs.manifest import CheckEndpoint

PATH: Final = "/api/v1/namespaces/{namespace}/ingestruns/{name}/cancellation-check"
CACHE_SECONDS: Final = 1.0
TOKEN_WAIT_SECONDS: Final = 30 * 24 * 3600
"""Time after its Job's creation within which a pod's deadline has to begin for the token to be valid to the pod's end.

The deadline counts from the time at which a node accepts the pod, and the wait for that has no bound. A pod that waited
longer asks in vain and goes on, as without an answer: it can be cancelled like any other, but does not stop by itself.
"""


class CancellationCheckServer:
    """Server of the check: the endpoint, its key, and the values about both that Jobs get.

    `clock` is the API server's, because one replica judges the tokens that another has issued.
    """

    def __init__(
        self,
        cluster: Cluster,
        key: CheckKey,
        *,
        url: str,
        clock: Callable[[], datetime],
        cache_seconds: float = CACHE_SECONDS,
    ) -> None:
        self._cluster = cluster
        self._key = key
        self._url = url.rstrip("/")
        self._clock = clock
        self._cache_seconds = cache_seconds
        self._looks: dict[tuple[RunKey, str], asyncio.Task[Object]] = {}
        self._runner: web.AppRunner | None = None
        self._keeping: asyncio.Task[None] | None = None

    def check_for(self, run: IngestRun, deadline_seconds: int) -> CheckEndpoint | None:
        """Return the endpoint for a Job (see `planner.jobs.manifest.CheckEndpointFor`); None while there is no key."""
        if self._key.value is None:
            return None
        meta = run.metadata
        key = meta.key
        expiry = int(self._clock().timestamp()) + TOKEN_WAIT_SECONDS + deadline_seconds
        return CheckEndpoint(
            url=self._url + PATH.format(namespace=key.namespace, name=key.name),
            token=issue(self._key.value, key, uid=meta.uid, expiry=expiry),
        )

    async def serve(self, port: int, host: str | None = None) -> int:
        """Answer until `close`, and return the port. Raises OSError when it is taken."""
        # Before the first Job, because a Job that is created without a token can never ask.
        await self._key.try_refresh()
        self._keeping = asyncio.create_task(self._key.keep(), name="check-key")
        app = web.Application()
        app.router.add_get(PATH, self._answer, allow_head=False)
        # No access log, because it would be most of the log. The answer to a pod that has hung up is dropped.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, host=host, port=port).start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        """Stop answering."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        looks = list(self._looks.values())
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)

    async def _answer(self, request: web.Request) -> web.Response:
        key = RunKey(namespace=request.match_info["namespace"], name=request.match_info["name"])
        if self._key.value is None:
            return _error_response(503, "no-key", "the operator has no key yet, and can accept no token")
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        try:
            now = self._clock().timestamp()
            uid = verify(self._key.value, key, token if scheme.lower() == "bearer" else "", now=now)
        except ForeignTokenError as error:
            return _error_response(403, "forbidden", str(error))
        except TokenError as error:
            return _error_response(401, "unauthorized", str(error))
        except KubeError:
            return _error_response(503, "unavailable", "the API server's time is not known yet: ask again")
        try:
            run = await self._look(key, uid)
        except NotFound:
            return _error_response(404, "gone", "the run is gone")
        except KubeError:
            return _error_response(503, "unavailable", "the run could not be read from the API server: ask again")
        if run["metadata"]["uid"] != uid:
            return _error_response(404, "gone", "the run is gone: another has its name now")
        said = answer(run)
        if not said["cancelled"] and not has_ended(run):
            said = {**said, "cancelled": await self._cancelled_above(run)}
        return web.json_response(said, headers={"Cache-Control": "no-store"})

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
        asyncio.get_running_loop().call_later(self._cache_seconds, self._looks.pop, entry, None)


def answer(run: Object) -> Mapping[str, Any]:
    """Return the check's answer about a run.

    A run also counts as cancelled if its cancel is requested but not in the status yet, or if it is being deleted,
    because the further work of a pod would be lost.
    """
    meta, status = run["metadata"], run.get("status") or {}
    phase = status.get("phase")
    asked = cancel_requested(run) and not has_ended(run)
    return {
        "id": meta["uid"],
        "namespace": meta["namespace"],
        "name": meta["name"],
        "phase": phase or Phase.PENDING.value,
        "cancelled": phase == Phase.CANCELLED or asked or "deletionTimestamp" in meta,
        "completed": phase == Phase.SUCCEEDED,
        "failed": phase == Phase.FAILED,
    }


def _error_response(status: int, error: str, message: str) -> web.Response:
    headers = {"Cache-Control": "no-store"}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return web.json_response({"error": error, "message": message}, status=status, headers=headers)
