"""The hook stage: the built-in hooks by name. There is one, `validate`."""

from __future__ import annotations

import json

from ingestrun.model.contract import StageResult
from ingestrun.model.worker import Validate
from ingestrun.worker.context import Context, parse
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.shutdown import Stop


def run_hook(context: Context, stop: Stop) -> StageResult:
    """Run the hook that the configuration names.

    Raises:
        WorkerError: the configuration names none that is built in, or the hook failed.
    """
    try:
        config = json.loads(context.config)
    except ValueError:
        raise PermanentError("the hook's configuration is not JSON") from None
    if not isinstance(config, dict) or set(config) != {"validate"}:
        raise PermanentError('the built-in hook is {"validate": {...}}; the configuration has something else')
    from ingestrun.worker.validate import validate

    return validate(parse(Validate, json.dumps(config["validate"]), "the hook validate"), context, stop)
