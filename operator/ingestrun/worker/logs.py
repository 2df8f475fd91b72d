"""The worker's log: one JSON line for each event."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from ingestrun.model import contract

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


def log_event(env: Mapping[str, str], event: str, **fields: object) -> None:
    """Write one JSON line to stdout, with the run, the batch, the stage and the attempt from the environment."""
    identity = {name: env[variable] for name, variable in _IDENTITY.items() if env.get(variable)}
    line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, **identity, **fields}
    sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
    sys.stdout.flush()
