"""What the commands about runs print and send; the runs are JSON, the API server is in memory."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from tests.unit.cli.support import NOW, FakeApi, Json, at, call, condition, run_body

from ingestrun.cli import completion
from ingestrun.cli.commands import explain, history, resume, retry, run, status, suspend, tree, unsuspend
from ingestrun.cli.commands import list as list_command
from ingestrun.cli.errors import ConflictError, ExitCode, UsageError
from ingestrun.cli.output import Output, table
from ingestrun.cli.progress import PaceMeter, average_pace, change_line, share_done, status_text, time_left
from ingestrun.cli.resuming import next_name
from ingestrun.cli.runs import Run
from ingestrun.cli.session import Session

BATCHES = {"published": "0-9", "failed": "10", "claimed": "0-12", "active": 2}
RUNNING = run_body(
    age=200,
    spec={"batches": {"partitions": {"count": 31}}, "parallelism": 2},
    status={
        "startTime": at(100),
        "batches": BATCHES,
        "records": {"fetched": 5200, "published": 5000, "rejected": 7},
        "conditions": [condition("Reconciling", "True", "Retrying", "batch 11, publish: Error")],
        "retries": [{"stage": "hook check", "reason": "Error", "count": 17}],
        "failures": [
            {"batch": 10, "stage": "fetch", "attempt": 1, "reason": "Error", "message": "exit code 1", "time": at(30)}
        ],
    },
)


NO_ROOM = condition("Backpressured", "True", "QuotaExceeded", "no more Jobs", ago=90)
SEEN = condition("Finished", "False", "Running")


def ended(name: str, phase: str, ago: float, **status: Any) -> Json:
    return run_body(name, phase, age=ago + 90, status={"startTime": at(ago + 60), "completionTime": at(ago), **status})


CANCELLED = ended(
    "geo",
    "Cancelled",
    30,
    cancellation={"acceptedAt": at(30), "requestedBy": "ada", "reason": "wrong month", "policy": "Drain"},
    records={"published": 1234},
    batches={"published": "0-1"},
)
FAILED = ended("sales", "Failed", 300, conditions=[condition("Succeeded", "False", "BatchFailed", "batch 3 failed")])


# ------------------------------------------------------------------------------------------------------------ lists


def test_a_list_shows_phase_progress_rows_reason_duration_and_age() -> None:
    code, out, _ = call(list_command, FakeApi(RUNNING, CANCELLED))
    assert code is ExitCode.OK
    assert out.splitlines() == [
        "NAME      PHASE       BATCHES   ROWS    REJECTED   REASON   DURATION   AGE",
        "flights   Running     10/31     5,000   7          <none>   100s       3m20s",
        "geo       Cancelled   2/2       1,234   0          <none>   60s        2m",
    ]


def test_a_list_of_cancelled_runs_shows_when_by_whom_and_why_newest_first() -> None:
    older = ended("old", "Cancelled", 999, cancellation={"acceptedAt": at(999)})
    _, out, _ = call(list_command, FakeApi(older, RUNNING, CANCELLED), "--phase", "cancelled")
    assert [line.split(maxsplit=3) for line in out.splitlines()] == [
        ["NAME", "CANCELLED", "BY", "REASON"],
        ["geo", at(30), "ada", "wrong month"],
        ["old", at(999), "<none>", "<none>"],
    ]


def test_a_list_as_data_is_kubectls() -> None:
    _, out, _ = call(list_command, FakeApi(RUNNING, CANCELLED), "--phase", "Running,Failed", "-o", "json")
    found = json.loads(out)
    assert (found["kind"], [item["metadata"]["name"] for item in found["items"]]) == ("List", ["flights"])
    assert call(list_command, FakeApi(RUNNING), "-o", "name")[1] == "ingestrun.ingestrun.dev/flights\n"
    assert call(list_command, FakeApi())[2] == "No runs found in geo namespace.\n"
    assert call(list_command, FakeApi(), "-A")[2] == "No runs found.\n"


def test_a_phase_that_does_not_exist_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match='invalid argument "canceled" for "--phase"'):
        call(list_command, FakeApi(), "--phase", "canceled")


def test_history_has_the_ended_runs_newest_first() -> None:
    _, out, _ = call(history, FakeApi(FAILED, RUNNING, CANCELLED))
    assert out.splitlines() == [
        "NAME    PHASE       ENDED                  BY    REASON           ROWS    DURATION",
        "geo     Cancelled   2026-11-28T11:59:30Z   ada   wrong month      1,234   60s",
        "sales   Failed      2026-11-28T11:55:00Z   -     batch 3 failed   0       60s",
    ]
    _, out, _ = call(history, FakeApi(FAILED, RUNNING, CANCELLED), "--limit", "1", "-o", "json")
    assert json.loads(out)["items"] == [
        {
            "run": "geo",
            "namespace": "geo",
            "phase": "Cancelled",
            "ended": at(30),
            "by": "ada",
            "reason": "wrong month",
            "rows": 1234,
            "rejected": 0,
            "duration_seconds": 60,
        }
    ]


def test_a_tree_shows_the_runs_below() -> None:
    child, other = (run_body(name, spec={"parentRef": {"name": "top"}}) for name in ("child", "other"))
    grandchild = run_body("grandchild", ownerReferences=[{"kind": "IngestRun", "name": "child"}])
    api = FakeApi(run_body("top"), child, other, grandchild, run_body("alone"))
    for words in ([], ["top"]):
        _, out, _ = call(tree, api, *words)
        assert [line.partition(" Running")[0].rstrip() for line in out.splitlines()[1:]] == [
            "top",
            "├── child",
            "│   └── grandchild",
            "└── other",
        ]
    assert "alone" in call(tree, api, "alone")[1]
    assert call(tree, FakeApi(run_body("alone")))[2] == "No run in geo namespace has runs below it.\n"


def test_a_table_keeps_its_widths_and_lets_no_cell_steer_the_terminal() -> None:
    widths: list[int] = []
    assert table(["A", "B"], [["longer", "1"]], widths=widths) == "A        B\nlonger   1"
    assert table([], [["x", "a\nb\x1b[2J"]], widths=widths) == "x        a b?[2J"


# --------------------------------------------------------------------------------------------------------- progress


def test_the_page_of_a_run_shows_speed_time_left_retries_and_failures() -> None:
    run_ = Run(RUNNING)
    job = {
        "metadata": {
            "creationTimestamp": at(9),
            "labels": {"ingestrun.dev/batch": "11", "ingestrun.dev/stage": "publish", "ingestrun.dev/attempt": "1"},
        },
        "spec": {},
        "status": {"startTime": at(8), "ready": 1},
    }
    done = {**job, "status": {"completionTime": at(1)}}
    text = status_text(run_, NOW, Output(), pace=average_pace(run_, NOW), jobs=[job, done])
    assert (
        text
        == """Name:      flights
Namespace: geo
Phase:     Running
Duration:  100s
Progress:  35%
Batches:   10/31 published, 2 in flight, 1 failed (10)
Rows:      5,000 published, 7 rejected, 50 a second
Time left: about 3m20s
Now:       Retrying: batch 11, publish: Error

IN FLIGHT: BATCH   STAGE     ATTEMPT   STATE     FOR
11                 publish   2         Running   8s

RETRIED: STAGE   REASON   TIMES
hook check       Error    17

FAILED: BATCH   STAGE   ATTEMPT   AGE   REASON   MESSAGE
10              fetch   2         30s   Error    exit code 1"""
    )


def test_bars_and_colour_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal:
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    fancy: Any = Terminal()
    assert (Output(fancy).bar(0.5), Output(fancy).phase("Failed")) == (
        f"[{'#' * 12}{'-' * 12}] ",
        "\x1b[31mFailed\x1b[0m",
    )
    assert (Output().bar(0.5), Output().phase("Failed")) == ("", "Failed")
    monkeypatch.setenv("NO_COLOR", "")
    assert Output(fancy).bar(0.5) == ""


@pytest.mark.parametrize(
    ("batches", "records", "share", "left"),
    [
        ({"partitions": {"values": ["a", "b", "c", "d"]}}, 0, 0.25, 300.0),
        ({"cursor": {}, "limit": 4000}, 1000, 0.25, 300.0),
        ({"cursor": {}}, 1000, None, None),
    ],
    ids=["partitions", "limit", "no end known"],
)
def test_the_time_that_is_left(batches: Json, records: int, share: float | None, left: float | None) -> None:
    body = run_body(spec={"batches": batches}, status={"startTime": at(100), "batches": {"published": "0"}})
    body["status"]["records"] = {"published": records}
    found = Run(body)
    told = time_left(found, average_pace(found, NOW))
    assert (share_done(found), told.total_seconds() if told else None) == (share, left)


def test_of_a_resumed_run_only_its_own_work_makes_its_speed() -> None:
    body = run_body(
        status={
            "startTime": at(100),
            "batches": {"published": "0-29"},
            "records": {"published": 3000},
            "resumedFrom": {"name": "old", "uid": "uid-old", "originUid": "u"},
        }
    )
    old = run_body("old", "Failed", status={"batches": {"published": "0-19"}, "records": {"published": 2000}})
    assert average_pace(Run(body), NOW) is None, "what it has found done is not known"
    pace = average_pace(Run(body), NOW, Run(old))
    assert pace is not None
    assert (pace.rows, pace.batches) == (10.0, 0.1)
    _, out, _ = call(status, FakeApi(body, old), "flights", "-o", "json")
    assert json.loads(out)["rows_per_second"] == 10.0
    old["metadata"]["uid"] = "another"
    _, out, _ = call(status, FakeApi(body, old), "flights", "-o", "json")
    assert json.loads(out)["rows_per_second"] is None, "another run of that name"


def test_the_speed_of_a_watch_is_that_of_the_last_minute() -> None:
    meter = PaceMeter()
    for ago, published in ((180, 0), (90, 1000), (50, 1100), (10, 1500)):
        body = run_body(status={"records": {"published": published}, "batches": {"published": f"0-{published // 100}"}})
        meter.add(Run(body), Run(run_body(age=ago)).created)
    pace = meter.pace()
    assert pace is not None
    assert pace.rows == 10.0
    assert PaceMeter().pace() is None


def test_a_change_is_one_line() -> None:
    assert change_line(Run(RUNNING), NOW) == f"{at(200)}   Running   batches 10/31 (35%)   rows 5,000"


# ---------------------------------------------------------------------------------------------------------- explain


@pytest.mark.parametrize(
    ("body", "reason", "part"),
    [
        (run_body(phase=None, age=30), "NotSeen for 30s", "whether the operator runs"),
        (run_body(spec={"cancel": True}), "CancelPending", "whether the operator runs"),
        (
            run_body(status={"conditions": [NO_ROOM]}),
            "QuotaExceeded for 90s",
            "raise the quota",
        ),
        (
            run_body(phase="Suspended", status={"conditions": [condition("Suspended", "True", "Suspended", ago=90)]}),
            "Suspended for 90s",
            "kubectl ingestrun unsuspend",
        ),
        (
            run_body(
                phase="Pending", status={"conditions": [condition("Reconciling", "True", "WaitingForEnd", "run a")]}
            ),
            "WaitingForEnd",
            "why:   run a",
        ),
        (RUNNING, "Retrying", "batch 11, publish: Error"),
        (
            run_body(
                spec={"batches": {"cursor": {}}, "parallelism": 2},
                status={
                    "batches": {"claimed": "0-3", "published": "0-1"},
                    "conditions": [SEEN],
                },
            ),
            "ParallelismReached",
            "2 batches in flight, and spec.parallelism is 2",
        ),
        (
            run_body(spec={"batches": {"cursor": {}}, "parallelism": 2}, status={"batches": {"claimed": "0"}}),
            "WaitingForFetch",
            "1 batch in flight; the next begins with the cursor",
        ),
        (run_body(status={"batches": {"claimed": "0-1", "published": "0"}}), "AllBatchesBegun", "1 batch in flight"),
        (
            run_body(generation=3, status={"observedGeneration": 2, "conditions": [SEEN]}),
            "NotSeen",
            "last change",
        ),
        (FAILED, "BatchFailed for 5m", "kubectl ingestrun resume sales"),
        ({**FAILED, "status": {**FAILED["status"], "resumedBy": {"name": "b"}}}, "BatchFailed", "run b goes on"),
    ],
)
def test_the_reason_why_nothing_is_started(body: Json, reason: str, part: str) -> None:
    body = {**body, "status": {"observedGeneration": 1, **body["status"]}}
    _, out, _ = call(explain, FakeApi(body), body["metadata"]["name"])
    assert out.splitlines()[0].partition(": ")[2].startswith(reason)
    assert part in out


def test_an_explanation_as_data() -> None:
    _, out, _ = call(explain, FakeApi(FAILED), "sales", "-o", "json")
    assert json.loads(out) == {
        "run": "sales",
        "namespace": "geo",
        "phase": "Failed",
        "reason": "BatchFailed",
        "message": "batch 3 failed",
        "since": at(300),
        "hint": "kubectl ingestrun resume sales",
    }


# --------------------------------------------------------------------------------------------- suspending, resuming


def test_suspend_and_unsuspend_go_on_after_a_refusal() -> None:
    api = FakeApi(RUNNING, CANCELLED)
    code, out, err = call(suspend, api, "geo", "flights")
    assert (code, out) == (ExitCode.CONFLICT, "ingestrun.ingestrun.dev/flights suspended\n")
    assert err == 'error: run "geo" is already Cancelled\n'
    assert api.bodies["flights"]["spec"]["suspend"] is True
    assert call(unsuspend, api, "--all", "--dry-run")[1].endswith("flights unsuspended (server dry run)\n")
    assert call(unsuspend, api, "--all")[1].endswith("flights unsuspended\n")
    assert "suspend" not in api.bodies["flights"]["spec"]
    assert call(suspend, api, "--all", "--dry-run=client")[1].endswith("flights suspended (dry run)\n")
    assert "suspend" not in api.bodies["flights"]["spec"]
    assert call(suspend, FakeApi(CANCELLED), "--all")[2] == "No active runs found in geo namespace.\n"


def test_a_resuming_run_is_the_ended_one_without_its_own_life() -> None:
    spec = {
        "cancel": True,
        "cancellation": {"reason": "r"},
        "suspend": True,
        "parentRef": {"name": "p"},
        "resumeFrom": {"name": "older"},
        "fetch": {"image": "a"},
        "batches": {"cursor": {}, "limit": 10},
    }
    labels = {"team": "geo", "ingestrun.dev/cancelled": "true"}
    body = run_body("geo-2", "Cancelled", spec=spec, labels=labels)
    api = FakeApi(body, run_body("geo-3", "Failed"))
    code, out, _ = call(resume, api, "geo-2", "--limit", "20", "--parallelism", "3")
    assert (code, out) == (ExitCode.OK, "ingestrun.ingestrun.dev/geo-4 created, resumes geo-2\n")
    assert api.created == [
        {
            "apiVersion": "ingestrun.dev/v1alpha1",
            "kind": "IngestRun",
            "metadata": {"name": "geo-4", "namespace": "geo", "labels": {"team": "geo"}},
            "spec": {
                "resumeFrom": {"name": "geo-2"},
                "fetch": {"image": "a"},
                "batches": {"cursor": {}, "limit": 20},
                "parallelism": 3,
            },
        }
    ]


def test_a_dry_run_of_a_resume_is_a_manifest() -> None:
    api = FakeApi(CANCELLED)
    _, out, _ = call(resume, api, "geo", "--name", "rest", "--dry-run=client", "-o", "yaml")
    assert yaml.safe_load(out)["metadata"]["name"] == "rest"
    assert api.created == []


@pytest.mark.parametrize(
    ("body", "command", "text"),
    [
        (run_body("geo"), resume, "has not ended (Running)"),
        (ended("geo", "Failed", 1, resumedBy={"name": "b", "uid": "u"}), resume, 'already resumed by run "b"'),
        (ended("geo", "Succeeded", 1), resume, "nothing of it is left"),
        (ended("geo", "Cancelled", 1), retry, "has no failed batches"),
    ],
)
def test_a_run_that_cannot_be_resumed(body: Json, command: Any, text: str) -> None:
    words = ["--failed"] if command is retry else []
    with pytest.raises(ConflictError) as refused:
        call(command, FakeApi(body), "geo", *words)
    assert text in str(refused.value)


def test_failed_batches_are_retried_also_of_a_run_that_has_succeeded() -> None:
    api = FakeApi(ended("geo", "Succeeded", 1, batches={"failed": "3"}))
    assert call(retry, api, "geo", "--failed")[1] == "ingestrun.ingestrun.dev/geo-2 created, resumes geo\n"
    with pytest.raises(UsageError, match="--failed"):
        call(retry, api, "geo")


def test_a_run_that_ended_at_its_limit_can_go_on_with_a_larger_one() -> None:
    body = ended("geo", "Succeeded", 1)
    body["spec"]["batches"] = {"cursor": {}, "limit": 10}
    assert call(resume, FakeApi(body), "geo", "--limit", "20")[0] is ExitCode.OK


@pytest.mark.parametrize(
    ("name", "taken", "expected"),
    [
        ("flights", (), "flights-2"),
        ("flights-2", ("flights-3",), "flights-4"),
        ("geo-2026-11", (), "geo-2026-12"),
        ("a" * 253, (), "a" * 251 + "-2"),
    ],
)
def test_the_next_name(name: str, taken: tuple[str, ...], expected: str) -> None:
    assert next_name(name, taken) == expected


# ----------------------------------------------------------------------------------------------------- run, complete


def test_a_run_from_flags() -> None:
    api = FakeApi()
    words = [
        "geo",
        "--http",
        "https://example.org/x",
        "--records",
        "data.items",
        "--pagination",
        "cursor=next",
        "--to",
        "geo",
        "--claim",
        "c",
    ]
    words += [
        "--partitions",
        "a,b",
        "--size",
        "100",
        "--limit",
        "5",
        "--parallelism",
        "2",
        "--suspend",
        "--parent",
        "p",
        "--label",
        "team=geo",
    ]
    code, out, _ = call(run, api, *words)
    assert (code, out) == (ExitCode.OK, "ingestrun.ingestrun.dev/geo created\n")
    [body] = api.created
    assert body["metadata"] == {"name": "geo", "namespace": "geo", "labels": {"team": "geo"}}
    assert body["spec"] == {
        "source": {
            "http": {
                "url": "https://example.org/x",
                "records": "data.items",
                "pagination": {"cursor": {"path": "next"}},
            }
        },
        "sink": {"parquet": {"path": "geo"}},
        "workspace": {"persistentVolumeClaim": {"claimName": "c"}},
        "batches": {"partitions": {"values": ["a", "b"]}, "size": 100, "limit": 5},
        "parallelism": 2,
        "suspend": True,
        "parentRef": {"name": "p"},
    }


@pytest.mark.parametrize(
    "words",
    [
        "",
        "geo",
        "geo --http http://a --files b --to t --claim c",
        "geo --http http://a --to t",
        "geo --http http://a --to t --claim c --pagination cursor",
        "geo --http http://a --to t --claim c --pagination page=x",
        "geo --files a --to t --claim c --label team",
        "geo -f run.yaml",
        "geo --files a --to t --claim c --dry-run --watch",
    ],
)
def test_flags_that_make_no_run(words: str) -> None:
    with pytest.raises(UsageError):
        call(run, FakeApi(), *words.split())


def test_runs_from_a_file_go_on_after_one_that_is_refused(tmp_path: Any) -> None:
    path = tmp_path / "runs.yaml"
    names = (("a", "other"), ("b", "geo"))
    bodies = [{"kind": "IngestRun", "metadata": {"name": name, "namespace": space}} for name, space in names]
    path.write_text(yaml.safe_dump_all(bodies))
    api = FakeApi()
    code, out, err = call(run, api, "-f", str(path), "-n", "geo")
    assert (code, out) == (ExitCode.USAGE, "ingestrun.ingestrun.dev/b created\n")
    assert "You must pass '--namespace=other'" in err


def test_completions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def names(before: Any, wanted: Any) -> list[str]:
        asked.append(before)
        return [body["metadata"]["name"] for body in (RUNNING, CANCELLED, FAILED) if wanted(Run(body))]

    monkeypatch.setattr(completion, "_names", names)
    complete = completion.completions
    assert [line.partition("\t")[0] for line in complete(["ca"])] == ["cancel", ":4"]
    assert complete(["cancel", ""]) == ["flights", ":4"]
    assert complete(["resume", "s"]) == ["sales", ":4"]
    assert complete(["cancel", "-o", ""]) == ["json", "yaml", "name", ":4"]
    assert complete(["cancel", "--wait=d"]) == ["--wait=drained", ":4"]
    assert [line.partition("\t")[0] for line in complete(["cancel", "--re"])] == ["--reason", "--request-timeout", ":4"]
    assert complete(["list", "--phase", "S"]) == ["Suspended", "Succeeded", ":4"]
    assert complete(["run", "-f", ""]) == [":0"]
    assert complete(["cancel", "--reason", ""]) == [":4"]
    assert complete(["nonsense", ""]) == [":4"]
    assert asked == [["cancel"], ["resume"]]


def test_completed_names_are_those_that_make_sense_and_are_not_there_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    api = FakeApi(RUNNING, run_body("flights-2"), CANCELLED)
    given: list[Any] = []

    def connect(session: Session) -> FakeApi:
        given.append((session.options.namespace, session.options.context))
        return api

    monkeypatch.setattr(Session, "api", property(connect))
    words = ["cancel", "--namespace=geo", "flights-2", "--context", "kind", "f"]
    assert completion.completions(words) == ["flights", ":4"]
    assert completion.completions(["resume", ""]) == ["geo", ":4"]
    assert given[0] == ("geo", "kind")
