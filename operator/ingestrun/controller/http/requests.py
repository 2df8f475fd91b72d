"""The requests of people's API: their bodies, queries and paths. What does not fit is a Problem that says where."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Self, TypeVar

from aiohttp import web
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from ingestrun.controller.http.problems import Problem
from ingestrun.kube.protocol import RunKey
from ingestrun.model.spec import CancellationPolicy
from ingestrun.model.status import Phase

MOST_RUNS: Final = 500
"""Runs in one page, and in one bulk request."""
_LABEL: Final = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_NAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*")
_UID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")

Selector = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=r"^[ -~]+$")]


def _whole(value: object) -> object:
    """Take 60.0 for 60: in JSON they are the same number."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Request(BaseModel):
    """A request: camelCase outside, nothing that is not known, and nothing that is taken for what it is not."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=False, extra="forbid", frozen=True, strict=True
    )


class CancelRequest(Request):
    """The body of a cancel; the fields are those of `spec.cancellation`."""

    reason: Annotated[str, StringConstraints(min_length=1, max_length=512)] | None = None
    cascade: bool | None = None
    policy: CancellationPolicy | None = None

    def cancellation(self) -> Mapping[str, Any]:
        """Return what was given, as `spec.cancellation` has it."""
        given = {"reason": self.reason, "cascade": self.cascade, "policy": self.policy}
        return {name: value for name, value in given.items() if value is not None}


class BulkCancelRequest(CancelRequest):
    """The body of a cancel of many runs: those of these names, or of these labels, or all that are active."""

    names: Annotated[list[str], Field(min_length=1, max_length=MOST_RUNS)] | None = None
    label_selector: Selector | None = None
    all: bool = False
    dry_run: bool = False

    @model_validator(mode="after")
    def _one_selection(self) -> Self:
        if [self.names is not None, self.label_selector is not None, self.all].count(True) != 1:
            raise ValueError("one of names, labelSelector and all: true is needed")
        for name in self.names or ():
            if not _NAME.fullmatch(name):
                raise ValueError("one of the names can be the name of no run")
        return self


class CleanUpRequest(CancelRequest):
    """The body of a clean-up: cancel what has made no progress for so long."""

    stale_seconds: Annotated[int, Field(ge=1, le=31_536_000), BeforeValidator(_whole)]
    label_selector: Selector | None = None
    dry_run: bool = False


class ListQuery(Request):
    """The query of a list."""

    model_config = ConfigDict(strict=False)  # a query has strings alone

    phase: Phase | None = None
    label_selector: Selector | None = None
    limit: Annotated[int, Field(ge=1, le=MOST_RUNS)] = 100
    token: Annotated[str, Field(alias="continue", max_length=2048, pattern="^[A-Za-z0-9_=-]*$")] = ""


M = TypeVar("M", bound=Request)


async def read_body(request: web.Request, model: type[M]) -> M:
    """Read the body; none at all counts as `{}`. Raises Problem: 400, 415 or 422."""
    content = await request.read()
    if content and request.content_type != "application/json":
        raise Problem(415, "the body has to be application/json")
    try:
        return model.model_validate_json(content or b"{}")
    except ValidationError as error:
        if any(problem["type"] == "json_invalid" for problem in error.errors(include_url=False)):
            raise Problem(400, "the body is not JSON") from None
        raise _unprocessable(error) from None


def read_query(request: web.Request, model: type[M]) -> M:
    """Read the query. Raises Problem (422)."""
    try:
        return model.model_validate(dict(request.query))
    except ValidationError as error:
        raise _unprocessable(error) from None


def refuse_query(request: web.Request) -> None:
    """Raise Problem (422) if there is a query where none has a meaning."""
    if request.query:
        raise Problem(422, f"there is no parameter {next(iter(request.query))!r} here")


def namespace_of(request: web.Request) -> str:
    """Return the namespace in the path. Raises Problem (422)."""
    namespace = request.match_info["namespace"]
    if not _LABEL.fullmatch(namespace):
        raise Problem(422, "the namespace in the path can be the name of none")
    return namespace


def run_of(request: web.Request) -> RunKey:
    """Return the run in the path. Raises Problem (422)."""
    namespace, name = namespace_of(request), request.match_info["name"]
    if not _NAME.fullmatch(name):
        raise Problem(422, "the name in the path can be the name of no run")
    return RunKey(namespace=namespace, name=name)


def uid_of(request: web.Request) -> str:
    """Return the UID in the path. Raises Problem (422)."""
    uid = request.match_info["uid"]
    if not _UID.fullmatch(uid):
        raise Problem(422, "the UID in the path can be the UID of no run")
    return uid


def _unprocessable(error: ValidationError) -> Problem:
    problems = [
        {
            "field": ".".join(str(part) for part in problem["loc"]),
            "problem": problem["msg"].removeprefix("Value error, "),
        }
        for problem in error.errors(include_url=False, include_input=False, include_context=False)
    ]
    first = problems[0]
    where = f"{first['field']}: " if first["field"] else ""
    return Problem(422, f"{where}{first['problem']}", problems=problems)
