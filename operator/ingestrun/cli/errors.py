"""Errors as kubectl phrases them, and the exit codes, which docs/cli.md lists."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import IntEnum
from typing import Any, Final


class ExitCode(IntEnum):
    """The exit code of a command."""

    OK = 0
    ERROR = 1
    """Any other error: the server cannot be reached, or refuses for a reason without a code of its own."""
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    """The run is not in a state in which that can be done: mostly it has already ended."""
    TIMED_OUT = 5
    FORBIDDEN = 6


_GRAVEST_FIRST: Final = (
    ExitCode.ERROR,
    ExitCode.USAGE,
    ExitCode.FORBIDDEN,
    ExitCode.TIMED_OUT,
    ExitCode.NOT_FOUND,
    ExitCode.CONFLICT,
    ExitCode.OK,
)


def gravest(codes: Iterable[ExitCode]) -> ExitCode:
    """Return the exit code of a command about several runs, each of which has its own; OK if there are none."""
    return min(codes, key=_GRAVEST_FIRST.index, default=ExitCode.OK)


class CliError(Exception):
    """An error that ends a command, or the part of it that is about one run; the text is what the user reads."""

    def __init__(self, text: str, code: ExitCode = ExitCode.ERROR) -> None:
        super().__init__(text)
        self.code = code


class UsageError(CliError):
    """A command line that cannot be understood."""

    def __init__(self, text: str) -> None:
        super().__init__(f"error: {text}", ExitCode.USAGE)


class ConflictError(CliError):
    """The refusal of something that the run's state does not allow."""

    def __init__(self, text: str) -> None:
        super().__init__(f"error: {text}", ExitCode.CONFLICT)


class ServerError(CliError):
    """A refusal by the API server, as its Status has it."""

    def __init__(self, status: Mapping[str, Any], http_code: int) -> None:
        self.status = status
        self.http_code = http_code
        super().__init__(_kubectl_sentence(status, http_code), _exit_code(status, http_code))

    @property
    def sentence(self) -> str:
        """The cause alone: of an invalid object the sentence of the rule that it breaks."""
        causes = _causes(self.status)
        prefix = "Invalid value: "
        if causes and causes[0][1].startswith(prefix):
            # The value stands before the sentence, and may have a colon in it; the API server puts it in quotes.
            return causes[0][1].removeprefix(prefix).rpartition('": ')[2]
        return causes[0][1] if causes else str(self.status.get("message") or f"HTTP {self.http_code}")


def _causes(status: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the causes of an invalid object, each a field and a message."""
    details = status.get("details") or {}
    return [(str(cause.get("field", "")), str(cause.get("message", ""))) for cause in details.get("causes") or ()]


def _kubectl_sentence(status: Mapping[str, Any], http_code: int) -> str:
    """Return what kubectl prints for this refusal."""
    reason, message = str(status.get("reason") or ""), str(status.get("message") or f"HTTP {http_code}")
    details = status.get("details") or {}
    if reason == "Unauthorized":
        return f"error: You must be logged in to the server ({message})"
    causes = _causes(status)
    if reason == "Invalid" and details.get("kind"):
        what = f'The {details["kind"]} "{details.get("name", "")}" is invalid'
        if len(causes) == 1:
            return f"{what}: {causes[0][0]}: {causes[0][1]}"
        return "\n".join([f"{what}: ", *(f"* {field}: {text}" for field, text in causes)]) if causes else what
    return f"Error from server ({reason}): {message}" if reason else f"Error from server: {message}"


def _exit_code(status: Mapping[str, Any], http_code: int) -> ExitCode:
    if http_code == 404:
        return ExitCode.NOT_FOUND
    if http_code in (401, 403):
        return ExitCode.FORBIDDEN
    if http_code == 409 or _already_ended(status):
        return ExitCode.CONFLICT
    return ExitCode.TIMED_OUT if http_code == 504 else ExitCode.ERROR


def _already_ended(status: Mapping[str, Any]) -> bool:
    """Tell whether the CRD's own rule has refused the cancel of a run that has ended (crds/ingestruns.yaml)."""
    return any(field == "spec.cancel" and "cannot be cancelled" in text for field, text in _causes(status))
