"""The faults that the e2e tests inject, and that the worker itself knows of none."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from tests.e2e import fault_injection

from ingestrun.model.contract import Outcome, ResultError, parse_result
from ingestrun.worker.shutdown import Stop

from .support import Bench, Site, page
from .test_main import ROWS, http, spawn

SINK = {"parquet": {"path": "data"}}


def run(bench: Bench, stage: str, config: object, fault: str, attempt: int = 0) -> tuple[int, str]:
    """The exit code, and the termination message."""
    bench.termination.unlink(missing_ok=True)
    code = fault_injection.run(bench.env(stage, config, fault=fault, attempt=attempt), Stop())
    return code, bench.termination.read_text() if bench.termination.exists() else ""


@pytest.mark.parametrize(
    ("name", "text", "limited"),
    [
        ("memory.max", "268435456", True),
        ("memory.max", "max", False),
        ("memory/memory.limit_in_bytes", "268435456", True),
        ("memory/memory.limit_in_bytes", "9223372036854771712", False),
        ("cgroup.procs", "1", False),
    ],
)
def test_oom_takes_memory_only_where_there_is_a_limit(tmp_path: Path, name: str, text: str, limited: bool) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    assert fault_injection.memory_is_limited(tmp_path) is limited


@pytest.mark.parametrize(
    ("fault", "attempt", "code"),
    [
        ("exit:3", 0, 3),
        ("exit:1,attempts:2", 1, 1),
        ("exit:1,attempts:2", 2, 0),
        ("exit:1,stage:publish;permanent,batch:0", 0, 65),
        ("exit:1,batch:7", 0, 0),
        ("exit:1,hook:check", 0, 0),
    ],
)
def test_faults(bench: Bench, site: Site, fault: str, attempt: int, code: int) -> None:
    site.answer = lambda _request: page([])
    found, message = run(bench, "fetch", http(site), fault, attempt)
    assert found == code
    assert (message == "") == (code in (1, 3))
    if message:
        assert parse_result(message).outcome == (Outcome.DONE if code == 0 else Outcome.FAILED)


@pytest.mark.parametrize(
    ("fault", "text"), [("explode", "not a fault"), ("exit:1,colour:blue", "not a fault"), ("exit", "lacks a number")]
)
def test_a_malformed_fault_is_a_permanent_failure(bench: Bench, site: Site, fault: str, text: str) -> None:
    code, message = run(bench, "fetch", http(site), fault)
    assert code == 65
    assert text in (parse_result(message).message or "")


def test_a_result_that_is_lost_or_garbage(bench: Bench) -> None:
    bench.hand_on(ROWS)
    code, message = run(bench, "publish", SINK, "garbage")
    assert code == 0
    with pytest.raises(ResultError):
        parse_result(message)
    assert run(bench, "publish", SINK, "missing", attempt=1) == (0, "")
    assert run(bench, "publish", SINK, "exit-after:9", attempt=2) == (9, "")
    answer = bench.run("publish", SINK, attempt=3)
    assert answer.result is not None
    assert answer.result.written == 1000
    assert len(list((bench.workspace / "data").glob("*.parquet"))) == 1


@pytest.mark.parametrize("fault", ["garbage", "missing", "exit-after:9"])
def test_the_result_of_a_stage_that_failed_by_itself_is_kept(bench: Bench, site: Site, fault: str) -> None:
    site.answer = lambda _request: page([1])
    code, message = run(bench, "fetch", http(site), fault)
    assert code == 65
    assert parse_result(message).outcome is Outcome.FAILED


def test_a_hang_ends_with_sigterm_unless_it_is_deaf(bench: Bench, site: Site) -> None:
    for fault, signals, code in [("hang", [signal.SIGTERM], 143), ("hang:deaf", [signal.SIGTERM, signal.SIGKILL], -9)]:
        process = spawn(bench.env("fetch", http(site), fault=fault), fault_injection.__file__)
        assert process.stdout is not None
        assert "fault on purpose" in process.stdout.readline()
        assert process.stdout.readline() == "hanging\n"
        for number in signals:
            process.send_signal(number)
        assert process.wait(20) == code


def test_the_worker_itself_knows_no_faults(bench: Bench, site: Site) -> None:
    """Its image has no faults: the variable does nothing without the program that is mounted."""
    site.answer = lambda _request: page([])
    answer = bench.run("fetch", http(site), fault="exit:3")
    assert answer.code == 0
    assert answer.result is not None
    assert answer.result.outcome is Outcome.DONE
