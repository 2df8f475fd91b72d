"""The result of a stage, which the container leaves in its termination message."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.text import truncate
from ingestrun.worker.logs import log_event

ENV_TERMINATION_PATH: Final = "INGEST_TERMINATION_MESSAGE_PATH"
_MESSAGE_CHARS: Final = 512


def failed_result(message: str, *, reason: str | None = None, read: int = 0, rejected: int = 0) -> StageResult:
    """Return the result of a stage that failed, its message truncated to what the contract takes."""
    short = truncate(message, _MESSAGE_CHARS)
    return StageResult(
        v=contract.VERSION, outcome=Outcome.FAILED, reason=reason, read=read, rejected=rejected, message=short
    )


def cancelled_result(message: str, *, read: int) -> StageResult:
    """Return the result of a stage that stopped because its run is cancelled: no failure, and nothing handed on."""
    return StageResult(v=contract.VERSION, outcome=Outcome.CANCELLED, read=read, message=message)


def termination_path(env: Mapping[str, str]) -> Path:
    """Return the file from which the kubelet takes the termination message."""
    return Path(env.get(ENV_TERMINATION_PATH) or contract.TERMINATION_LOG)


def write_result(env: Mapping[str, str], result: StageResult) -> None:
    """Write the result as the termination message.

    Outside Kubernetes the default file does not exist. Then nothing is written, unless the environment names a file.
    """
    path = termination_path(env)
    if not env.get(ENV_TERMINATION_PATH) and not path.exists():
        return
    try:
        path.write_text(contract.render_result(result), encoding="utf-8")
    except OSError as error:
        # The exit code stays as it is: the operator counts a missing result as a failure anyway.
        log_event(env, "the result could not be written", path=str(path), error=str(error))
