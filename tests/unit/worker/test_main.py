"""The whole process: environment in, result and exit code out; SIGTERM and a full disk."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ingestrun.model.contract import parse_result
from ingestrun.worker.shutdown import Stop, Stopped

from .support import Bench, Reply, Request, Site, page

SOURCE = Path(__file__).parents[3] / "operator"
ROWS = pa.table({"id": list(range(1000))})


def spawn(env: dict[str, str], *command: str) -> subprocess.Popen[str]:
    """The worker as a process, or another program of Python."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.Popen(
        [sys.executable, *(command or ("-m", "ingestrun.worker"))],
        env=kept | {"PYTHONPATH": str(SOURCE)} | env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def http(site: Site) -> dict[str, Any]:
    return {"http": {"url": site.url, "pageSize": 10, "pagination": {"page": {}}}}


def test_a_batch_from_source_to_dataset(bench: Bench, site: Site) -> None:
    """As the pods do it: three processes, each with nothing but its environment and the volume."""
    pages = [[{"id": "1"}, {"id": "x"}], []]
    site.answer = lambda request: page(pages[int(request.params["page"]) - 1])
    hook = {"validate": {"columns": [{"name": "id", "type": "integer"}]}}
    stages: list[tuple[str, Any, dict[str, Any]]] = [
        ("fetch", http(site), {}),
        ("hook", hook, {}),
        ("publish", {"parquet": {"path": "data"}}, {"input": bench.dir("hook")}),
    ]
    counts = []
    for stage, config, more in stages:
        process = spawn(bench.env(stage, config, **more))
        output, _ = process.communicate()
        assert process.returncode == 0, output
        result = parse_result(bench.termination.read_text())
        counts.append((result.read, result.written, result.rejected))
        last = json.loads(output.splitlines()[-1])
        assert (last["event"], last["stage"], last["batch"], last["outcome"]) == ("stage ended", stage, "0", "done")
    assert counts == [(2, 2, 0), (2, 1, 1), (1, 1, 0)]


@pytest.mark.parametrize("where", ["page", "retry"])
def test_sigterm_while_fetching(bench: Bench, site: Site, where: str) -> None:
    reached, release = threading.Event(), threading.Event()

    def answer(request: Request) -> Reply:
        if request.params["page"] == "1":
            return page([{"id": index} for index in range(10)])
        reached.set()
        if where == "retry":
            return Reply(503, b"", {"retry-after": "55"})
        release.wait(30)
        return page([])

    site.answer = answer
    process = spawn(bench.env("fetch", http(site)))
    assert reached.wait(30)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=20)
    release.set()
    assert process.returncode == 143, output
    result = parse_result(bench.termination.read_text())
    assert (result.outcome, result.message) == ("failed", "stopped by SIGTERM, nothing published")
    assert list(bench.dir("fetch").parent.iterdir()) == []


def test_sigterm_is_heard_at_the_next_step_if_the_exception_was_swallowed() -> None:
    stop = Stop()
    with pytest.raises(Stopped):
        stop._on_signal(signal.SIGTERM, None)
    stop._on_signal(signal.SIGTERM, None)
    with pytest.raises(Stopped):
        stop.raise_if_stopped()
    with pytest.raises(Stopped):
        stop.commit_point()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"INGEST_CONTRACT": "v2"}, "this worker speaks v1"),
        ({"INGEST_STAGE": "transform"}, "not one of fetch, hook, publish"),
        ({"INGEST_BATCH": ""}, "INGEST_BATCH is not set"),
        ({"INGEST_BATCH": "-1"}, "INGEST_BATCH is '-1', not a number"),
        ({"INGEST_LIMIT": "0"}, "at least 1"),
        ({"INGEST_OUTPUT": ""}, "INGEST_OUTPUT is not set, stage fetch needs it"),
        ({"INGEST_OUTPUT": "s3://bucket/x"}, "needs a volume"),
        ({"INGEST_CONFIG": ""}, "INGEST_CONFIG is not set"),
        ({"INGEST_CONFIG": "{}"}, "exactly one of files, http"),
        ({"INGEST_CONFIG": '{"http": {"url": "ftp://hunter2"}}'}, "the source is not valid: http.url"),
    ],
)
def test_an_environment_that_makes_no_sense(bench: Bench, site: Site, change: dict[str, str], text: str) -> None:
    from ingestrun.worker.main import run

    code = run(bench.env("fetch", http(site)) | change, Stop())
    result = parse_result(bench.termination.read_text())
    assert code == 65
    assert text in (result.message or "")
    assert "hunter2" not in (result.message or "")


def test_an_unforeseen_error_is_retried_and_its_text_kept_back(
    bench: Bench, site: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("token=hunter2")

    monkeypatch.setattr("ingestrun.worker.http_source.table_from_records", broken)
    site.answer = lambda _request: page([{}])
    answer = bench.run("fetch", http(site))
    assert (answer.code, answer.message) == (1, "unexpected RuntimeError: the pod's log has the traceback")
    assert "hunter2" in capsys.readouterr().err


# --- a full disk


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Bench]:
    """A workspace of 64 KiB."""
    volume = tmp_path / "workspace"
    volume.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", volume], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no tmpfs can be mounted here")
    yield Bench(volume)
    subprocess.run(["umount", volume], check=True)


def test_a_full_volume(tiny: Bench, site: Site) -> None:
    noise = [[{"id": os.urandom(4096).hex()} for _ in range(20)] for _ in range(2)]
    site.answer = lambda request: page(noise[number - 1] if (number := int(request.params["page"])) < 3 else [])
    answer = tiny.run("fetch", http(site))
    assert answer.code == 1
    assert "no space left on the workspace volume" in answer.message
    assert list(tiny.dir("fetch").parent.iterdir()) == []
    site.answer = lambda _request: page([])
    assert tiny.run("fetch", http(site), attempt=1).code == 0


@pytest.mark.parametrize("stage", ["fetch", "hook", "publish"])
@pytest.mark.parametrize("step", ["write", "fsync"])
def test_a_disk_that_fills_up(bench: Bench, site: Site, monkeypatch: pytest.MonkeyPatch, stage: str, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    site.answer = lambda request: page([{"id": 1}] if request.params["page"] == "1" else [])
    configs = {
        "fetch": http(site),
        "hook": {"validate": {"columns": [{"name": "id", "type": "integer"}]}},
        "publish": {"parquet": {"path": "data"}},
    }
    if stage != "fetch":
        bench.hand_on(ROWS)
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr("ingestrun.worker.stage_io.os.fsync", full)
        else:
            patch.setattr("ingestrun.worker.stage_io.ParquetFileWriter.write", full)
        answer = bench.run(stage, configs[stage])
    assert answer.code == 1
    assert "no space left on the workspace volume: nothing of this batch was handed on" in answer.message
    assert [path for path in bench.workspace.rglob("*") if path.is_file() and path.parent != bench.dir("fetch")] == []
    assert bench.run(stage, configs[stage], attempt=1, input=bench.dir("fetch")).code == 0


# --- handing on


def test_a_pod_that_runs_the_same_attempt_again_replaces_its_output(bench: Bench, site: Site) -> None:
    site.answer = lambda request: page([{"id": len(site.requests)}] if request.params["page"] == "1" else [])
    left = bench.dir("fetch").with_name(".0.tmp-killed")
    left.mkdir(parents=True)
    (left / "data.parquet").write_bytes(b"PAR1")
    for expected in (1, 3):
        assert bench.run("fetch", http(site)).code == 0
        assert bench.rows() == [{"id": expected}]
    assert [path.name for path in bench.dir("fetch").parent.iterdir()] == ["0"]


# --- start-up


@pytest.mark.parametrize("module", ["main", "http_source", "file_source", "validate", "publish"])
def test_what_is_imported(module: str) -> None:
    """Start-up is paid for every Job: nothing is imported that the stage does not need."""
    code = f"import sys, ingestrun.worker.{module}; print(*sorted(sys.modules))"
    run = [sys.executable, "-c", code]
    loaded = set(
        subprocess.run(run, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"pydantic", "pyarrow", "pyarrow.compute", "pyarrow.parquet", "httpx", "fsspec", "numpy", "pandas"}
    allowed = {
        "main": set(),
        "http_source": {"pydantic", "pyarrow", "pyarrow.parquet", "httpx"},
        "file_source": {"pydantic", "pyarrow", "pyarrow.compute", "pyarrow.parquet", "fsspec"},
        "validate": {"pydantic", "pyarrow", "pyarrow.compute", "pyarrow.parquet"},
        "publish": {"pydantic", "pyarrow", "pyarrow.parquet"},
    }
    assert loaded & heavy <= allowed[module]
    ours = {name.split(".")[1] for name in loaded if name.startswith("ingestrun.")}
    assert ours <= {"worker", "model"}
