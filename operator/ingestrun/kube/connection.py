"""A connection to the API server: its credentials, its pool, and single requests with a hard end.

`kubernetes.aio` loads the configuration (in-cluster, kubeconfig, exec plugins), authenticates, and makes the TLS
context. Requests are aiohttp's own, with their bytes encoded and decoded by orjson: the library's generated methods
validate every body by pydantic models of one Kubernetes version, which costs milliseconds a call and drops the fields
that those models don't know; and its plain calls copy each body before they encode it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from types import SimpleNamespace
from typing import Any, Final
from urllib.parse import quote, urlencode, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import orjson
from kubernetes.aio.client import Configuration
from kubernetes.aio.client.rest import RESTClientObject
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from ingestrun.kube.errors import READS, KubeError, Unavailable, Unknown, error_for
from ingestrun.kube.server_clock import CLOCK, ServerClock
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
    """Progress of one request: `sent_at` is the time (of `CLOCK`) just before it was (last) written."""

    sent_at: float | None = None


async def _note_sent(_session: aiohttp.ClientSession, context: SimpleNamespace, _params: object) -> None:
    context.trace_request_ctx.sent_at = CLOCK()


def _trace() -> aiohttp.TraceConfig:
    trace = aiohttp.TraceConfig()
    trace.on_request_headers_sent.append(_note_sent)
    return trace


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment (HTTPS_PROXY, NO_PROXY) has for this address, if any."""
    parts = urlsplit(url)
    if not parts.hostname or proxy_bypass(parts.hostname):
        return None
    return getproxies().get(parts.scheme)


def user_agent() -> str:
    """Return the name under which the API server logs the operator; what is before the slash is its field manager."""
    try:
        version = metadata.version("ingestrun")
    except metadata.PackageNotFoundError:
        version = "0+unknown"
    return f"{OPERATOR_NAME}/{version}"


async def load_configuration(*, kubeconfig: str | None, context: str | None, in_cluster: bool) -> Configuration:
    """Read the credentials and the address of the server, anew at every call.

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
    which the API server honours for every short request) on the server. No write is ever sent twice, with two
    exceptions: after a 401, which the server answers before it looks at the request; and aiohttp itself may repeat
    a DELETE or a PUT on a kept-alive connection that turned out closed, and all of these are safe to repeat.

    `may_write` is asked right before a write is sent, after any wait for a free slot: the lease puts its own
    clock there, so that a replica that was stalled past its lease sends nothing when it wakes.

    `clock` is the server's, which its answers show.
    """

    def __init__(
        self,
        configuration: Configuration,
        *,
        reload: Loader,
        request_timeout: float = REQUEST_TIMEOUT,
        concurrency: int = 32,
    ) -> None:
        """Make the pool; connects to nothing yet.

        `concurrency` bounds the calls under way and sizes the pool, so that no call waits for a connection.
        """
        if request_timeout <= 0 or concurrency < 1:
            raise ValueError("request_timeout must be above 0 seconds and concurrency at least 1")
        self.request_timeout = request_timeout
        self.may_write: Callable[[], bool] = lambda: True
        self.clock = ServerClock()
        self._slots = asyncio.Semaphore(concurrency)
        self._concurrency = concurrency
        self._reload = reload
        self._reload_lock = asyncio.Lock()
        self._reloaded_at = float("-inf")
        self._generation = 0
        self._abandoned_until = float("-inf")
        self._tasks: set[asyncio.Task[Any]] = set()
        self._configuration = configuration
        self._session = self._open_session(configuration)

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
        """Load the credentials and make a pool; connects to nothing yet. Raises KubeError without credentials."""

        async def load() -> Configuration:
            return await load_configuration(kubeconfig=kubeconfig, context=context, in_cluster=in_cluster)

        return cls(await load(), reload=load, request_timeout=request_timeout, concurrency=concurrency)

    def _open_session(self, configuration: Configuration) -> aiohttp.ClientSession:
        """Make a pool for these credentials."""
        # Without `trust_env`: aiohttp would look for a proxy and for ~/.netrc at every request, on two other threads.
        configuration.proxy = configuration.proxy or proxy_for(configuration.host)
        tls = RESTClientObject(configuration).ssl_context
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._concurrency, ssl=tls),
            headers={"Accept": "application/json", "User-Agent": user_agent()},
            timeout=aiohttp.ClientTimeout(total=self.request_timeout),
            trace_configs=[_trace()],
        )

    async def close(self) -> None:
        """Close the pool; requests under way fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._session.close()

    async def wait_for_abandoned_writes(self) -> None:
        """Wait until no write that was abandoned (cancelled, timed out, disconnected) can still be under way.

        That takes `request_timeout` seconds at most. Call it before the lease is given back: otherwise the next
        leader could start while the server still handles a request whose answer nobody here awaits.
        """
        await asyncio.sleep(max(0.0, self._abandoned_until - CLOCK()))

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
        data = None if body is None else _encode(body)
        url = f"{path}?{urlencode([*query, ('timeout', f'{int(self.request_timeout * 1000)}ms')], quote_via=quote)}"
        headers = {"Content-Type": content_type}
        async with self._slots:
            generation = self._generation
            status, answer = await self._send(method, url, headers, data)
            if status == 401 and await self._reload_credentials(generation):
                status, answer = await self._send(method, url, headers, data)
        if not 200 <= status < 300:
            raise error_for(status, answer, method=method)
        found = _decode(answer)
        if found is None:
            message = f"HTTP {status} to {method} without a JSON object: is this a Kubernetes API server?"
            raise (Unavailable if method in READS else Unknown)(message)
        return found

    async def _send(self, method: str, url: str, headers: Mapping[str, str], data: bytes | None) -> tuple[int, bytes]:
        progress = _Progress()
        write = method not in READS
        answered = False
        try:
            async with asyncio.timeout(self.request_timeout):
                configuration, session = self._configuration, self._session
                authorization = await _authorization(configuration)
                if write and not self.may_write():
                    raise Unavailable("this replica does not hold the lease: nothing was sent")
                response = await session.request(
                    method,
                    configuration.host + url,
                    headers={**headers, **authorization},
                    data=data,
                    proxy=configuration.proxy,
                    proxy_headers=configuration.proxy_headers,
                    server_hostname=configuration.tls_server_name,
                    trace_request_ctx=progress,
                )
                if response.status < 500 and progress.sent_at is not None:  # else a proxy may have answered
                    self.clock.learn(response.headers.get("Date"), sent_at=progress.sent_at)
                content = await response.read()
                answered = response.status < 500
                return response.status, content
        except (TimeoutError, aiohttp.ClientError, OSError, ConfigException) as error:
            message = str(error) or type(error).__name__
            if isinstance(error, TimeoutError):
                message = f"no answer to {method} within {self.request_timeout} s"
            maybe_done = write and progress.sent_at is not None
            raise (Unknown if maybe_done else Unavailable)(message) from error
        finally:
            if write and progress.sent_at is not None and not answered:
                self._abandoned_until = max(self._abandoned_until, progress.sent_at + self.request_timeout)

    async def _reload_credentials(self, generation: int) -> bool:
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
                session = self._open_session(configuration)
            except (KubeError, OSError, ValueError) as error:
                logger.warning("the API server refused our credentials; no new ones: %s", error)
                return False
            old, self._session = self._session, session
            self._configuration = configuration
            self._generation += 1
            self._retire(old)
            return True

    def _retire(self, session: aiohttp.ClientSession) -> None:
        """Close a replaced pool once the requests that use it have had their time."""

        async def close_later() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(self.request_timeout + 1)
            await session.close()

        task = asyncio.create_task(close_later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _authorization(configuration: Configuration) -> Mapping[str, str]:
    """Build the header that authenticates a request; the in-cluster token file is read again once a minute."""
    token = (await configuration.auth_settings()).get("BearerToken")
    return {token["key"]: token["value"]} if token and token["value"] else {}


def _encode(body: Any) -> bytes:
    """Encode a request's body."""
    try:
        return orjson.dumps(body)
    except TypeError:
        # Half of a surrogate pair, or an integer beyond 64 bits: the server decides about them, not the encoder.
        return json.dumps(body).encode()


def _decode(answer: bytes) -> Mapping[str, Any] | None:
    """Decode an answer; return None if it is not a JSON object."""
    try:
        found = orjson.loads(answer)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None
