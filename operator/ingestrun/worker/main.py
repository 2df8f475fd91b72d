"""The worker's entry point: run the stage that the environment describes, leave a result and an exit code."""

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
    """Run the stage and exit."""
    stop = Stop()
    # Before all else, because process 1 of a container ignores a SIGTERM for which it has no handler.
    stop.install()
    try:
        code = run(os.environ, stop)
    except Stopped:
        code = EXIT_STOPPED
    sys.exit(code)


def run(env: Mapping[str, str], stop: Stop) -> int:
    """Run the stage, write its result, and return the exit code: 0, 65 if permanent, 143 on SIGTERM, else 1.

    The stage of a cancelled run ends with 0 too, so that its Job completes; the outcome in the result is `cancelled`.
    With the address of a pool in the environment, the container is a worker of it, and runs batch after batch.
    """
    from ingestrun.model import contract
    from ingestrun.model.pool import ENV_POOL_URL

    if env.get(ENV_POOL_URL):
        from ingestrun.worker.pool.worker import run_worker

        return run_worker(env, stop)
    from ingestrun.worker.errors import PermanentError, to_worker_error
    from ingestrun.worker.logs import log_event
    from ingestrun.worker.result import cancelled_result, failed_result, write_result

    try:
        result, code = _run_stage(env, stop), contract.EXIT_DONE
    except Stopped:
        result, code = failed_result("stopped by SIGTERM, nothing published"), EXIT_STOPPED
    except Cancelled as cancelled:
        stop.ignore_signals()
        result, code = cancelled_result(str(cancelled), read=cancelled.rows), contract.EXIT_DONE
    except Exception as error:
        stop.ignore_signals()
        failure = to_worker_error(error)
        if failure is not error:
            traceback.print_exc()
        reason = failure.reason if isinstance(failure, PermanentError) else None
        result = failed_result(str(failure), reason=reason, read=failure.read, rejected=failure.rejected)
        code = contract.EXIT_PERMANENT if failure.permanent else 1
    stop.ignore_signals()
    write_result(env, result)
    log_event(env, "stage ended", exit_code=code, **result.model_dump(mode="json", by_alias=True, exclude_none=True))
    return code


def _run_stage(env: Mapping[str, str], stop: Stop) -> StageResult:
    from ingestrun.model import contract
    from ingestrun.model.contract import RESULT_MAX_BYTES, Stage, render_result
    from ingestrun.worker.context import read_context
    from ingestrun.worker.errors import PermanentError
    from ingestrun.worker.logs import log_event

    context = read_context(env)
    if env.get(contract.ENV_CANCELLATION_URL):
        from ingestrun.worker.cancellation import CancellationClient

        stop.set_cancellation_client(CancellationClient.from_env(env, partial(log_event, env)))
    log_event(env, "stage starts")
    if not context.config:
        raise PermanentError("INGEST_CONFIG is not set: the built-in worker needs a source, a hook or a sink")
    stages = {Stage.FETCH: _fetch, Stage.HOOK: _hook, Stage.PUBLISH: _publish}
    result = stages[context.stage](context, stop)
    if len(render_result(result).encode()) > RESULT_MAX_BYTES:
        # A long cursor has precedence: without the state a source that repeats itself is only recognized later.
        result = result.model_copy(update={"state": None})
    if len(render_result(result).encode()) > RESULT_MAX_BYTES:
        raise PermanentError(f"the cursor to go on from is too long for a result of {RESULT_MAX_BYTES} bytes")
    return result


# A stage imports only what it needs (httpx for an HTTP source, pyarrow.compute for `validate`), so that it starts fast.


def _fetch(context: Context, stop: Stop) -> StageResult:
    from ingestrun.worker.fetch import fetch

    return fetch(context, stop)


def _hook(context: Context, stop: Stop) -> StageResult:
    from ingestrun.worker.hook import run_hook

    return run_hook(context, stop)


def _publish(context: Context, stop: Stop) -> StageResult:
    from ingestrun.worker.publish import publish

    return publish(context, stop)
