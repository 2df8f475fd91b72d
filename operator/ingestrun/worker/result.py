"""What the worker says: one result in the termination message, and JSON lines in the pod's log."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.text import truncate

ENV_TERMINATION_PATH: Final = "INGEST_TERMINATION_MESSAGE_PATH"
_MESSAGE_CHARS: Final = 512

_IDENTITY: Final = {
    "run": contract.ENV_RUN_NAME,
    "namespace": contract.ENV_RUN_NAMESPACE,
    "uid": contract.ENV_RUN_UID,
    "batch": contract.ENV_BATCH,
    "stage": contract.ENV_STAGE,
    "hook": contract.ENV_HOOK,
    "attempt": contract.ENV_ATTEMPT,
    "traceparent": "TRACEPARENT",
}


def failed(message: str, *, read: int = 0, rejected: int = 0) -> StageResult:
    """The result of a stage that did not come to its end; a long message is cut to what the contract takes."""
    short = truncate(message, _MESSAGE_CHARS)
    return StageResult(v=contract.VERSION, outcome=Outcome.FAILED, read=read, rejected=rejected, message=short)


def cancelled(message: str, *, read: int) -> StageResult:
    """The result of a stage that stopped because its run is cancelled: nothing was handed on, and nobody failed."""
    return StageResult(v=contract.VERSION, outcome=Outcome.CANCELLED, read=read, message=message)


def log(env: Mapping[str, str], event: str, **fields: object) -> None:
    """Write one JSON line to stdout, with the names of the run, the batch and the stage."""
    identity = {name: env[variable] for name, variable in _IDENTITY.items() if env.get(variable)}
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **identity, **fields}
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def leave(env: Mapping[str, str], text: str) -> None:
    """Put the text where the kubelet takes the termination message from.

    Outside Kubernetes there is no such file, and none is made unless the environment names one.
    """
    named = env.get(ENV_TERMINATION_PATH)
    path = Path(named or contract.TERMINATION_LOG)
    if not named and not path.exists():
        return
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        # The operator takes a missing result for a failure, and that is what it is.
        log(env, "the result could not be left", path=str(path), error=str(error))
