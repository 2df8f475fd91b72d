"""The steps that each batch of a run passes, in order: fetch, the hooks, publish."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

from ingestrun.model.contract import CONFIG_MAX_BYTES, ENV_CONFIG, Stage
from ingestrun.model.names import hook_job_part
from ingestrun.model.spec import Container, IngestRunSpec
from ingestrun.model.stages import STAGE_SETTINGS, Resources, StageSettings
from ingestrun.model.worker import SecretKeySelector

DEFAULT_DEADLINE_SECONDS = 3600
"""`activeDeadlineSeconds` of a stage that sets none. Every pod has a deadline, so that no pod can hang for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of the pipeline: the user's own container, or the built-in worker with its configuration."""

    index: int
    stage: Stage
    name: str
    """`fetch`, `publish` or the hook's name."""
    deadline_seconds: int
    retries: int
    resources: Resources | None
    container: Container | None = None
    config: str | None = None
    """JSON for the built-in worker; None with a user's own container."""
    authorization: SecretKeySelector | None = None

    @property
    def label(self) -> str:
        """Return the step's name in messages."""
        return f"hook {self.name}" if self.stage is Stage.HOOK else self.name

    @property
    def job_part(self) -> str:
        """Return the step's part of its Job's name."""
        return hook_job_part(self.index, self.name) if self.stage is Stage.HOOK else self.name

    @property
    def field(self) -> str:
        """Return the field of the spec that configures the step, if the built-in worker runs it."""
        if self.stage is Stage.HOOK:
            return f"spec.hooks[{self.index - 1}]"
        return "spec.source" if self.stage is Stage.FETCH else "spec.sink"


ON_CANCEL_STEP: Final = 1000
"""Index of the clean-up, beyond any stage of a batch, so that it is not taken for a stage."""
ON_CANCEL_DEADLINE_SECONDS: Final = 300


WORKER_STEP: Final = 1001
"""Index of a pool's workers, which take batches through all stages."""
WORKER_LABEL: Final = "worker"
WORKER_SECONDS: Final = 6 * 3600
"""Time after which a worker takes no further batch and ends, so that its pod can have a deadline."""


HOLD_GRACE: Final = timedelta(seconds=60)
"""Time that a worker has to report a batch, beyond the deadlines of the stages, which it keeps by itself."""


def hold_limit(spec: IngestRunSpec) -> timedelta:
    """Return for how long a worker may hold one attempt at a batch before it counts as frozen, or cut off."""
    return timedelta(seconds=sum(step.deadline_seconds for step in steps_of(spec))) + HOLD_GRACE


def worker_step(spec: IngestRunSpec) -> Step:
    """Return what a worker of the pool is as a step: its deadline leaves time for the last batch that it takes."""
    steps = steps_of(spec)
    return Step(
        index=WORKER_STEP,
        stage=Stage.WORKER,
        name=WORKER_LABEL,
        deadline_seconds=WORKER_SECONDS + sum(step.deadline_seconds for step in steps),
        retries=spec.retries,
        resources=spec.execution.resources,
        authorization=steps[0].authorization,
    )


def on_cancel_step(spec: IngestRunSpec) -> Step | None:
    """Return the clean-up after a cancel, which is tried once; None if the run has no clean-up."""
    container = spec.on_cancel
    if container is None:
        return None
    return Step(
        index=ON_CANCEL_STEP,
        stage=Stage.ON_CANCEL,
        name="on-cancel",
        deadline_seconds=container.active_deadline_seconds or ON_CANCEL_DEADLINE_SECONDS,
        retries=0,
        resources=container.resources,
        container=container,
    )


def steps_of(spec: IngestRunSpec) -> tuple[Step, ...]:
    """Return the steps of a run, in order: at least fetch and publish."""
    http = spec.source.http if spec.source is not None else None
    steps = [
        _step(
            spec,
            stage=Stage.FETCH,
            name="fetch",
            container=spec.fetch,
            built_in=spec.source,
            authorization=http.authorization if http is not None else None,
        )
    ]
    for index, hook in enumerate(spec.hooks, start=1):
        steps.append(
            _step(spec, stage=Stage.HOOK, name=hook.name, container=hook.container, built_in=hook, index=index)
        )
    steps.append(
        _step(spec, stage=Stage.PUBLISH, name="publish", container=spec.publish, built_in=spec.sink, index=len(steps))
    )
    return tuple(steps)


def _step(
    spec: IngestRunSpec,
    *,
    stage: Stage,
    name: str,
    container: Container | None,
    built_in: StageSettings | None,
    index: int = 0,
    authorization: SecretKeySelector | None = None,
) -> Step:
    """Return a step with its settings: the container's, its hook's, source's or sink's, the run's, or the default."""
    given = [settings for settings in (container, built_in) if settings is not None]
    retries = next((settings.retries for settings in given if settings.retries is not None), spec.retries)
    deadlines = [settings.active_deadline_seconds for settings in given if settings.active_deadline_seconds]
    config = None
    if container is None and built_in is not None:
        left_out = STAGE_SETTINGS | {"name"}
        config = built_in.model_dump_json(by_alias=True, exclude_none=True, exclude=set(left_out))
    return Step(
        index=index,
        stage=stage,
        name=name,
        deadline_seconds=next(iter(deadlines), DEFAULT_DEADLINE_SECONDS),
        retries=retries,
        resources=next((settings.resources for settings in given if settings.resources is not None), None),
        container=container,
        config=config,
        authorization=authorization,
    )


def config_refusal(steps: Iterable[Step]) -> str | None:
    """Return why no process can be given the configuration of a step, as a sentence; None if each can.

    The CRD refuses most of what is too large. It counts characters, and here the bytes of the JSON are counted.
    """
    for step in steps:
        size = len((step.config or "").encode())
        if size > CONFIG_MAX_BYTES:
            heaviest = _heaviest_field(step.field, json.loads(step.config or "{}"))
            return (
                f"{heaviest} is too large: as JSON, {step.field} has {size} bytes, and a container can be given "
                f"{CONFIG_MAX_BYTES} at most ({ENV_CONFIG})"
            )
    return None


def _heaviest_field(path: str, value: Any) -> str:
    """Return the path of the smallest part that is more than half of the value."""
    half = len(json.dumps(value)) / 2
    while isinstance(value, dict):
        name, part = max(value.items(), key=lambda item: len(json.dumps(item[1])))
        if len(json.dumps(part)) <= half:
            break
        path, value = f"{path}.{name}", part
    return path
