"""What a cancel asks of a run, what is told of it, and which runs stand still."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest
from tests.unit.cli.support import NOW, FakeApi, Json, at, call, condition, run_body

from ingestrun.cli.cancelling import Outcome, Wish, patch_of
from ingestrun.cli.commands import cancel, cleanup
from ingestrun.cli.errors import ExitCode, ServerError
from ingestrun.cli.runs import Run, descendants
from ingestrun.cli.stale import last_progress, may_be_stale, stands_still
from ingestrun.model.names import RunKey

ALREADY_FAILED = "the run is already Failed and cannot be cancelled"
ALL = Wish(reason="new", cascade=True, terminate=True, grace_seconds=5)
CANCELLED = {"cancellation": {"acceptedAt": at(60), "requestedBy": "ada", "reason": "old", "policy": "Drain"}}
DRAINED = {**CANCELLED, "conditions": [condition("Drained", "True", "Drained")]}


def job(attempt: int, *, started: float | None = None, completed: float | None = None, succeeded: int = 0) -> Json:
    status: Json = {"succeeded": succeeded} if succeeded else {}
    status |= {"startTime": at(started)} if started is not None else {}
    status |= {"completionTime": at(completed)} if completed is not None else {}
    return {"metadata": {"labels": {"ingestrun.dev/attempt": str(attempt)}}, "status": status}


# --------------------------------------------------------------------------------------------------- the request


@pytest.mark.parametrize(
    ("body", "wish", "expected"),
    [
        (run_body(), Wish(), {"cancel": True}),
        (run_body(), Wish(reason="r"), {"cancel": True, "cancellation": {"reason": "r"}}),
        (
            run_body(phase=None),
            ALL,
            {
                "cancel": True,
                "cancellation": {"policy": "Terminate", "gracePeriodSeconds": 5, "cascade": True, "reason": "new"},
            },
        ),
        # Asked for already, and not applied yet: nothing is weakened, and the first reason stays.
        (run_body(spec={"cancel": True}), Wish(), None),
        (run_body(spec={"cancel": True, "cancellation": {"reason": "old"}}), Wish(reason="new"), None),
        (run_body(spec={"cancel": True}), Wish(reason="new"), {"cancellation": {"reason": "new"}}),
        (
            run_body(spec={"cancel": True, "cancellation": {"reason": "old", "cascade": True}}),
            ALL,
            {"cancellation": {"policy": "Terminate", "gracePeriodSeconds": 5}},
        ),
        # Cancelled: all that is left to ask for is that running pods are ended.
        (run_body(phase="Cancelled", status=CANCELLED), Wish(reason="new", cascade=True), None),
        (
            run_body(phase="Cancelled", status=CANCELLED),
            Wish(terminate=True),
            {"cancellation": {"policy": "Terminate"}},
        ),
        (run_body(phase="Cancelled", status=DRAINED), Wish(terminate=True), None),
        # The server itself refuses, by the CRD's rule.
        (run_body(phase="Succeeded"), Wish(), {"cancel": True}),
    ],
)
def test_the_request(body: Json, wish: Wish, expected: Json | None) -> None:
    assert patch_of(Run(body), wish) == (None if expected is None else {"spec": expected})


# --------------------------------------------------------------------------------------------------- the summary


def test_the_summary_of_the_seed() -> None:
    code, out, err = call(cancel, FakeApi(run_body()), "flights", "--reason", "Detected infinite loop")
    assert (code, err) == (ExitCode.OK, "")
    assert (
        out
        == """============================================================
Run:       flights
Status:    CANCELLED
Cancelled: 1 run(s)
Message:   Cancelled 1 run(s)
Reason:    Detected infinite loop
============================================================
"""
    )


def family() -> list[Json]:
    below = [
        run_body("child-1", spec={"parentRef": {"name": "flights"}}),
        run_body("child-2", ownerReferences=[{"kind": "IngestRun", "name": "flights", "uid": "uid-flights"}]),
        run_body("child-3", "Succeeded", spec={"parentRef": {"name": "flights"}}),
        run_body("grandchild", "Pending", spec={"parentRef": {"name": "child-1"}}),
    ]
    # The fake operator follows parentRef alone.
    below[1]["spec"]["parentRef"] = {"name": "flights"}
    return [run_body(), *below, run_body("stranger")]


def test_the_summary_with_cascade_lists_the_cancelled_runs() -> None:
    api = FakeApi(*family())
    code, out, err = call(cancel, api, "flights", "--cascade")
    assert (code, err) == (ExitCode.OK, "")
    assert out.splitlines()[3:] == [
        "Cancelled: 4 run(s)",
        "Message:   Cancelled 4 run(s)",
        "Cancelled runs:",
        "  - flights",
        "  - child-1",
        "  - child-2",
        "  - grandchild",
        "=" * 60,
    ]
    assert [name for name, _ in api.patches] == ["flights"], "the operator cancels those below"


def test_below_a_run_that_was_cancelled_alone_each_child_is_cancelled() -> None:
    bodies = family()
    bodies[0] = run_body(phase="Cancelled", status=CANCELLED)
    api = FakeApi(*bodies)
    code, out, _ = call(cancel, api, "flights", "--cascade", "--json")
    assert code is ExitCode.OK
    assert [name for name, _ in api.patches] == ["child-1", "child-2"]
    assert json.loads(out)["cancelled_runs"] == ["child-1", "grandchild", "child-2"]
    assert json.loads(out)["message"].endswith("; cancelled 3 run(s) below")


def test_json_is_that_of_the_seed() -> None:
    api = FakeApi(run_body())
    code, out, _ = call(cancel, api, "flights", "--json")
    assert (code, json.loads(out)) == (
        ExitCode.OK,
        {
            "status": "cancelled",
            "run": "flights",
            "namespace": "geo",
            "cancelled_runs": ["flights"],
            "message": "Cancelled 1 run(s)",
        },
    )


def test_a_repeated_cancel_changes_nothing_and_tells_of_the_first() -> None:
    api = FakeApi(run_body(phase="Cancelled", status=CANCELLED))
    code, out, err = call(cancel, api, "flights", "--json", "--reason", "another")
    assert (code, err, api.patches) == (ExitCode.OK, "", [])
    found = json.loads(out)
    assert (found["status"], found["cancelled_runs"], found["reason"]) == ("cancelled", [], "old")
    assert found["message"] == f"flights is already Cancelled, since {at(60)}, by ada"


def test_terminate_of_a_cancelled_run_is_told() -> None:
    code, out, _ = call(cancel, FakeApi(run_body(phase="Cancelled", status=CANCELLED)), "flights", "--terminate")
    assert code is ExitCode.OK
    assert "flights was already Cancelled; its pods are terminated now" in out


def test_it_goes_on_after_a_failure() -> None:
    ended = ServerError(
        {
            "reason": "Invalid",
            "details": {
                "kind": "IngestRun",
                "name": "b",
                "causes": [{"field": "spec.cancel", "message": f"Invalid value: {ALREADY_FAILED}"}],
            },
        },
        422,
    )
    api = FakeApi(run_body("a"), run_body("b", "Failed"), run_body("c"))
    api.refuse = {"b": ended}
    code, out, err = call(cancel, api, "a", "missing", "b", "c", "--json")
    assert code is ExitCode.NOT_FOUND
    assert [(item["run"], item["status"], item["message"]) for item in json.loads(out)["items"]] == [
        ("a", "cancelled", "Cancelled 1 run(s)"),
        ("missing", "error", 'ingestruns.ingestrun.dev "missing" not found'),
        ("b", "error", ALREADY_FAILED),
        ("c", "cancelled", "Cancelled 1 run(s)"),
    ]
    assert len(err.splitlines()) == 2
    assert call(cancel, api, "b")[0] is ExitCode.CONFLICT


def test_a_selector_leaves_ended_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = [run_body("a"), run_body("b", "Succeeded"), run_body("c", "Cancelled", status=CANCELLED)]
    api = FakeApi(*bodies)
    code, out, _ = call(cancel, api, "--all", "-o", "name")
    assert (code, out) == (ExitCode.OK, "ingestrun.ingestrun.dev/a\n")
    code, out, err = call(cancel, api, "-l", "team=geo", "-o", "json")
    assert (code, json.loads(out), err) == (ExitCode.OK, {"items": []}, "No active runs found in geo namespace.\n")


def test_an_operator_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cancel, "SETTLE_SECONDS", 0.01)
    api = FakeApi(run_body(), operator=False)
    code, out, _ = call(cancel, api, "flights")
    assert code is ExitCode.OK
    assert "Status:    CANCEL REQUESTED\nCancelled: 0 run(s)" in out
    assert "the operator has not applied it yet" in out
    code, out, err = call(cancel, FakeApi(run_body(), operator=False), "flights", "--wait", "--timeout", "10ms")
    assert (code, err) == (
        ExitCode.TIMED_OUT,
        "error: timed out waiting for the condition on ingestruns/flights\n",
    )


def test_a_user_who_may_not_watch_is_told_that_the_cancel_is_stored() -> None:
    class Unwatched(FakeApi):
        def runs(self, *_: Any, **__: Any) -> Any:
            raise ServerError({"reason": "Forbidden", "message": "cannot list"}, 403)

    code, out, err = call(cancel, Unwatched(run_body(), operator=False), "flights", "--json")
    assert (code, err) == (ExitCode.OK, "Error from server (Forbidden): cannot list\n")
    assert (json.loads(out)["status"], json.loads(out)["cancelled_runs"]) == ("requested", [])
    assert call(cancel, Unwatched(run_body(), operator=False), "flights", "--wait")[0] is ExitCode.FORBIDDEN


def test_waiting_for_the_drain_tells_what_became_of_the_batches() -> None:
    body = run_body(
        phase="Cancelled",
        status={**DRAINED, "cancellation": {"acceptedAt": at(9), "published": "3", "notPublished": "4-5"}},
    )
    code, out, _ = call(cancel, FakeApi(body), "flights", "--wait=drained")
    assert code is ExitCode.OK
    assert "Drained:   yes; published late: batch 3; not published: batch 4-5\n" in out


def test_a_dry_run_sends_nothing_that_stays() -> None:
    api = FakeApi(*family())
    for kind, words in (("--dry-run", "server dry run"), ("--dry-run=client", "dry run")):
        code, out, _ = call(cancel, api, "flights", "--cascade", kind)
        assert code is ExitCode.OK
        assert f"Would cancel 4 run(s) ({words})" in out
    assert api.bodies["flights"]["status"]["phase"] == "Running"
    assert call(cancel, FakeApi(run_body(phase="Failed")), "flights", "--dry-run=client")[0] is ExitCode.CONFLICT


def test_what_others_have_written_does_not_steer_the_terminal() -> None:
    outcome = Outcome(key=RunKey(namespace="geo", name="a"), status="cancelled", message="m", reason="\x1b[2Jgone")
    assert "\x1b" not in outcome.summary(with_namespace=False)


# ------------------------------------------------------------------------------------------------------- staleness


@pytest.mark.parametrize(
    ("body", "jobs", "seconds"),
    [
        (run_body(phase="Pending", age=900), [], 900),
        (run_body(age=9000, status={"startTime": at(8000)}), [], 8000),
        (run_body(age=9000, status={"startTime": at(8000), "lastProgressTime": at(30)}), [], 30),
        # A stage that has begun for the first time, or ended well, is progress; a retry is none.
        (run_body(age=9000), [job(0, started=50)], 50),
        (run_body(age=9000), [job(0, started=700, completed=40, succeeded=1)], 40),
        (run_body(age=9000), [job(0, started=700), job(1, started=20, completed=10)], 700),
        (run_body(age=9000), [job(1, started=20, completed=10, succeeded=1)], 10),
        # The end of a suspension, or of a wait for room, begins anew; the wait itself does not help.
        (run_body(age=9000, status={"conditions": [condition("Suspended", "False", "Resumed", ago=5)]}), [], 5),
        (run_body(age=9000, status={"conditions": [condition("Backpressured", "True", "QuotaExceeded")]}), [], 9000),
    ],
)
def test_progress_counts_and_not_age(body: Json, jobs: list[Json], seconds: float) -> None:
    assert stands_still(Run(body), NOW, jobs) == timedelta(seconds=seconds)
    assert last_progress(Run(body), jobs) == NOW - timedelta(seconds=seconds)


@pytest.mark.parametrize(
    ("body", "may"),
    [
        (run_body(phase=None), True),
        (run_body(phase="Pending"), True),
        (run_body(), True),
        (run_body(phase="Suspended"), False),
        (run_body(spec={"suspend": True}), False),
        (run_body(spec={"cancel": True}), False),
        (run_body(deletionTimestamp=at(1)), False),
        (run_body(phase="Succeeded"), False),
    ],
)
def test_which_runs_can_be_stale(body: Json, may: bool) -> None:
    assert may_be_stale(Run(body)) is may


def test_stale_runs_are_cancelled_with_that_as_the_reason_and_healthy_ones_left_alone() -> None:
    old = run_body("old", age=90_000, status={"lastProgressTime": at(5)})
    api = FakeApi(run_body("stuck", age=720), run_body("waiting", "Pending", age=660), old, run_body("new", age=60))
    code, out, _ = call(cleanup, api, "--stale", "10m", "-o", "json")
    assert code is ExitCode.OK
    assert {item["run"]: item["reason"] for item in json.loads(out)["items"]} == {
        "stuck": "no progress for 12m",
        "waiting": "no progress for 11m",
    }
    assert {name: patch["metadata"] for name, patch in api.patches} == {
        "stuck": {"resourceVersion": "1"},
        "waiting": {"resourceVersion": "1"},
    }
    assert call(cancel, api, "--stale", "10m")[2] == "No stale runs found in geo namespace.\n"


def test_a_run_whose_jobs_show_progress_is_left_alone() -> None:
    api = FakeApi(run_body(age=9000), jobs=[job(0, started=20)])
    code, out, _ = call(cleanup, api, "--stale", "10m")
    assert (code, api.patches) == (ExitCode.OK, [])
    assert "Status:    SKIPPED" in out
    assert "Left alone: it made progress 20s ago" in out


@pytest.mark.parametrize("progress", [{"lastProgressTime": at(1)}, {"phase": "Succeeded"}], ids=["batch", "end"])
def test_a_run_that_makes_progress_just_before_the_write_is_left_alone(progress: dict[str, Any]) -> None:
    api = FakeApi(run_body(age=9000))

    def move_on(name: str) -> None:
        if api.bodies[name]["metadata"]["resourceVersion"] == "1":
            api.bodies[name]["status"] |= progress
            api.touch(api.bodies[name])

    api.before_patch = move_on
    code, out, _ = call(cleanup, api, "--stale", "10m")
    assert (code, api.patches) == (ExitCode.OK, [])
    assert "Left alone" in out


def test_a_stale_run_that_has_only_changed_is_judged_again_and_cancelled() -> None:
    api = FakeApi(run_body(age=9000))

    def relabel(name: str) -> None:
        if api.bodies[name]["metadata"]["resourceVersion"] == "1":
            api.touch(api.bodies[name])

    api.before_patch = relabel
    code, _, _ = call(cleanup, api, "--stale", "10m")
    assert code is ExitCode.OK
    assert [patch["metadata"]["resourceVersion"] for _, patch in api.patches] == ["2"]
    api = FakeApi(run_body(age=9000))
    api.before_patch = lambda name: api.touch(api.bodies[name])
    code, _, err = call(cleanup, api, "--stale", "10m")
    assert (code, err) == (ExitCode.CONFLICT, 'error: run "flights" changes all the time: try again\n')


def test_descendants_are_found_level_by_level_also_in_a_circle() -> None:
    runs = [Run(run_body(name, spec={"parentRef": {"name": parent}})) for name, parent in ("ba", "cb", "db", "ac")]
    assert [run.name for run in descendants(RunKey(namespace="geo", name="a"), runs)] == ["b", "c", "d"]
