"""One replica: waits for the lease, then watches, plans and acts until it is stopped or loses the lease."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import signal
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import NoReturn

import kopf
import structlog
from kubernetes.aio.client import Configuration

from ingestrun.controller.http.callers import Callers
from ingestrun.controller.http.cancellation_check import CancellationCheck
from ingestrun.controller.http.health import Health
from ingestrun.controller.http.openapi import OpenApiDocument
from ingestrun.controller.http.people import PeopleApi
from ingestrun.controller.http.pool import PoolInbox, PoolRoutes
from ingestrun.controller.http.rate_limit import Rate
from ingestrun.controller.http.server import ApiServer
from ingestrun.controller.http.tls import GivenCertificate, OwnCertificate, ServerCertificate
from ingestrun.controller.http.tokens import CheckKey
from ingestrun.controller.logs import context_of_pass
from ingestrun.controller.reconcile.reconciler import Reconciler
from ingestrun.controller.reconcile.recorder import EventQueue
from ingestrun.controller.settings import Settings, instance_name
from ingestrun.controller.state.cache import RunCache
from ingestrun.controller.state.usage import Usage
from ingestrun.controller.watch.handlers import EventHandlers, operator_settings, registry
from ingestrun.controller.watch.orphans import OrphanCollector
from ingestrun.controller.watch.resync import resync_forever
from ingestrun.controller.watch.workqueue import WorkQueue
from ingestrun.kube.client import KubernetesCluster
from ingestrun.kube.connection import Connection, load_configuration
from ingestrun.kube.leader_election import LeaseLost, run_as_leader
from ingestrun.kube.protocol import RunKey
from ingestrun.planner.jobs.manifest import WorkerImage

logger = structlog.get_logger("ingestrun")

FAREWELL_SECONDS = 3.0
"""Seconds for which a replica that stops goes on posting its last Events."""
CREDENTIALS_LIFETIME = timedelta(minutes=10)
"""Time after which kopf asks for new credentials, because bound tokens are rotated and kopf reads a token once."""


class BeginAnewError(Exception):
    """Something has happened after which a new process has to begin with what there is: it needs no memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    """Access to the API server: the service account, or a kubeconfig and a context in it."""

    in_cluster: bool
    kubeconfig: str | None = None
    context: str | None = None

    async def connect(self) -> Connection:
        """Open a connection pool of its own. Raises KubeError without usable credentials."""
        return await Connection.open(kubeconfig=self.kubeconfig, context=self.context, in_cluster=self.in_cluster)

    async def configuration(self) -> Configuration:
        """Read the credentials anew. Raises KubeError."""
        return await load_configuration(kubeconfig=self.kubeconfig, context=self.context, in_cluster=self.in_cluster)


async def run(settings: Settings, access: Access, *, elect: bool) -> int:
    """Run one replica until SIGTERM or SIGINT and return the exit code. Raises KubeError without credentials.

    Raises BeginAnewError when the process has to begin anew; the lease is given back.

    Without `elect` (development alone) it acts at once: two such processes would act side by side.
    A LeaseLost is raised unchanged, because the caller has to end the process at once.
    """
    health = Health()
    calls, lease = await access.connect(), await access.connect()
    cluster = KubernetesCluster(calls, namespaces=settings.namespace_list or None)
    runner = await health.serve(settings.health_port) if settings.health_port else None
    ending = contextlib.AsyncExitStack()
    api = await _serve_api(settings, access, ending)

    async def lead() -> None:
        health.role = "leading"
        logger.info("leading", instance=instance_name())
        await _operate(settings, access, cluster, health, api=api)

    main: Callable[[], Awaitable[None]] = lead
    if elect:
        health.role = "standby"
        main = lambda: run_as_leader(  # noqa: E731
            lead,
            connection=lease,
            guarded=calls,
            namespace=settings.lease_namespace,
            name=settings.lease_name,
            identity=instance_name(),
        )
    task = asyncio.ensure_future(main())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        logger.info("stopped")
    except LeaseLost:
        raise
    finally:
        if runner is not None:
            await runner.cleanup()
        await ending.aclose()
        await calls.close()
        await lease.close()
    return 0


@dataclass(frozen=True, slots=True)
class ServedApi:
    """The parts of the HTTP API that the replica which leads has to do with."""

    check: CancellationCheck
    pool: PoolRoutes


async def _serve_api(settings: Settings, access: Access, ending: contextlib.AsyncExitStack) -> ServedApi | None:
    """Answer the HTTP API, on a connection that the lease does not guard, because a standby answers too."""
    if not (settings.api_url and settings.api_port):
        return None
    connection = await access.connect()
    ending.push_async_callback(connection.close)
    cluster = KubernetesCluster(connection, namespaces=settings.namespace_list or None)
    rate = Rate(per_second=settings.api_rate, burst=5 * settings.api_rate)
    callers = Callers(cluster, failures=Rate(per_second=rate.per_second / 40, burst=rate.burst // 3))
    key = CheckKey(cluster, namespace=settings.lease_namespace, alone=not access.in_cluster)
    certificate = _certificate(settings, access, cluster)
    check = CancellationCheck(
        cluster,
        key,
        url=settings.api_url,
        clock=connection.clock.now,
        ca=lambda: certificate.ca_pem if certificate else "",
        callers=callers,
    )
    pool = PoolRoutes(key, clock=connection.clock.now)
    people = PeopleApi(cluster, callers, clock=connection.clock.now, rate=rate)
    server = ApiServer(routes=[check, pool, people, OpenApiDocument()], certificate=certificate)
    ending.push_async_callback(server.close)
    await server.serve(settings.api_port)
    return ServedApi(check, pool)


def _certificate(settings: Settings, access: Access, cluster: KubernetesCluster) -> ServerCertificate | None:
    """Return what the API is served with; None: plain HTTP."""
    if settings.api_tls == "off":
        return None
    if settings.api_tls == "files":
        return GivenCertificate(settings.api_tls_dir)
    return OwnCertificate(
        cluster,
        namespace=settings.lease_namespace,
        url=settings.api_url,
        clock=cluster.connection.clock.now,
        alone=not access.in_cluster,
    )


async def _operate(
    settings: Settings,
    access: Access,
    cluster: KubernetesCluster,
    health: Health,
    *,
    api: ServedApi | None,
) -> None:
    check = api.check if api is not None else None
    for namespace, why in (await cluster.leave_out_refused_namespaces()).items():
        logger.error(
            "a namespace is left out until the operator restarts, it may not be read", namespace=namespace, why=why
        )
    usage = Usage(settings.caps, wake=lambda key: queue.add(key, "room"))
    usage.start_sync()
    cache = RunCache(usage)
    events = EventQueue(paused=lambda: queue.pressed)
    reconciler = Reconciler(
        cluster,
        cache,
        worker=WorkerImage(name=settings.worker_image, pull_policy=settings.worker_pull_policy),
        instance=instance_name(),
        user=settings.pod_user or None,
        clock=cluster.connection.clock.now,
        check=check.check_for if check else None,
        defer=events.put,
    )

    def context_of(key: RunKey) -> contextvars.Context:
        body = cache.run(key)
        uid = body["metadata"]["uid"] if body is not None else None
        return context_of_pass(name=key.name, namespace=key.namespace, uid=uid)

    queue: WorkQueue[RunKey] = WorkQueue(
        reconciler.reconcile,
        concurrency=settings.concurrency,
        urgent=cache.cancel_pending,
        patient=cache.ended,
        context=context_of,
    )
    orphans = OrphanCollector(cluster, cache)
    handlers = registry(EventHandlers(cache, queue, stopped=check.wake if check else lambda _: None))

    @kopf.on.login(registry=handlers, id="login")
    async def login(**_: object) -> kopf.ConnectionInfo:
        return connection_info(await access.configuration())

    if api is not None:
        api.pool.inbox = PoolInbox(cluster, cache, lambda key: queue.add(key, "worker"))
    posting = asyncio.create_task(events.run(), name="events")
    listed = asyncio.Event()

    async def watch() -> None:
        await listed.wait()
        try:
            await kopf.operator(
                registry=handlers,
                settings=operator_settings(),
                standalone=True,
                clusterwide=cluster.namespaces is None,
                namespaces=cluster.namespaces or (),
            )
        except Exception as error:
            # Such as "Too large resource version" after a restore; new watches begin with a list.
            raise BeginAnewError(f"the watches have ended, to begin anew: {error}") from error

    resync = asyncio.create_task(
        resync_forever(cluster, cache, queue, seconds=settings.resync_seconds, health=health, tried=listed),
        name="resync",
    )
    watching = asyncio.create_task(watch(), name="kopf")
    collecting = asyncio.create_task(orphans.run(), name="orphans")
    restored = asyncio.create_task(_end_when_restored(cache), name="restored")
    tasks = (resync, watching, collecting, restored)
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await queue.close()
        await events.finish(seconds=FAREWELL_SECONDS)
        posting.cancel()
        await asyncio.gather(*tasks, posting, return_exceptions=True)
    for task in done:
        task.result()


async def _end_when_restored(cache: RunCache) -> NoReturn:
    """Raise BeginAnewError once the cache has seen that the API server's data were restored from a backup."""
    await cache.went_back.wait()
    raise BeginAnewError(
        "the API server's data have gone back in time (restored from a backup?): this process ends, to begin anew"
    )


def connection_info(configuration: Configuration) -> kopf.ConnectionInfo:
    """Return the client's credentials in kopf's form, so that both load them in the same way.

    kopf's own default would prefer pykube-ng if it is installed, which ignores exec plugins.
    """
    header = (configuration.api_key or {}).get("authorization") or (configuration.api_key or {}).get("BearerToken")
    scheme, _, token = header.partition(" ") if header else ("", "", "")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        username=configuration.username or None,
        password=configuration.password or None,
        scheme=scheme or None,
        token=token or None,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        expiration=datetime.now(UTC) + CREDENTIALS_LIFETIME,  # noqa: TID251  (kopf compares it with this very clock)
    )
