"""The OpenAPI document as a judge of answers: each has to be one of those that it describes."""

from __future__ import annotations

import functools
import json
import re
from typing import Any, Final
from urllib.parse import urlsplit

import jsonschema

from ingestrun.controller.http.openapi import document

DOCUMENT: Final[dict[str, Any]] = json.loads(document())


@functools.cache
def _paths() -> list[tuple[re.Pattern[str], str]]:
    """The paths as patterns, those with the fewest variables first, as the router takes them."""
    ordered = sorted(DOCUMENT["paths"], key=lambda path: path.count("{"))
    return [(re.compile(re.sub(r"\{[a-z]+\}", "[^/]+", path)), path) for path in ordered]


def operation(method: str, url: str) -> dict[str, Any]:
    """What the document has on such a request."""
    path = next(path for pattern, path in _paths() if pattern.fullmatch(urlsplit(url).path))
    found: dict[str, Any] = DOCUMENT["paths"][path][method.lower()]
    return found


def check_answer(method: str, url: str, status: int, content_type: str, body: Any) -> None:
    """Assert that the document has such an answer to such a request."""
    responses = operation(method, url)["responses"]
    assert str(status) in responses, f"{method} {url} answers {status}, which the document does not have"
    response = responses[str(status)]
    if "$ref" in response:
        response = DOCUMENT["components"]["responses"][response["$ref"].rpartition("/")[2]]
    assert content_type in response["content"], f"{method} {url} answers {status} as {content_type}"
    schema = response["content"][content_type]["schema"]
    jsonschema.Draft202012Validator({**schema, "components": DOCUMENT["components"]}).validate(body)
