"""The steps that each batch of a run passes, in order: fetch, the hooks, publish."""

from __future__ import annotations

from dataclasses import dataclass

from ingestrun.model.contract import Stage
from ingestrun.model.spec import Container, IngestRunSpec, StageSettings
from ingestrun.model.worker import SecretKeySelector

DEFAULT_DEADLINE_SECONDS = 3600
"""`activeDeadlineSeconds` of a stage that sets none: every Job has one, so that none can hang for ever."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One stage of the pipeline: the user's own container, or the built-in worker with its configuration."""

    index: int
    stage: Stage
    name: str
    """`fetch`, `publish` or the hook's name."""
    deadline_seconds: int
    retries: int
    settings: StageSettings
    container: Container | None = None
    config: str | None = None
    """JSON for the built-in worker; None with one's own container."""
    authorization: SecretKeySelector | None = None

    @property
    def label(self) -> str:
        """The step as messages name it."""
        return f"hook {self.name}" if self.stage is Stage.HOOK else self.name

    @property
    def job_part(self) -> str:
        """The step as the name of its Job has it; the index keeps a hook named `publish` apart."""
        return f"h{self.index}-{self.name}" if self.stage is Stage.HOOK else self.name


def steps_of(spec: IngestRunSpec) -> tuple[Step, ...]:
    """The steps of a run, in order. At least two: fetch and publish."""
    steps = [_step(spec, 0, Stage.FETCH, "fetch", spec.fetch)]
    for hook in spec.hooks:
        steps.append(_step(spec, len(steps), Stage.HOOK, hook.name, hook.container, hook))
    steps.append(_step(spec, len(steps), Stage.PUBLISH, "publish", spec.publish))
    return tuple(steps)


def _step(
    spec: IngestRunSpec,
    index: int,
    stage: Stage,
    name: str,
    container: Container | None,
    settings: StageSettings | None = None,
) -> Step:
    own = container or settings or StageSettings()
    outer = settings or own
    config = None
    authorization = None
    if container is None:
        if stage is Stage.FETCH and spec.source is not None:
            config = spec.source.model_dump_json(by_alias=True, exclude_none=True)
            authorization = spec.source.http.authorization if spec.source.http else None
        elif stage is Stage.PUBLISH and spec.sink is not None:
            config = spec.sink.model_dump_json(by_alias=True, exclude_none=True)
        else:
            config = (
                settings.model_dump_json(by_alias=True, exclude_none=True, include={"validate_"}) if settings else None
            )
    retries = next((value for value in (own.retries, outer.retries) if value is not None), spec.retries)
    return Step(
        index=index,
        stage=stage,
        name=name,
        deadline_seconds=own.active_deadline_seconds or outer.active_deadline_seconds or DEFAULT_DEADLINE_SECONDS,
        retries=retries,
        settings=StageSettings(resources=own.resources or outer.resources),
        container=container,
        config=config,
        authorization=authorization,
    )
