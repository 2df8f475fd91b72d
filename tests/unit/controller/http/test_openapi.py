"""The OpenAPI document is kept by hand: here it is held to the routes, and to the models that read the requests."""

from __future__ import annotations

import json
from typing import Any, cast

import aiohttp
import jsonschema
import pytest
from tests.fakes.api_document import DOCUMENT
from tests.fakes.cluster import FakeCluster

from ingestrun import __version__
from ingestrun.controller.http.callers import Callers
from ingestrun.controller.http.cancellation_check import CancellationCheck
from ingestrun.controller.http.openapi import PATH, OpenApiDocument
from ingestrun.controller.http.people import PeopleApi
from ingestrun.controller.http.requests import (
    BulkCancelRequest,
    CancelRequest,
    CleanUpRequest,
    ListQuery,
    Request,
)
from ingestrun.controller.http.server import ApiServer, RouteTable

NOTHING = cast(Any, None)
TABLES: list[RouteTable] = [
    CancellationCheck(NOTHING, NOTHING, url="", clock=NOTHING),
    PeopleApi(NOTHING, Callers(FakeCluster()), clock=NOTHING),
    OpenApiDocument(),
]
SCHEMAS = DOCUMENT["components"]["schemas"]


def test_the_document_has_the_routes_and_no_others() -> None:
    served = {(route.method.lower(), route.path) for table in TABLES for route in table.routes()}
    described = {(method, path) for path, item in DOCUMENT["paths"].items() for method in item.keys() - {"parameters"}}
    assert served == described
    assert DOCUMENT["info"]["version"] == __version__


@pytest.mark.parametrize("model", [CancelRequest, BulkCancelRequest, CleanUpRequest])
def test_the_bodies_are_those_that_are_read(model: type[Request]) -> None:
    described, read = SCHEMAS[model.__name__], model.model_json_schema()
    assert described["properties"].keys() == read["properties"].keys()
    assert described.get("required", []) == read.get("required", [])
    assert described["additionalProperties"] is False
    for name, field in read["properties"].items():
        assert limits(described["properties"][name]) == limits(field), name


LIMITS = ("minLength", "maxLength", "minimum", "maximum", "minItems", "maxItems")


def limits(schema: Any) -> set[tuple[str, object]]:
    """What a schema allows, wherever in it that is said; not of the items of an array."""
    found: set[tuple[str, object]] = set()
    if isinstance(schema, dict):
        found |= {(key, value) for key, value in schema.items() if key in LIMITS}
        inner = [value for key, value in schema.items() if key not in ("items", *LIMITS)]
    else:
        inner = schema if isinstance(schema, list) else []
    return found.union(*map(limits, inner))


def test_the_query_of_a_list_is_that_which_is_read() -> None:
    described = {
        parameter["name"]: parameter
        for parameter in DOCUMENT["paths"]["/api/v1/namespaces/{namespace}/ingestruns"]["get"]["parameters"]
    }
    read = ListQuery.model_json_schema()
    assert described.keys() == read["properties"].keys()
    assert not any(parameter.get("required") for parameter in described.values())
    assert set(described["phase"]["schema"]["enum"]) == set(read["$defs"]["Phase"]["enum"])
    for name in ("labelSelector", "limit", "continue"):
        assert limits(described[name]["schema"]) == limits(read["properties"][name]), name


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_schema_is_one(name: str) -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMAS[name])


def test_every_reference_leads_somewhere() -> None:
    references = [line.split('"')[3] for line in json.dumps(DOCUMENT, indent=0).splitlines() if '"$ref"' in line]
    assert references
    for reference in references:
        _, _, kind, name = reference.split("/")
        assert name in DOCUMENT["components"][kind]


async def test_everybody_may_read_the_document() -> None:
    server = ApiServer(routes=[OpenApiDocument()])
    port = await server.serve(0, "127.0.0.1")
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}{PATH}") as answer:
        assert (answer.status, answer.content_type) == (200, "application/json")
        assert await answer.json() == DOCUMENT
    await server.close()
