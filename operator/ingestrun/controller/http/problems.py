"""Errors of the HTTP server in their one form, RFC 9457: `application/problem+json`."""

from __future__ import annotations

import http
import json
from collections.abc import Mapping
from typing import Any, Final

from aiohttp import web

CONTENT_TYPE: Final = "application/problem+json"


class Problem(Exception):  # noqa: N818  (named for what it is in RFC 9457)
    """An answer that is an error: its status, a sentence in `detail`, and members of its own."""

    def __init__(
        self, status: int, detail: str, *, headers: Mapping[str, str] | None = None, **members: object
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = dict(headers or {})
        self.members = members

    def body(self) -> Mapping[str, Any]:
        """Return the JSON of the answer. There is no `type`, because none has a page of its own."""
        title = http.HTTPStatus(self.status).phrase
        return {"title": title, "status": self.status, "detail": self.detail, **self.members}

    def response(self) -> web.Response:
        """Return the answer."""
        headers = dict(self.headers)
        if self.status == http.HTTPStatus.UNAUTHORIZED:
            headers.setdefault("WWW-Authenticate", "Bearer")
        body = json.dumps(self.body()).encode()
        return web.Response(status=self.status, body=body, content_type=CONTENT_TYPE, headers=headers)


def of_http_exception(error: web.HTTPException) -> Problem:
    """Return the problem that stands for an error of aiohttp's own: no such path, another method, a body too large."""
    keep = {name: error.headers[name] for name in ("Allow",) if name in error.headers}
    sentences = {
        404: "there is nothing under this path",
        405: f"the path has no such method, but {keep.get('Allow', 'others')}",
        413: "the body is too large",
    }
    return Problem(error.status, sentences.get(error.status, error.reason), headers=keep)
