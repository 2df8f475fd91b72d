"""How the worker fails: in a sentence for the user, and with the word whether a retry can mend it."""

from __future__ import annotations

import errno
from typing import Final

NO_SPACE: Final = (errno.ENOSPC, errno.EDQUOT)


class WorkerError(Exception):
    """A stage failed. The text says what, where and what to do; it is shown to the user and holds no secret.

    `read` and `rejected` go into the result where they are known by then.
    """

    permanent = False

    def __init__(self, message: str, *, read: int = 0, rejected: int = 0) -> None:
        super().__init__(message)
        self.read = read
        self.rejected = rejected


class PermanentError(WorkerError):
    """A failure that would come again with every attempt."""

    permanent = True


class RetryableError(WorkerError):
    """A failure that may be gone with the next attempt."""


def explain(error: Exception) -> WorkerError:
    """Say an error that no module took care of as a `WorkerError`; one that is already passes through."""
    if isinstance(error, WorkerError):
        return error
    if isinstance(error, OSError) and error.errno in NO_SPACE:
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
    # The text of an unforeseen error may hold anything, a URL with a token as well: it stays in the pod's log.
    return RetryableError(f"unexpected {type(error).__name__}: the pod's log has the traceback")
