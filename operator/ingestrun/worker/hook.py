"""The hook stage: runs the built-in hook that the configuration names. There is one, `validate`."""

from __future__ import annotations

import json

from ingestrun.model.contract import StageResult
from ingestrun.model.worker import Validate
from ingestrun.worker.context import Context, parse_config
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.shutdown import Stop


def run_hook(context: Context, stop: Stop) -> StageResult:
    """Run the hook that the configuration names.

    Raises:
        WorkerError: the configuration names no built-in hook, or the hook failed.
    """
    try:
        config = json.loads(context.config)
    except ValueError:
        raise PermanentError("the hook's configuration is not JSON") from None
    if not isinstance(config, dict) or set(config) != {"validate"}:
        raise PermanentError('the built-in hook is {"validate": {...}}; the configuration has something else')
    from ingestrun.worker.validate import validate

    return validate(parse_config(Validate, json.dumps(config["validate"]), "the hook validate"), context, stop)
