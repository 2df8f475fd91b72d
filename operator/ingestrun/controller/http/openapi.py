"""The OpenAPI document of the HTTP API, as it is served: `openapi.json` beside this module, kept by hand."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Final

from aiohttp import web

from ingestrun.controller.http.server import RouteTable

PATH: Final = "/api/v1/openapi.json"


def document() -> bytes:
    """Return the document."""
    return (files("ingestrun.controller.http") / "openapi.json").read_bytes()


class OpenApiDocument(RouteTable):
    """Route table of the document. It tells nothing of any run, so everybody may read it."""

    def __init__(self) -> None:
        self._document = document()

    def routes(self) -> Iterable[web.RouteDef]:
        """Return the one route."""
        return [web.get(PATH, self._answer, allow_head=False)]

    async def _answer(self, _: web.Request) -> web.Response:
        return web.Response(body=self._document, content_type="application/json")
