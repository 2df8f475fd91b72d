"""The client against a real HTTP server: what it sends, what it makes of each answer, and of none."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration
from tests.fakes.loopback import Loopback, loopback, status_body

from ingestrun.kube import errors
from ingestrun.kube.client import LIST_ATTEMPTS, PAGE, KubernetesCluster
from ingestrun.kube.connection import Connection, proxy_for
from ingestrun.kube.protocol import RunKey

KEY = RunKey(namespace="default", name="geo")
JOB = {
    "apiVersion": "batch/v1",
    "kind": "Job",
    "metadata": {"namespace": "default", "name": "j"},
    "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [{"name": "c", "image": "i"}]}}},
}

Ask = Callable[[KubernetesCluster], Awaitable[Any]]


def get_run(cluster: KubernetesCluster) -> Awaitable[Any]:
    return cluster.get_run(KEY)


def create_job(cluster: KubernetesCluster) -> Awaitable[Any]:
    return cluster.create_job(JOB)


def write_status(cluster: KubernetesCluster) -> Awaitable[Any]:
    return cluster.write_status(KEY, resource_version="7", status={"phase": "Running", "cursor": None})


def list_jobs(cluster: KubernetesCluster) -> Awaitable[Any]:
    return cluster.list_jobs(namespace="default", run_uid="u-1")


def answers(code: int, body: Any) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    async def handler(_: web.Request) -> web.StreamResponse:
        if isinstance(body, str):
            return web.Response(status=code, text=body)
        return web.json_response(body, status=code)

    return handler


# Bodies as Kubernetes 1.36.3 sends them.
EXISTS = status_body(409, "AlreadyExists", 'jobs.batch "j" already exists')
STALE = status_body(
    409,
    "Conflict",
    'Operation cannot be fulfilled on ingestruns.ingestrun.dev "geo": the object has been modified; please apply '
    "your changes to the latest version and try again",
)
QUOTA = status_body(
    403,
    "Forbidden",
    'jobs.batch "j" is forbidden: exceeded quota: jobs, requested: count/jobs.batch=1, used: count/jobs.batch=9, '
    "limited: count/jobs.batch=9",
)
TERMINATING = status_body(
    403,
    "Forbidden",
    'jobs.batch "j" is forbidden: unable to create new content in namespace default because it is being terminated',
    causes=[
        {
            "reason": "NamespaceTerminating",
            "message": "namespace default is being terminated",
            "field": "metadata.namespace",
        }
    ],
)
RBAC = status_body(403, "Forbidden", 'jobs.batch is forbidden: User "bob" cannot list resource "jobs"')
FENCE = status_body(
    422,
    "Invalid",
    "jobs.batch \"j\" is forbidden: ValidatingAdmissionPolicy 'fence' with binding 'fence' denied request: run geo "
    "is Cancelled",
)
WEBHOOK = 'admission webhook "names.example.com" denied the request: call it geo-*'
WEBHOOK_DOWN = status_body(
    500,
    "InternalError",
    'Internal error occurred: failed calling webhook "names.example.com": failed to call webhook: Post '
    '"https://names.default.svc:443/?timeout=10s": dial tcp 10.96.7.7:443: connect: connection refused',
)
LIMITS = status_body(403, "Forbidden", 'jobs.batch "j" is forbidden: no value is given for "team"')
RULE = status_body(422, "Invalid", 'IngestRun.ingestrun.dev "geo" is invalid: spec.cancel: Invalid value: ...')
STRICT = status_body(400, "BadRequest", 'strict decoding error: unknown field "spec.wrong"')
NO_NAMESPACE = status_body(404, "NotFound", 'namespaces "default" not found')
BUSY = status_body(429, "TooManyRequests", "too many requests, please try again later")
LEADER = status_body(500, "InternalError", "etcdserver: leader changed")
TIMEOUT = status_body(504, "Timeout", "Timeout: request did not complete within the allotted timeout")
QUOTA_RACE = status_body(409, "Conflict", 'Operation cannot be fulfilled on resourcequotas "jobs": ...')


@pytest.mark.parametrize(
    ("ask", "code", "body", "error"),
    [
        (get_run, 404, status_body(404, "NotFound", '"geo" not found'), errors.NotFound),
        (get_run, 404, "404 page not found", errors.NotFound),
        (get_run, 403, RBAC, errors.Forbidden),
        (get_run, 401, status_body(401, "Unauthorized", "Unauthorized"), errors.Forbidden),
        (get_run, 429, BUSY, errors.Unavailable),
        (get_run, 500, LEADER, errors.Unavailable),
        (get_run, 503, "<html>upstream connect error</html>", errors.Unavailable),
        (get_run, 504, TIMEOUT, errors.Unavailable),
        (get_run, 200, "<html>a captive portal</html>", errors.Unavailable),
        (get_run, 200, ["a list"], errors.Unavailable),
        (list_jobs, 410, status_body(410, "Expired", "The provided continue parameter is too old"), errors.Unavailable),
        (create_job, 404, NO_NAMESPACE, errors.NotFound),
        (create_job, 403, TERMINATING, errors.NamespaceTerminating),
        (create_job, 403, QUOTA, errors.QuotaExceeded),
        (create_job, 403, RBAC, errors.Forbidden),
        (create_job, 403, status_body(403, "Forbidden", "failed quota: q: must specify cpu"), errors.Forbidden),
        (create_job, 422, FENCE, errors.Denied),
        (create_job, 403, status_body(403, "Forbidden", WEBHOOK), errors.Denied),
        (create_job, 400, status_body(400, "BadRequest", WEBHOOK), errors.Denied),
        (create_job, 404, status_body(404, "NotFound", WEBHOOK), errors.Denied),
        (create_job, 429, status_body(429, "TooManyRequests", WEBHOOK), errors.Unavailable),
        (create_job, 500, status_body(500, "InternalError", WEBHOOK), errors.WebhookUnavailable),
        (create_job, 500, WEBHOOK_DOWN, errors.WebhookUnavailable),
        (create_job, 403, LIMITS, errors.Forbidden),
        (create_job, 422, RULE, errors.Invalid),
        (create_job, 400, STRICT, errors.Invalid),
        (create_job, 409, EXISTS, errors.AlreadyExists),
        (create_job, 409, QUOTA_RACE, errors.Unavailable),
        (create_job, 429, BUSY, errors.Unavailable),
        (create_job, 500, LEADER, errors.Unknown),
        (create_job, 503, "", errors.Unknown),
        (create_job, 504, TIMEOUT, errors.Unknown),
        (create_job, 201, "<html>", errors.Unknown),
        (create_job, 201, ["a list"], errors.Unknown),
        (write_status, 409, STALE, errors.Conflict),
        (write_status, 404, status_body(404, "NotFound", '"geo" not found'), errors.NotFound),
        (write_status, 422, RULE, errors.Invalid),
        (write_status, 502, "bad gateway", errors.Unknown),
        (write_status, 415, status_body(415, "UnsupportedMediaType", "no"), errors.Invalid),
    ],
)
async def test_each_answer_is_one_error(ask: Ask, code: int, body: Any, error: type[errors.KubeError]) -> None:
    async with loopback(answers(code, body)) as server:
        cluster = KubernetesCluster(await server.connection())
        with pytest.raises(error) as raised:
            await ask(cluster)
        await cluster.close()
    assert type(raised.value) is error
    if isinstance(body, dict):
        assert error is errors.Unavailable or str(raised.value) == body["message"]
    # A list that has expired is begun anew, and a 401 is asked again with the credentials read anew.
    assert len(server.seen) == {410: LIST_ATTEMPTS, 401: 2}.get(code, 1)


async def test_a_status_write_is_a_merge_patch_with_the_precondition() -> None:
    async with loopback(answers(200, {"kind": "IngestRun", "metadata": {"resourceVersion": "8"}})) as server:
        cluster = KubernetesCluster(await server.connection(request_timeout=1.5))
        stored = await write_status(cluster)
        with pytest.raises(ValueError, match="resourceVersion"):
            await cluster.write_status(KEY, resource_version="", status={})
        await cluster.close()
    assert stored["metadata"]["resourceVersion"] == "8"
    [(method, path, headers, body)] = server.seen
    assert method == "PATCH"
    assert path == "/apis/ingestrun.dev/v1alpha1/namespaces/default/ingestruns/geo/status?timeout=1500ms"
    assert headers["Content-Type"] == "application/merge-patch+json"
    assert headers["User-Agent"].startswith("ingestrun-operator/")
    assert headers["authorization"] == "Bearer first"
    assert body == {"metadata": {"resourceVersion": "7"}, "status": {"phase": "Running", "cursor": None}}


async def test_a_secret_is_replaced_only_as_it_was_read() -> None:
    read = {"kind": "Secret", "metadata": {"namespace": "ops", "name": "key", "resourceVersion": "7"}}
    async with loopback(answers(200, read)) as server:
        cluster = KubernetesCluster(await server.connection())
        found = await cluster.get_secret(namespace="ops", name="key")
        await cluster.replace_secret({**found, "data": {"key": "eA=="}})
        with pytest.raises(ValueError, match="resourceVersion"):
            await cluster.replace_secret({"metadata": {"namespace": "ops", "name": "key"}, "data": {}})
        await cluster.close()
    seen = [(method, urlsplit(path).path, body) for method, path, _, body in server.seen]
    path = "/api/v1/namespaces/ops/secrets/key"
    assert seen == [("GET", path, None), ("PUT", path, {**read, "data": {"key": "eA=="}})]


async def test_a_pods_deadline_is_the_one_thing_of_it_that_is_changed() -> None:
    codes = iter([200, 404, 409])

    async def handler(_: web.Request) -> web.StreamResponse:
        return web.json_response({"kind": "Pod"}, status=next(codes))

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection())
        assert (await cluster.set_pod_deadline(namespace="default", name="p", uid="u", seconds=1))["kind"] == "Pod"
        for error in (errors.NotFound, errors.Conflict):
            with pytest.raises(error):
                await cluster.set_pod_deadline(namespace="default", name="p", uid="u", seconds=1)
        await cluster.close()
    method, path = server.seen[0][:2]
    assert (method, path.partition("?")[0]) == ("PATCH", "/api/v1/namespaces/default/pods/p")
    assert server.seen[0][3] == {"metadata": {"uid": "u"}, "spec": {"activeDeadlineSeconds": 1}}


async def test_deletes_carry_their_preconditions_and_gone_is_done() -> None:
    codes = iter([200, 404, 409, 200, 409, 200])

    async def handler(_: web.Request) -> web.StreamResponse:
        code = next(codes)
        return web.json_response(status_body(code, "Conflict", "other UID"), status=code)

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection())
        await cluster.delete_job(namespace="default", name="j", uid="u")
        await cluster.delete_job(namespace="default", name="j", uid="u")
        await cluster.delete_job(namespace="default", name="j", uid="u")
        await cluster.delete_jobs(namespace="default", selector="a=b,stage in (fetch,hook)")
        with pytest.raises(errors.Conflict):
            await cluster.delete_pod(namespace="default", name="p", uid="u", resource_version="3")
        await cluster.delete_pod(namespace="default", name="p", uid="u", grace_seconds=3)
        with pytest.raises(ValueError, match="selector"):
            await cluster.delete_jobs(namespace="default", selector="")
        await cluster.close()
    assert server.seen[0][3] == {
        "apiVersion": "v1",
        "kind": "DeleteOptions",
        "propagationPolicy": "Background",
        "preconditions": {"uid": "u"},
    }
    many = server.seen[3]
    assert many[:1] == ("DELETE",)
    assert urlsplit(many[1]).path == "/apis/batch/v1/namespaces/default/jobs"
    assert parse_qs(urlsplit(many[1]).query)["labelSelector"] == ["a=b,stage in (fetch,hook)"]
    assert many[3]["propagationPolicy"] == "Background"
    assert server.seen[4][3]["preconditions"] == {"uid": "u", "resourceVersion": "3"}
    assert server.seen[5][3] == {**server.seen[0][3], "gracePeriodSeconds": 3}


async def test_lists_take_all_pages_and_name_their_items() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        token = request.query.get("continue", "")
        at = int(token.removeprefix("a+/=") or 0)
        more = f"a+/={at + 1}" if at < 2 else ""
        items = [{"metadata": {"name": f"j{at}"}}]
        return web.json_response(
            {"kind": "JobList", "apiVersion": "batch/v1", "metadata": {"continue": more}, "items": items}
        )

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection())
        jobs = await list_jobs(cluster)
        await cluster.close()
    assert [(job["kind"], job["apiVersion"], job["metadata"]["name"]) for job in jobs] == [
        ("Job", "batch/v1", "j0"),
        ("Job", "batch/v1", "j1"),
        ("Job", "batch/v1", "j2"),
    ]
    assert all(
        parse_qs(urlsplit(path).query)["labelSelector"] == ["ingestrun.dev/run-uid=u-1"]
        and parse_qs(urlsplit(path).query)["limit"] == [str(PAGE)]
        for _, path, _, _ in server.seen
    )


async def test_a_list_that_expires_midway_starts_again() -> None:
    expired = False

    async def handler(request: web.Request) -> web.StreamResponse:
        nonlocal expired
        if "continue" not in request.query:
            return web.json_response({"metadata": {"continue": "x"}, "items": [{"metadata": {"name": "a"}}]})
        if not expired:
            expired = True
            return web.json_response(status_body(410, "Expired", "too old"), status=410)
        return web.json_response({"metadata": {}, "items": [{"metadata": {"name": "b"}}]})

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection())
        jobs = await list_jobs(cluster)
        await cluster.close()
    assert [job["metadata"]["name"] for job in jobs] == ["a", "b"]


@pytest.mark.parametrize(
    ("namespaces", "paths"),
    [
        (None, ["/apis/ingestrun.dev/v1alpha1/ingestruns"]),
        (
            ["a", "b", "a"],
            [
                "/apis/ingestrun.dev/v1alpha1/namespaces/a/ingestruns",
                "/apis/ingestrun.dev/v1alpha1/namespaces/b/ingestruns",
            ],
        ),
    ],
)
async def test_runs_of_all_or_of_some_namespaces(namespaces: list[str] | None, paths: list[str]) -> None:
    async with loopback(answers(200, {"metadata": {}, "items": []})) as server:
        cluster = KubernetesCluster(await server.connection(), namespaces=namespaces)
        assert await cluster.list_runs(dict) == []
        await cluster.close()
    assert [urlsplit(path).path for _, path, _, _ in server.seen] == paths


@pytest.mark.parametrize(
    ("about", "fields"),
    [
        ("Job", "reason=FailedCreate,regarding.kind=Job"),
        ("Pod", "type=Warning,regarding.kind=Pod"),
        ("PersistentVolumeClaim", "regarding.kind=PersistentVolumeClaim"),
    ],
)
async def test_events_about_starts_are_asked_for_by_fields(about: str, fields: str) -> None:
    items = [{"metadata": {"name": "e"}, "note": "late"}]
    async with loopback(answers(200, {"metadata": {}, "items": items})) as server:
        cluster = KubernetesCluster(await server.connection())
        found = await cluster.list_start_events(lambda event: event["note"], namespace="a", about=about)
        await cluster.close()
    ((_, path, _, _),) = server.seen
    assert found == ["late"]
    assert urlsplit(path).path == "/apis/events.k8s.io/v1/namespaces/a/events"
    assert parse_qs(urlsplit(path).query)["fieldSelector"] == [fields]


async def test_runs_of_a_concurrency_key_are_asked_for_by_fields() -> None:
    async with loopback(answers(200, {"metadata": {}, "items": []})) as server:
        cluster = KubernetesCluster(await server.connection())
        assert await cluster.list_runs_of(namespace="a", concurrency_key="geo/tiles") == []
        await cluster.close()
    ((_, path, _, _),) = server.seen
    assert urlsplit(path).path == "/apis/ingestrun.dev/v1alpha1/namespaces/a/ingestruns"
    query = parse_qs(urlsplit(path).query)
    assert query["fieldSelector"] == ["spec.concurrency.key=geo/tiles,status.phase!=Succeeded"]
    assert "resourceVersion" not in query, "which would let the server answer from its cache"


async def stalls(_: web.Request) -> web.StreamResponse:
    await asyncio.sleep(30)
    raise AssertionError("unreachable")


async def hangs_up(request: web.Request) -> web.StreamResponse:
    assert request.transport is not None
    request.transport.close()
    return web.Response()


async def breaks_off(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": "1000"})
    await response.prepare(request)
    await response.write(b'{"kind":')
    assert request.transport is not None
    request.transport.close()
    return response


@pytest.mark.parametrize("handler", [stalls, hangs_up, breaks_off])
@pytest.mark.parametrize(
    ("ask", "error"),
    [(get_run, errors.Unavailable), (create_job, errors.Unknown), (write_status, errors.Unknown)],
)
async def test_no_answer_to_a_write_is_unknown(handler: Any, ask: Ask, error: type[errors.KubeError]) -> None:
    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection(request_timeout=0.3))
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(error):
            await ask(cluster)
        assert loop.time() - began < 0.9
        await cluster.close()
    if error is errors.Unknown:
        assert len(server.seen) == 1, "a write was repeated"


@pytest.mark.parametrize("ask", [get_run, create_job])
async def test_refused_connections_did_nothing(ask: Ask) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Loopback(stalls, url=f"http://127.0.0.1:{probe.getsockname()[1]}")
    cluster = KubernetesCluster(await server.connection())
    with pytest.raises(errors.Unavailable):
        await ask(cluster)
    await asyncio.wait_for(cluster.connection.wait_for_abandoned_writes(), 0.1)
    await cluster.close()


async def test_a_write_that_never_got_a_connection_did_nothing() -> None:
    with socket.socket() as full:
        # Nobody accepts, and the backlog is full: connecting never ends.
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        fill = [socket.socket() for _ in range(4)]
        for filler in fill:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        server = Loopback(stalls, url=f"http://127.0.0.1:{port}")
        cluster = KubernetesCluster(await server.connection(request_timeout=0.3))
        with pytest.raises(errors.Unavailable):
            await create_job(cluster)
        await cluster.close()
        for filler in fill:
            filler.close()


async def test_new_credentials_are_loaded_once_for_all_that_were_refused() -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        if request.headers["authorization"] != "Bearer second":
            return web.json_response(status_body(401, "Unauthorized", "Unauthorized"), status=401)
        return web.json_response(JOB)

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection())
        server.token = "second"
        await asyncio.gather(*(create_job(cluster) for _ in range(5)))
        assert server.loads == 2
        server.token = "third"
        await create_job(cluster)
        await cluster.close()


async def test_credentials_that_stay_refused_are_not_loaded_again_at_once() -> None:
    async with loopback(answers(401, status_body(401, "Unauthorized", "Unauthorized"))) as server:
        cluster = KubernetesCluster(await server.connection())
        for _ in range(3):
            with pytest.raises(errors.Forbidden, match="Unauthorized"):
                await get_run(cluster)
        assert server.loads == 2
        await cluster.close()


async def test_a_caller_that_gives_up_does_not_stop_the_reload() -> None:
    """An exec plugin may take longer than a try of the election, and has to come to its end all the same."""
    released = asyncio.Event()
    loaded = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        if request.headers["authorization"] != "Bearer second":
            return web.json_response(status_body(401, "Unauthorized", "Unauthorized"), status=401)
        return web.json_response(JOB)

    async with loopback(handler) as server:

        async def slow_plugin() -> Configuration:
            await released.wait()
            loaded.set()
            return await server.configuration()

        cluster = KubernetesCluster(Connection(await server.configuration(), reload=slow_plugin))
        server.token = "second"
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(get_run(cluster), 0.2)
        released.set()
        await asyncio.wait_for(loaded.wait(), 2)
        await get_run(cluster)
        assert server.loads == 2, "the reload that was under way is the one that is used"
        await cluster.close()


async def test_what_only_json_encodes_is_sent_all_the_same() -> None:
    """The server decides about it. An error of the encoder's would keep a run from being written at all."""
    async with loopback(answers(200, {"metadata": {}})) as server:
        cluster = KubernetesCluster(await server.connection())
        for value in ("half a \ud83d pair", 2**70):
            await cluster.write_status(KEY, resource_version="7", status={"x": value})
            assert server.seen[-1][3]["status"] == {"x": value}
        await cluster.close()


async def test_without_the_lease_nothing_is_written() -> None:
    async with loopback(answers(200, {"metadata": {}})) as server:
        cluster = KubernetesCluster(await server.connection())
        cluster.connection.may_write = lambda: False
        for ask in (create_job, write_status):
            with pytest.raises(errors.Unavailable, match="lease"):
                await ask(cluster)
        await get_run(cluster)
        await cluster.close()
    assert [method for method, *_ in server.seen] == ["GET"]


async def test_the_lease_is_asked_after_the_wait_for_a_slot() -> None:
    gate = asyncio.Event()

    async def handler(_: web.Request) -> web.StreamResponse:
        await gate.wait()
        return web.json_response({"metadata": {}})

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection(concurrency=1))
        first = asyncio.ensure_future(create_job(cluster))
        await asyncio.sleep(0.1)
        second = asyncio.ensure_future(create_job(cluster))
        await asyncio.sleep(0.1)
        cluster.connection.may_write = lambda: False
        gate.set()
        await first
        with pytest.raises(errors.Unavailable):
            await second
        await cluster.close()
    assert len(server.seen) == 1


async def test_concurrency_is_bounded() -> None:
    now, most = 0, 0

    async def handler(_: web.Request) -> web.StreamResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.02)
        now -= 1
        return web.json_response({"metadata": {}})

    async with loopback(handler) as server:
        cluster = KubernetesCluster(await server.connection(concurrency=3))
        await asyncio.gather(*(get_run(cluster) for _ in range(12)))
        await cluster.close()
    assert most == 3


async def test_abandoned_writes_are_waited_for() -> None:
    async with loopback(stalls) as server:
        cluster = KubernetesCluster(await server.connection(request_timeout=0.5))
        loop = asyncio.get_running_loop()
        began = loop.time()
        await cluster.connection.wait_for_abandoned_writes()
        assert loop.time() - began < 0.1
        task = asyncio.ensure_future(create_job(cluster))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await cluster.connection.wait_for_abandoned_writes()
        assert loop.time() - began >= 0.5
        await cluster.close()


async def test_connecting_without_credentials_says_why(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(errors.KubeError, match="no usable credentials from kubeconfig"):
        await Connection.open(kubeconfig=str(tmp_path / "missing"))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    with pytest.raises(errors.KubeError, match="no usable credentials from the service account"):
        await Connection.open(in_cluster=True)


async def test_a_kubeconfig_with_an_exec_plugin(tmp_path: Any) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_text(
        "#!/bin/sh\n"
        'echo \'{"apiVersion":"client.authentication.k8s.io/v1","kind":"ExecCredential","status":{"token":"t1"}}\'\n'
    )
    plugin.chmod(0o755)
    async with loopback(answers(200, {"metadata": {}})) as server:
        config = tmp_path / "config"
        config.write_text(
            f"""
apiVersion: v1
kind: Config
current-context: one
clusters: [{{name: c, cluster: {{server: {server.url}}}}}]
users:
- name: u
  user: {{exec: {{apiVersion: client.authentication.k8s.io/v1, command: {plugin}, interactiveMode: Never}}}}
contexts:
- {{name: one, context: {{cluster: c, user: nobody}}}}
- {{name: two, context: {{cluster: c, user: u}}}}
"""
        )
        cluster = KubernetesCluster(await Connection.open(kubeconfig=str(config), context="two"))
        await get_run(cluster)
        await cluster.close()
    assert server.seen[0][2]["authorization"] == "Bearer t1"


async def test_settings_are_checked() -> None:
    server = Loopback(stalls, url="http://127.0.0.1:1")
    with pytest.raises(ValueError, match="request_timeout"):
        Connection(await server.configuration(), reload=server.configuration, request_timeout=0)


@pytest.mark.parametrize(
    ("environment", "proxy"),
    [
        ({}, None),
        ({"https_proxy": "http://proxy:3128"}, "http://proxy:3128"),
        ({"http_proxy": "http://proxy:3128"}, None),
        ({"https_proxy": "http://proxy:3128", "no_proxy": "10.96.0.1,.svc"}, None),
    ],
    ids=["none", "for https", "for http alone", "not for this address"],
)
def test_the_proxy_of_the_environment(
    environment: dict[str, str], proxy: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Looked up once, for the whole connection."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for("https://10.96.0.1:443") == proxy
