"""The namespaces that the operator may read, of those that it is to watch."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from aiohttp import web
from tests.fakes.loopback import Handler, loopback, status_body

from ingestrun.kube.client import KubernetesCluster


def answering(status_of: Callable[[str, str], int]) -> Handler:
    """An API server that answers a list in this namespace of this resource with that status."""

    async def handle(request: web.Request) -> web.StreamResponse:
        found = re.fullmatch(r".*/namespaces/([^/]+)/([^/]+)", request.path)
        assert found is not None, request.path
        status = status_of(found[1], found[2])
        if status == 200:
            return web.json_response({"kind": "List", "items": []})
        message = f"{found[2]} is forbidden in the namespace {found[1]}"
        return web.json_response(status_body(status, "Forbidden", message), status=status)

    return handle


@pytest.mark.parametrize(
    ("status_of", "left", "refused"),
    [
        (lambda _place, _what: 200, ("here", "gone"), {}),
        (lambda place, _what: 403 if place == "gone" else 200, ("here",), {"gone": "ingestruns is forbidden"}),
        (lambda place, what: 403 if (place, what) == ("gone", "pods") else 200, ("here",), {"gone": "pods is"}),
        (lambda _place, _what: 403, ("here", "gone"), {}),
        (lambda _place, _what: 503, ("here", "gone"), {}),
        (lambda _place, what: 404 if what == "ingestruns" else 200, ("here", "gone"), {}),
    ],
)
async def test_only_namespaces_that_may_not_be_read_are_left_out_and_never_all(
    status_of: Callable[[str, str], int], left: tuple[str, ...], refused: dict[str, str]
) -> None:
    async with loopback(answering(status_of)) as server:
        cluster = KubernetesCluster(await server.connection(), namespaces=["here", "gone"])
        told = await cluster.leave_out_refused_namespaces()
        await cluster.close()
    assert cluster.namespaces == left
    assert told.keys() == refused.keys()
    for namespace, words in refused.items():
        assert words in told[namespace]


async def test_where_the_whole_cluster_is_watched_nothing_is_asked() -> None:
    async with loopback(answering(lambda _place, _what: 403)) as server:
        cluster = KubernetesCluster(await server.connection())
        assert await cluster.leave_out_refused_namespaces() == {}
        await cluster.close()
    assert server.seen == []
