"""The worker's errors: a sentence for the user, and whether a retry can help."""

from __future__ import annotations

import errno
from typing import ClassVar, Final

from ingestrun.model.contract import NO_PROGRESS, SOURCE_CHANGED

_NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class WorkerError(Exception):
    """A stage failed. The text names what failed, where, and what to do; the user sees it, so it holds no secret.

    `read` and `rejected` are the rows counted so far; they go into the result.
    """

    permanent = False

    def __init__(self, message: str, *, read: int = 0, rejected: int = 0) -> None:
        super().__init__(message)
        self.read = read
        self.rejected = rejected


class PermanentError(WorkerError):
    """A failure that every further attempt would repeat. `reason` is the contract's word for it, if there is one."""

    permanent = True
    reason: ClassVar[str | None] = None


class NoProgressError(PermanentError):
    """A source that repeats itself, so that reading it would never end."""

    reason = NO_PROGRESS


class SourceChangedError(PermanentError):
    """A source that is not what the run's other fetches have read from."""

    reason = SOURCE_CHANGED


class RetryableError(WorkerError):
    """A failure that the next attempt may not meet."""


def to_worker_error(error: Exception) -> WorkerError:
    """Turn any error into a `WorkerError`; one that already is one is returned as it is."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return RetryableError(
            "no space left on the workspace volume: nothing of this batch was handed on; "
            "enlarge the volume or clear the data of ended runs"
        )
    if isinstance(error, MemoryError):
        return RetryableError("out of memory: use smaller pages or batches, or raise the memory limit")
    if isinstance(error, OSError) and error.errno is not None:
        where = f" at {error.filename}" if error.filename else ""
        return RetryableError(
            f"the workspace gave {errno.errorcode.get(error.errno, error.errno)}{where}: {error.strerror}"
        )
    # The text of an unexpected error may hold anything, also a URL with a token, so it stays in the pod's log.
    return RetryableError(f"unexpected {type(error).__name__}: the pod's log has the traceback")
