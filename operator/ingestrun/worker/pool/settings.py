"""The environment of a pool's worker, read once and checked; and that of each stage of a batch, made from a claim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ingestrun.model import contract, pool
from ingestrun.model.contract import Stage
from ingestrun.model.pool import Claim, WorkerStage
from ingestrun.worker.errors import PermanentError

_PARTITION_VARIABLES = (contract.ENV_PARTITIONS, contract.ENV_PARTITION_FILE)


@dataclass(frozen=True)
class Settings:
    """The settings of a worker; `env` is the whole environment."""

    env: Mapping[str, str]
    url: str
    token: str
    ca: str | None
    stages: tuple[WorkerStage, ...]
    max_batches: int | None
    max_seconds: int | None

    def stage_env(self, claim: Claim, index: int) -> dict[str, str]:
        """Return the environment that the stage would have in a container of its own, without input and output."""
        stage = self.stages[index]
        env = {name: text for name, text in self.env.items() if claim.partition or name not in _PARTITION_VARIABLES}
        env |= {
            contract.ENV_BATCH: str(claim.batch),
            contract.ENV_ATTEMPT: str(claim.attempt),
            contract.ENV_IDEMPOTENCY_KEY: claim.idempotency_key,
            contract.ENV_STAGE: stage.stage.value,
            contract.ENV_CONFIG: self.env.get(pool.config_variable(index), ""),
            contract.ENV_CURSOR: claim.cursor or "",
            contract.ENV_LIMIT: "" if claim.limit is None else str(claim.limit),
            contract.ENV_STATE: claim.state or "",
            contract.ENV_SOURCE_DIGEST: claim.source_digest or "",
            contract.ENV_REJECTS: "",
        }
        if stage.stage is Stage.HOOK:
            env[contract.ENV_HOOK] = stage.name
            root = self.env.get(contract.ENV_REJECTS, "").rstrip("/")
            env[contract.ENV_REJECTS] = f"{root}/{claim.batch}-{stage.name}-{claim.attempt}" if root else ""
        return env


def read_settings(env: Mapping[str, str]) -> Settings:
    """Read the environment.

    Raises:
        PermanentError: a variable is missing or malformed; the text names it.
    """
    for name in (pool.ENV_POOL_URL, pool.ENV_POOL_TOKEN, pool.ENV_STAGES):
        if not env.get(name):
            raise PermanentError(f"{name} is not set")
    try:
        stages = pool.parse_stages(env[pool.ENV_STAGES])
    except ValueError as error:
        raise PermanentError(str(error)) from None
    for index, stage in enumerate(stages):
        if not env.get(pool.config_variable(index)):
            raise PermanentError(f"{pool.config_variable(index)} is not set, stage {stage.label} needs it")
    return Settings(
        env=env,
        url=env[pool.ENV_POOL_URL],
        token=env[pool.ENV_POOL_TOKEN],
        ca=env.get(pool.ENV_POOL_CA) or None,
        stages=stages,
        max_batches=_number(env, pool.ENV_MAX_BATCHES),
        max_seconds=_number(env, pool.ENV_MAX_SECONDS),
    )


def _number(env: Mapping[str, str], name: str) -> int | None:
    """Return the value of a variable that is a number from 1 on; None if it is unset. Raises PermanentError."""
    text = env.get(name, "")
    if text and not (text.isascii() and text.isdecimal() and int(text[:18]) > 0):
        raise PermanentError(f"{name} is {text[:40]!r}, not a number from 1 on")
    return int(text) if text else None
