"""Settings of a stage, for the built-in worker and for other images alike."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from ingestrun.model.base import KubeModel

Seconds = Annotated[int, Field(ge=1, le=31_536_000)]

STAGE_SETTINGS: Final = frozenset({"resources", "active_deadline_seconds", "retries"})
"""The fields of StageSettings. They are for the operator, and no part of the worker's configuration."""


class Resources(KubeModel):
    """Requests and limits, as in a container."""

    requests: dict[str, str | int] = {}
    limits: dict[str, str | int] = {}


class StageSettings(KubeModel):
    """Settings that every stage has, also one of the built-in worker."""

    resources: Resources | None = None
    active_deadline_seconds: Seconds | None = None
    retries: Annotated[int, Field(ge=0, le=100)] | None = None
