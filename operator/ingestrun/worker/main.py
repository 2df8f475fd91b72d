"""The worker's entry point: one stage of one batch, told by the environment, answered by result and exit code."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

from ingestrun.worker.shutdown import EXIT_STOPPED, Cancelled, Stop, Stopped

if TYPE_CHECKING:
    from ingestrun.model.contract import StageResult
    from ingestrun.worker.context import Context


def main() -> None:
    """Do the stage and end the process."""
    stop = Stop()
    # First of all: as process 1 of a container we would not even be killed by a SIGTERM without a handler.
    stop.install()
    try:
        code = run(os.environ, stop)
    except Stopped:
        code = EXIT_STOPPED
    sys.exit(code)


def run(env: Mapping[str, str], stop: Stop) -> int:
    """Do the stage, leave its result, and return the exit code: 0, 65 for permanent, 143 for SIGTERM, else 1.

    A cancelled run is 0 as well: the Job is complete, and its result says that it is nobody's failure.
    """
    from ingestrun.model import contract
    from ingestrun.worker import faults
    from ingestrun.worker import result as report
    from ingestrun.worker.errors import explain

    fault = None
    try:
        fault = faults.find_fault(env)
        if fault is not None:
            report.log(env, "fault on purpose", kind=fault.kind)
        if (code := faults.at_start(fault)) is not None:
            return code
        result, code = _do_stage(env, stop), contract.EXIT_DONE
    except Stopped:
        result, code = report.failed("stopped by SIGTERM, nothing published"), EXIT_STOPPED
    except Cancelled as cancelled:
        stop.ignore()
        result, code = report.cancelled(str(cancelled), read=cancelled.rows), contract.EXIT_DONE
    except Exception as error:
        stop.ignore()
        failure = explain(error)
        if failure is not error:
            traceback.print_exc()
        result = report.failed(str(failure), read=failure.read, rejected=failure.rejected)
        code = contract.EXIT_PERMANENT if failure.permanent else 1
    stop.ignore()
    text: str | None = contract.render_result(result)
    if result.outcome is contract.Outcome.DONE and (swapped := faults.at_end(fault)) is not None:
        code, text = swapped
    if text is not None:
        report.leave(env, text)
    report.log(env, "stage ended", exit_code=code, **result.model_dump(mode="json", by_alias=True, exclude_none=True))
    return code


def _do_stage(env: Mapping[str, str], stop: Stop) -> StageResult:
    from ingestrun.model import contract
    from ingestrun.model.contract import RESULT_MAX_BYTES, Stage, render_result
    from ingestrun.worker import result as report
    from ingestrun.worker.context import read_context
    from ingestrun.worker.errors import PermanentError

    context = read_context(env)
    if env.get(contract.ENV_CANCELLATION_URL):
        from ingestrun.worker.cancellation import CancellationCheck

        stop.ask(CancellationCheck.of(env, partial(report.log, env)))
    report.log(env, "stage starts")
    if not context.config:
        raise PermanentError("INGEST_CONFIG is not set: the built-in worker needs a source, a hook or a sink")
    stages = {Stage.FETCH: _fetch, Stage.HOOK: _hook, Stage.PUBLISH: _publish}
    result = stages[context.stage](context, stop)
    if len(render_result(result).encode()) > RESULT_MAX_BYTES:
        raise PermanentError(f"the cursor to go on from is too long for a result of {RESULT_MAX_BYTES} bytes")
    return result


# Each stage imports what it alone needs: httpx for an HTTP source, pyarrow's compute for validate, and so on.


def _fetch(context: Context, stop: Stop) -> StageResult:
    from ingestrun.worker.fetch import fetch

    return fetch(context, stop)


def _hook(context: Context, stop: Stop) -> StageResult:
    from ingestrun.worker.hook import run_hook

    return run_hook(context, stop)


def _publish(context: Context, stop: Stop) -> StageResult:
    from ingestrun.worker.publish import publish

    return publish(context, stop)
