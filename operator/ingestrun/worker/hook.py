"""The hook stage: runs the built-in hook that the configuration names. There is one, `validate`."""

from __future__ import annotations

import json

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.worker import Validate
from ingestrun.worker.context import Context, parse_config
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.quarantine import Quarantine
from ingestrun.worker.rows import Rows
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import DATA_FILE, InputReader, ParquetFileWriter, atomic_directory
from ingestrun.worker.validate import ValidateLink


def open_quarantine(context: Context) -> Quarantine:
    """Return the quarantine of this attempt at the hook.

    Raises:
        PermanentError: the contract's variable is not set.
    """
    return Quarantine(context.require(contract.ENV_REJECTS, context.rejects))


def open_hook(context: Context, source: Rows, quarantine: Quarantine, stop: Stop) -> ValidateLink:
    """Return the link that the configuration names; no row is read yet.

    Raises:
        PermanentError: the configuration names no built-in hook, or the hook does not fit the rows.
    """
    try:
        config = json.loads(context.config)
    except ValueError:
        raise PermanentError("the hook's configuration is not JSON") from None
    if not isinstance(config, dict) or set(config) != {"validate"}:
        raise PermanentError('the built-in hook is {"validate": {...}}; the configuration has something else')
    rules = parse_config(Validate, json.dumps(config["validate"]), "the hook validate")
    return ValidateLink(rules, source, quarantine, context.batch, stop)


def run_hook(context: Context, stop: Stop) -> StageResult:
    """Run the hook from the input directory to the output directory.

    Raises:
        WorkerError: the configuration names no built-in hook, or the hook failed. Where it failed because it rejected
            too many rows, the quarantine is kept.
    """
    stop.raise_if_stopped()
    source = InputReader(context.require(contract.ENV_INPUT, context.input))
    output = context.require(contract.ENV_OUTPUT, context.output)
    with open_quarantine(context) as quarantine:
        link = open_hook(context, source, quarantine, stop)
        # The quarantine gets its name before the output, which so never appears without it.
        with atomic_directory(output) as directory:
            with ParquetFileWriter(directory / DATA_FILE, link.schema) as file:
                for table in link.tables():
                    file.write(table)
            stop.commit_point()
            quarantine.keep()
    return StageResult(
        v=contract.VERSION, outcome=Outcome.DONE, read=link.read, written=link.rows or 0, rejected=link.rejected
    )
