"""The built-in worker's configuration: `spec.source`, `spec.hooks[].validate`, `spec.sink`.

The operator passes each to the worker unchanged, as JSON in `INGEST_CONFIG`; the worker parses it with the same models.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from ingestrun.model.base import KubeModel
from ingestrun.model.stages import StageSettings

ShortText = Annotated[str, StringConstraints(min_length=1, max_length=256)]
LongText = Annotated[str, StringConstraints(min_length=1, max_length=2048)]

ENV_HTTP_AUTHORIZATION = "INGEST_HTTP_AUTHORIZATION"
"""The variable with the Authorization header. Its value comes from a Secret, and is never part of `INGEST_CONFIG`."""


def exactly_one(model: KubeModel, *fields: str) -> None:
    """Refuse a union in which not exactly one member is set.

    Raises:
        ValueError: none is set, or several are.
    """
    present = [name for name in fields if getattr(model, name) is not None]
    if len(present) != 1:
        raise ValueError(f"set exactly one of {', '.join(fields)} (set: {', '.join(present) or 'none'})")


class SecretKeySelector(KubeModel):
    """A key of a Secret in the run's namespace."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=253)]
    key: Annotated[str, StringConstraints(min_length=1, max_length=253)]


class PagePagination(KubeModel):
    """`?page=1&per_page=100`; the source ends with a page without records, or by `totalPath`."""

    param: ShortText = "page"
    size_param: ShortText = "per_page"
    first: Annotated[int, Field(ge=0, le=1)] = 1
    total_path: ShortText | None = None


class OffsetPagination(KubeModel):
    """`?offset=200&limit=100`; the source ends with a page without records, or by `totalPath`."""

    param: ShortText = "offset"
    size_param: ShortText = "limit"
    total_path: ShortText | None = None


class CursorPagination(KubeModel):
    """The response carries the next cursor at `path`; the source ends when it is missing, null or empty."""

    param: ShortText = "cursor"
    size_param: ShortText | None = None
    path: ShortText


class LinkPagination(KubeModel):
    """RFC 8288: follow the Link header's rel="next"; the source ends with a response that has none."""

    size_param: ShortText | None = None


class Pagination(KubeModel):
    """The way from one page to the next; exactly one kind."""

    page: PagePagination | None = None
    offset: OffsetPagination | None = None
    cursor: CursorPagination | None = None
    link: LinkPagination | None = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        exactly_one(self, "page", "offset", "cursor", "link")
        return self


class HttpSource(KubeModel):
    """A source of JSON records, read page by page over HTTP."""

    url: Annotated[str, StringConstraints(min_length=1, max_length=2048, pattern=r"^https?://[^\s]+$")]
    params: dict[str, str] = {}
    records: ShortText | None = None
    page_size: Annotated[int, Field(ge=1, le=1_000_000)] = 1000
    pagination: Pagination
    allow_repeated_pages: bool = False
    timeout_seconds: Annotated[int, Field(ge=1, le=3600)] = 60
    authorization: SecretKeySelector | None = None


class FileFormat(StrEnum):
    """The format of a source file."""

    CSV = "csv"
    JSONL = "jsonl"
    PARQUET = "parquet"


class FilesSource(KubeModel):
    """Files that match a glob, read in the order of their names.

    `nullValues` are the CSV values that mean "no value"; "NA" is no default, because it is also a country's code.
    """

    path: LongText
    format: FileFormat | None = None
    delimiter: Annotated[str, StringConstraints(min_length=1, max_length=1, pattern=r'^[^"\r\n]$')] = ","
    null_values: Annotated[list[Annotated[str, StringConstraints(max_length=64)]], Field(max_length=16)] = [""]


class Source(StageSettings):
    """The source that the built-in worker reads; exactly one kind."""

    files: FilesSource | None = None
    http: HttpSource | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        exactly_one(self, "files", "http")
        return self


class ColumnType(StrEnum):
    """The type as which a column's values must be readable."""

    STRING = "string"
    INTEGER = "integer"
    NUMBER = "number"
    BOOLEAN = "boolean"
    TIMESTAMP = "timestamp"


class ColumnRule(KubeModel):
    """The rules for one column's values. A range is for numbers, also if no type is declared."""

    name: ShortText
    type: ColumnType | None = None
    required: bool = False
    minimum: Annotated[float, Field(allow_inf_nan=False)] | None = None
    maximum: Annotated[float, Field(allow_inf_nan=False)] | None = None

    @model_validator(mode="after")
    def _range_of_numbers(self) -> Self:
        ranged = self.minimum is not None or self.maximum is not None
        if ranged and self.type not in (None, ColumnType.INTEGER, ColumnType.NUMBER):
            raise ValueError("minimum and maximum are for the types integer and number")
        if self.minimum is not None and self.maximum is not None and self.minimum > self.maximum:
            raise ValueError("minimum must not be above maximum")
        return self


class Validate(KubeModel):
    """The built-in hook: rows that break a rule go into quarantine with the reason, the others are handed on."""

    columns: Annotated[list[ColumnRule], Field(min_length=1, max_length=256)]
    max_rejected: Annotated[int, Field(ge=0)] | None = None

    @model_validator(mode="after")
    def _one_rule_a_column(self) -> Self:
        names = [rule.name for rule in self.columns]
        if len(set(names)) != len(names):
            raise ValueError("two rules have the same column name")
        return self


class ParquetSink(KubeModel):
    """A directory of Parquet files in the workspace: one file for each batch, published in one atomic step."""

    path: ShortText


class Sink(StageSettings):
    """The dataset to which the built-in worker publishes."""

    parquet: ParquetSink
