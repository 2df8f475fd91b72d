"""A connection to the API server: its credentials, its pool, and single requests with a hard end.

`kubernetes.aio` brings the configuration (in-cluster, kubeconfig, exec plugins), the authentication and the
pool. Its generated methods are left out: they validate every body by pydantic models of one Kubernetes
version, at milliseconds a call, and drop the fields that those don't know.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final, cast
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from ingestrun.kube.errors import READS, KubeError, Unavailable, Unknown, error_for
from ingestrun.model.names import OPERATOR_NAME

REQUEST_TIMEOUT: Final = 5.0
"""Seconds; see `leader_election.LeaseSettings` for the arithmetic that binds it to the lease."""
RELOAD_INTERVAL: Final = 10.0
"""Seconds between two reloads of the credentials: a revoked account must not run its exec plugin on every call."""
LOAD_TIMEOUT: Final = 60.0
"""Seconds for loading credentials; an exec plugin may ask its provider over the network."""

Loader = Callable[[], Awaitable[Configuration]]

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Progress:
    """How far one request came: `sent_at` is the monotonic time just before its first byte was written."""

    sent_at: float | None = None


_progress: ContextVar[_Progress | None] = ContextVar("ingestrun_request_progress", default=None)


async def _note_sent(*_: object) -> None:
    progress = _progress.get()
    if progress is not None and progress.sent_at is None:
        progress.sent_at = time.monotonic()


def _trace() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_note_sent)
    return trace


def proxy_for(url: str) -> str | None:
    """The proxy that the environment (HTTPS_PROXY, NO_PROXY) has for this address, if any."""
    parts = urlsplit(url)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


def user_agent() -> str:
    """How the API server's audit log and metrics name us."""
    try:
        version = metadata.version("ingestrun")
    except metadata.PackageNotFoundError:
        version = "0+unknown"
    return f"{OPERATOR_NAME}/{version}"


async def load_configuration(*, kubeconfig: str | None, context: str | None, in_cluster: bool) -> Configuration:
    """Credentials and address of the server, read anew at every call.

    In the cluster the token file is also read again once a minute by the library's own hook. Outside,
    `kubeconfig` None means $KUBECONFIG or ~/.kube/config; exec plugins are run.
    Raises KubeError with the reason when there is no usable configuration.
    """
    configuration = Configuration()
    try:
        if in_cluster:
            load_incluster_config(client_configuration=configuration)  # type: ignore[no-untyped-call]
        else:
            async with asyncio.timeout(LOAD_TIMEOUT):
                await load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=kubeconfig,
                    context=context,
                    client_configuration=configuration,
                    persist_config=False,
                )
    except (ConfigException, OSError, TimeoutError, AttributeError, TypeError) as error:
        # The library meets a missing file or section with AttributeError or TypeError on None.
        where = "the service account" if in_cluster else f"kubeconfig {kubeconfig or '(default)'}"
        raise KubeError(f"no usable credentials from {where}: {error}") from error
    return configuration


class Connection:
    """An authenticated pool to one API server.

    Every request ends within `request_timeout` seconds of being sent, here and (by the `timeout` parameter,
    which the API server honours for every short request) on the server. No write is ever sent twice, but
    after a 401, which the server answers before it looks at the request; aiohttp itself may repeat a DELETE
    on a kept-alive connection that turned out closed, and all of ours are safe to repeat.

    `may_write` is asked right before a write is sent, after any wait for a free slot: the lease puts its own
    clock there, so that a replica that was stalled past its lease sends nothing when it wakes.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        reload: Loader,
        request_timeout: float = REQUEST_TIMEOUT,
        concurrency: int = 32,
    ) -> None:
        """`concurrency` bounds the calls under way and sizes the pool: no call waits for a connection."""
        if request_timeout <= 0 or concurrency < 1:
            raise ValueError("request_timeout must be above 0 seconds and concurrency at least 1")
        self.request_timeout = request_timeout
        self.may_write: Callable[[], bool] = lambda: True
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._reload = reload
        self._reload_lock = asyncio.Lock()
        self._reloaded_at = float("-inf")
        self._generation = 0
        self._abandoned_until = float("-inf")
        self._tasks: set[asyncio.Task[Any]] = set()
        self.api = ApiClient(self._prepared(configuration))
        self.api.user_agent = user_agent()

    @classmethod
    async def open(
        cls,
        *,
        kubeconfig: str | None = None,
        context: str | None = None,
        in_cluster: bool = False,
        request_timeout: float = REQUEST_TIMEOUT,
        concurrency: int = 32,
    ) -> Connection:
        """Load the credentials; connects to nothing yet. Raises KubeError when there are none."""

        async def load() -> Configuration:
            return await load_configuration(kubeconfig=kubeconfig, context=context, in_cluster=in_cluster)

        return cls(await load(), reload=load, request_timeout=request_timeout, concurrency=concurrency)

    def _prepared(self, configuration: Configuration) -> Configuration:
        configuration.trace_configs = [_trace()]
        # aiohttp would look for a proxy and for ~/.netrc at every single request, on two other threads.
        configuration.proxy = configuration.proxy or proxy_for(configuration.host)
        configuration.client_session_kwargs = {"trust_env": False}
        configuration.connection_pool_maxsize = self._concurrency
        configuration.retries = None
        return configuration

    async def close(self) -> None:
        """Close the pool; requests under way fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.api.close()  # type: ignore[no-untyped-call]

    async def wait_for_abandoned_writes(self) -> None:
        """Wait until no write that was abandoned (cancelled, timed out, disconnected) can still be under way.

        That takes `request_timeout` seconds at most. Call it before the lease is given back: otherwise the next
        leader could start while the server still handles a request whose answer nobody here awaits.
        """
        await asyncio.sleep(max(0.0, self._abandoned_until - time.monotonic()))

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: Sequence[tuple[str, str]] = (),
        body: Any = None,
        content_type: str = "application/json",
    ) -> Mapping[str, Any]:
        """Send one request and return the JSON object of its answer.

        Raises the KubeError that the answer means; when there is no answer: Unknown for a write of which a
        byte may have left, Unavailable otherwise.
        """
        async with self._slots:
            generation = self._generation
            status, answer = await self._send(method, path, query, body, content_type)
            if status == 401 and await self._reloaded(generation):
                status, answer = await self._send(method, path, query, body, content_type)
        if not 200 <= status < 300:
            raise error_for(status, answer, method=method)
        found = _object(answer)
        if found is None:
            message = f"HTTP {status} to {method} without a JSON object: is this a Kubernetes API server?"
            raise (Unavailable if method in READS else Unknown)(message)
        return found

    async def _send(
        self,
        method: str,
        path: str,
        query: Sequence[tuple[str, str]],
        body: Any,
        content_type: str,
    ) -> tuple[int, bytes]:
        progress = _Progress()
        token = _progress.set(progress)
        write = method not in READS
        answered = False
        try:
            async with asyncio.timeout(self.request_timeout):
                request = await self.api.param_serialize(
                    method,
                    path,
                    query_params=[*query, ("timeout", f"{int(self.request_timeout * 1000)}ms")],
                    header_params={"Accept": "application/json", "Content-Type": content_type},
                    body=body,
                    auth_settings=["BearerToken"],
                )
                if write and not self.may_write():
                    raise Unavailable("this replica does not hold the lease: nothing was sent")
                response = await self.api.call_api(
                    *request, _request_timeout=self.request_timeout, _preload_content=False
                )
                content = cast(bytes, await response.read())  # type: ignore[no-untyped-call]
                status = cast(int, response.status)
                answered = status < 500
                return status, content
        except (TimeoutError, aiohttp.ClientError, OSError, ConfigException) as error:
            said = str(error) or type(error).__name__
            if isinstance(error, TimeoutError):
                said = f"no answer to {method} within {self.request_timeout} s"
            maybe_done = write and progress.sent_at is not None
            raise (Unknown if maybe_done else Unavailable)(said) from error
        finally:
            _progress.reset(token)
            if write and progress.sent_at is not None and not answered:
                self._abandoned_until = max(self._abandoned_until, progress.sent_at + self.request_timeout)

    async def _reloaded(self, generation: int) -> bool:
        """Load newer credentials than those of `generation`, unless another call has; return whether there are any.

        The reload goes on when the caller gives up: an exec plugin may take longer than a try of the election, and
        would otherwise be stopped halfway at every try.
        """
        task = asyncio.create_task(self._reload_once(generation), name="credentials")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return await asyncio.shield(task)

    async def _reload_once(self, generation: int) -> bool:
        async with self._reload_lock:
            if self._generation != generation:
                return True
            if time.monotonic() - self._reloaded_at < RELOAD_INTERVAL:
                return False
            self._reloaded_at = time.monotonic()
            try:
                configuration = await self._reload()
                client = RESTClientObject(self._prepared(configuration))
            except (KubeError, OSError, ValueError) as error:
                logger.warning("the API server refused our credentials; no new ones: %s", error)
                return False
            old, self.api.rest_client = self.api.rest_client, client
            self.api.configuration = configuration
            self._generation += 1
            self._retire(old)
            return True

    def _retire(self, client: RESTClientObject) -> None:
        """Close a replaced pool once the requests that use it have had their time."""

        async def close_later() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(self.request_timeout + 1)
            await client.close()

        task = asyncio.create_task(close_later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _object(answer: bytes) -> Mapping[str, Any] | None:
    """Decode an answer; None if it is not a JSON object."""
    try:
        found = json.loads(answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
