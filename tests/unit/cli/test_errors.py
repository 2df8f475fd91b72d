"""Refusals in kubectl's words, each with its exit code."""

from __future__ import annotations

from typing import Any

import pytest

from ingestrun.cli.errors import ExitCode, ServerError, gravest


def refused(code: int, reason: str, message: str, **details: Any) -> ServerError:
    return ServerError({"kind": "Status", "reason": reason, "message": message, "details": details}, code)


ENDED = "the run is already Succeeded and cannot be cancelled"
OF_FLIGHTS = {"kind": "IngestRun", "name": "flights"}


@pytest.mark.parametrize(
    ("error", "text", "code"),
    [
        (
            refused(404, "NotFound", 'ingestruns.ingestrun.dev "a" not found'),
            'Error from server (NotFound): ingestruns.ingestrun.dev "a" not found',
            ExitCode.NOT_FOUND,
        ),
        (
            refused(403, "Forbidden", "no right"),
            "Error from server (Forbidden): no right",
            ExitCode.FORBIDDEN,
        ),
        (
            refused(401, "Unauthorized", "Unauthorized"),
            "error: You must be logged in to the server (Unauthorized)",
            ExitCode.FORBIDDEN,
        ),
        (
            refused(
                422,
                "Invalid",
                "…",
                **OF_FLIGHTS,
                causes=[{"field": "spec.cancel", "message": f"Invalid value: {ENDED}"}],
            ),
            f'The IngestRun "flights" is invalid: spec.cancel: Invalid value: {ENDED}',
            ExitCode.CONFLICT,
        ),
        (
            refused(
                422,
                "Invalid",
                "…",
                **OF_FLIGHTS,
                causes=[{"field": "spec.a", "message": "Required value"}, {"field": "spec.b", "message": "Forbidden"}],
            ),
            'The IngestRun "flights" is invalid: \n* spec.a: Required value\n* spec.b: Forbidden',
            ExitCode.ERROR,
        ),
        (refused(409, "Conflict", "changed"), "Error from server (Conflict): changed", ExitCode.CONFLICT),
        (refused(504, "Timeout", "slow"), "Error from server (Timeout): slow", ExitCode.TIMED_OUT),
        (ServerError({"message": "bad gateway"}, 502), "Error from server: bad gateway", ExitCode.ERROR),
        (ServerError({}, 502), "Error from server: HTTP 502", ExitCode.ERROR),
    ],
    ids=lambda value: value.code.name if isinstance(value, ServerError) else "",
)
def test_a_refusal_is_told_as_kubectl_tells_it(error: ServerError, text: str, code: ExitCode) -> None:
    assert (str(error), error.code) == (text, code)


@pytest.mark.parametrize("message", [f"Invalid value: {ENDED}", f'Invalid value: "a: b": {ENDED}', ENDED])
def test_the_sentence_of_a_broken_rule_is_without_its_value(message: str) -> None:
    assert refused(422, "Invalid", "…", causes=[{"field": "spec.cancel", "message": message}]).sentence == ENDED


def test_the_sentence_of_another_refusal_is_the_servers_message() -> None:
    assert refused(404, "NotFound", 'ingestruns.ingestrun.dev "a" not found').sentence.endswith("not found")


def test_of_several_runs_the_gravest_exit_code_counts() -> None:
    assert gravest([]) is ExitCode.OK
    assert gravest([ExitCode.OK, ExitCode.CONFLICT]) is ExitCode.CONFLICT
    assert gravest([ExitCode.CONFLICT, ExitCode.NOT_FOUND, ExitCode.OK]) is ExitCode.NOT_FOUND
    assert gravest([ExitCode.NOT_FOUND, ExitCode.FORBIDDEN, ExitCode.TIMED_OUT]) is ExitCode.FORBIDDEN
    assert gravest(ExitCode) is ExitCode.ERROR
