"""The contract's environment of this container, read once and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeVar

from pydantic import BaseModel, ValidationError

from ingestrun.model import contract
from ingestrun.model.contract import Stage
from ingestrun.model.pool import ENV_POOL_URL
from ingestrun.model.worker import ENV_HTTP_AUTHORIZATION
from ingestrun.worker.errors import PermanentError

PARTITION_PLACEHOLDER: Final = "{partition}"
"""In a path, a URL or its parameters: stands for the partition's value."""
_MAX_DIGITS: Final = 18
_KEY: Final = re.compile(r"(?P<uid>[A-Za-z0-9][A-Za-z0-9.-]{0,62})/(?P<batch>[0-9]{1,18})")
Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Context:
    """One attempt at one stage of one batch; `config` is the JSON of the built-in source, hook or sink."""

    stage: Stage
    batch: int
    attempt: int
    hook: str | None
    key: str
    config: str
    cursor: str
    limit: int | None
    partitions: int | None
    partition_file: Path | None
    source_digest: str | None
    state: str
    input: Path | None
    output: Path | None
    rejects: Path | None
    workspace: Path | None
    """The volume that all stages share. A pool may have none; a container of its own always has one."""
    authorization: str | None

    def require(self, name: str, value: Path | None) -> Path:
        """Return a directory that this stage can't do without; `name` is its variable.

        Raises:
            PermanentError: the variable is not set.
        """
        if value is None:
            raise PermanentError(f"{name} is not set, stage {self.stage} needs it")
        return value


def read_context(env: Mapping[str, str]) -> Context:
    """Read the environment.

    Raises:
        PermanentError: a variable is missing or malformed; the text names it.
    """
    version = env.get(contract.ENV_CONTRACT, "")
    if version != contract.VERSION:
        raise PermanentError(
            f"{contract.ENV_CONTRACT} is {version!r}, this worker speaks {contract.VERSION}: "
            "use the worker image that belongs to the operator"
        )
    stage = env.get(contract.ENV_STAGE, "")
    if stage not in list(Stage):
        raise PermanentError(f"{contract.ENV_STAGE} is {stage!r}, not one of {', '.join(Stage)}")
    batch = _number(env, contract.ENV_BATCH)
    attempt = _number(env, contract.ENV_ATTEMPT)
    limit = _number(env, contract.ENV_LIMIT)
    partitions = _number(env, contract.ENV_PARTITIONS)
    if limit == 0 or partitions == 0:
        raise PermanentError(
            f"{contract.ENV_LIMIT} and {contract.ENV_PARTITIONS} must be at least 1 where they are set"
        )
    if batch is None:
        raise PermanentError(f"{contract.ENV_BATCH} is not set")
    return Context(
        stage=Stage(stage),
        batch=batch,
        attempt=attempt or 0,
        hook=env.get(contract.ENV_HOOK) or None,
        key=env.get(contract.ENV_IDEMPOTENCY_KEY, ""),
        config=env.get(contract.ENV_CONFIG, ""),
        cursor=env.get(contract.ENV_CURSOR, ""),
        limit=limit,
        partitions=partitions,
        partition_file=_path(env, contract.ENV_PARTITION_FILE),
        source_digest=env.get(contract.ENV_SOURCE_DIGEST) or None,
        state=env.get(contract.ENV_STATE, ""),
        input=_path(env, contract.ENV_INPUT),
        output=_path(env, contract.ENV_OUTPUT),
        rejects=_path(env, contract.ENV_REJECTS),
        workspace=_workspace(env),
        # A Secret that was made with `echo` ends in a newline.
        authorization=env.get(ENV_HTTP_AUTHORIZATION, "").strip() or None,
    )


def parse_key(key: str) -> tuple[str, int]:
    """Return the parts of the idempotency key: the UID of the run that began, over all resumes, and the batch.

    Raises:
        PermanentError: it is not such a key.
    """
    match = _KEY.fullmatch(key)
    if match is None:
        raise PermanentError(f"{contract.ENV_IDEMPOTENCY_KEY} is {key[:80]!r}, not <run uid>/<batch>")
    return match["uid"], int(match["batch"])


def parse_config(model: type[Model], text: str, what: str) -> Model:
    """Parse the JSON of a source, hook or sink; `what` names it in messages.

    Raises:
        PermanentError: the JSON does not fit the model; the text names the field, not its value, which may be a secret.
    """
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise PermanentError(f"{what} is not valid: {where + ': ' if where else ''}{first['msg']}") from None


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if not text:
        return None
    if not re.fullmatch(r"[0-9]+", text) or len(text) > _MAX_DIGITS:
        raise PermanentError(f"{name} is {text[:40]!r}, not a number")
    return int(text)


def _workspace(env: Mapping[str, str]) -> Path | None:
    path = env.get(contract.ENV_WORKSPACE) or (None if env.get(ENV_POOL_URL) else contract.WORKSPACE_MOUNT)
    return Path(path) if path else None


def _path(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name, "")
    if not text:
        return None
    if not text.startswith("/"):
        raise PermanentError(f"{name} is {text[:80]!r}, not an absolute path: the built-in worker needs a volume")
    return Path(text)
