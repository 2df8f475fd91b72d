"""What can be set for a stage, whoever runs it."""

from __future__ import annotations

from typing import Annotated, Final

from pydantic import Field

from ingestrun.model.base import KubeModel

Seconds = Annotated[int, Field(ge=1, le=31_536_000)]

STAGE_SETTINGS: Final = frozenset({"resources", "active_deadline_seconds", "retries"})
"""The fields of StageSettings: the operator's concern, no part of what a worker is configured with."""


class Resources(KubeModel):
    """Requests and limits, as a container has them."""

    requests: dict[str, str | int] = {}
    limits: dict[str, str | int] = {}


class StageSettings(KubeModel):
    """What can be set for any stage, the built-in worker's included."""

    resources: Resources | None = None
    active_deadline_seconds: Seconds | None = None
    retries: Annotated[int, Field(ge=0, le=100)] | None = None
