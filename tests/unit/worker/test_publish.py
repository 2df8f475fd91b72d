"""The sink `parquet`: one file a batch, whole or not at all, however often and wherever an attempt dies."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ingestrun.worker import publish as module
from ingestrun.worker import stage_io
from ingestrun.worker.shutdown import Stop, Stopped

from .support import UID, Bench

SINK = {"parquet": {"path": "data/flights"}}
ROWS = pa.table({"id": [1, 2, 3], "name": ["a", "b", None]})


def published(bench: Bench) -> list[str]:
    directory = bench.workspace / "data/flights"
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())


def test_publish(bench: Bench) -> None:
    bench.hand_on(ROWS, batch=12)
    answer = bench.run("publish", SINK, batch=12)
    assert answer.result is not None
    assert (answer.code, answer.result.read, answer.result.written) == (0, 3, 3)
    assert answer.result.manifest == f"data/flights/{UID}-000012.parquet"
    assert published(bench) == [f"{UID}-000012.parquet"]
    table = pq.read_table(bench.workspace / answer.result.manifest)
    assert table.equals(ROWS)
    assert table.schema.metadata is None or b"ingestrun.key" not in table.column_names
    stamps = pq.read_metadata(bench.workspace / answer.result.manifest).metadata
    assert (stamps[b"ingestrun.key"], stamps[b"ingestrun.rows"]) == (f"{UID}/12".encode(), b"3")


def test_publishing_again_leaves_one_result(bench: Bench) -> None:
    bench.hand_on(ROWS)
    first = bench.run("publish", SINK)
    assert first.result is not None
    file = bench.workspace / str(first.result.manifest)
    before = file.stat()
    again = bench.run("publish", SINK, attempt=1)
    assert again == first
    assert (file.stat().st_ino, file.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_run_that_resumes_finds_what_had_landed_without_anybodys_knowing(bench: Bench) -> None:
    """The key has the first run's UID, and the file's name comes of the key, not of the run."""
    bench.hand_on(ROWS)
    assert bench.run("publish", SINK).code == 0
    again = bench.run("publish", SINK, run_uid="another-run", idempotency_key=f"{UID}/0")
    assert again.code == 0
    assert published(bench) == [f"{UID}-000000.parquet"]


def test_other_rows_under_the_same_key(bench: Bench) -> None:
    bench.hand_on(ROWS)
    assert bench.run("publish", SINK).code == 0
    bench.hand_on(ROWS.slice(1), batch=1)
    for more in ({"input": bench.dir("fetch", 1)}, {"input": bench.dir("fetch", 1), "idempotency_key": f"{UID}/0"}):
        env_rows = bench.run("publish", SINK, attempt=1, **more)
        assert env_rows.code == 65
        assert "3 rows" in env_rows.message
    assert pq.read_metadata(bench.workspace / f"data/flights/{UID}-000000.parquet").num_rows == 3


@pytest.mark.parametrize(
    "step", ["_write", "_audit", "link", "sync_directory", "_verify_published", "_remove_temporary_files"]
)
def test_an_attempt_that_dies_at_any_step(bench: Bench, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt  # nothing of ours catches it, so it is as good as a kill where it is raised

    bench.hand_on(ROWS)
    with monkeypatch.context() as patch:
        patch.setattr({"link": os, "sync_directory": stage_io}.get(step, module), step, die)
        with pytest.raises(KeyboardInterrupt):
            bench.run("publish", SINK)
    left = [name for name in published(bench) if not name.startswith("_tmp/")]
    assert len(left) == (step in ("sync_directory", "_verify_published", "_remove_temporary_files"))
    answer = bench.run("publish", SINK, attempt=1)
    assert answer.code == 0
    assert published(bench) == [f"{UID}-000000.parquet"]


def test_what_a_killed_attempt_left_is_removed(bench: Bench) -> None:
    left = bench.workspace / "data/flights/_tmp" / f"{UID}-000000" / "half"
    other = bench.workspace / "data/flights/_tmp" / f"{UID}-000001" / "busy"
    for path in (left, other):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"PAR1")
    bench.hand_on(ROWS)
    assert bench.run("publish", SINK).code == 0
    assert (left.exists(), other.exists()) == (False, True)


def test_two_attempts_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one commits while this one is at its audit."""
    bench.hand_on(ROWS)
    real = module._audit
    calls: list[Path] = []

    def audit(path: Path, rows: int, key: str) -> None:
        calls.append(path)
        if len(calls) == 1:
            assert bench.run("publish", SINK, attempt=1).code == 0
        real(path, rows, key)

    monkeypatch.setattr(module, "_audit", audit)
    answer = bench.run("publish", SINK)
    assert answer.code == 1
    assert "nothing was published" in answer.message
    assert published(bench) == [f"{UID}-000000.parquet"]
    assert bench.run("publish", SINK, attempt=2).code == 0


def test_a_name_taken_at_the_last_moment(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hand_on(ROWS)
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    assert bench.run("publish", SINK).code == 0
    assert published(bench) == [f"{UID}-000000.parquet"]


def test_a_file_system_without_hard_links(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    bench.hand_on(ROWS)
    assert bench.run("publish", SINK).code == 0
    assert published(bench) == [f"{UID}-000000.parquet"]


def test_an_audit_that_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._write

    def torn(source: Any, path: Path, key: str, stop: Stop) -> None:
        real(source, path, key, stop)
        os.truncate(path, path.stat().st_size - 5)

    bench.hand_on(ROWS)
    with monkeypatch.context() as patch:
        patch.setattr(module, "_write", torn)
        answer = bench.run("publish", SINK)
    assert answer.code == 1
    assert "audit" in answer.message
    assert published(bench) == []


def test_sigterm_before_and_after_the_point_of_no_return(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.hand_on(ROWS)
    real = module._audit
    stop = Stop()

    def audit(path: Path, rows: int, key: str) -> None:
        real(path, rows, key)
        with pytest.raises(Stopped):
            stop._on_signal(15, None)

    with monkeypatch.context() as patch:
        patch.setattr(module, "_audit", audit)
        answer = bench.run("publish", SINK, stop)
    assert (answer.code, answer.message) == (143, "stopped by SIGTERM, nothing published")
    assert published(bench) == []
    late, link = Stop(), os.link

    def signalled(source: Path, target: Path) -> None:
        late._on_signal(15, None)
        link(source, target)

    monkeypatch.setattr(os, "link", signalled)
    answer = bench.run("publish", SINK, late, attempt=1)
    assert answer.result is not None
    assert (answer.code, answer.result.outcome) == (0, "done")
    assert published(bench) == [f"{UID}-000000.parquet"]


@pytest.mark.parametrize("path", ["/data", "../data", "a/../../b", "s3://b/c", "_tmp", "a/.b", ".", "x" * 250])
def test_paths_that_lead_out(bench: Bench, path: str) -> None:
    bench.hand_on(ROWS)
    assert bench.run("publish", {"parquet": {"path": path}}).code == 65


def test_a_link_that_leads_out(bench: Bench) -> None:
    bench.hand_on(ROWS)
    (bench.workspace / "data").symlink_to("/tmp")
    answer = bench.run("publish", SINK)
    assert (answer.code, "out of the workspace" in answer.message) == (65, True)


@pytest.mark.parametrize("key", ["", "uid", "a/b", "../x/1", "a/1/2"])
def test_keys_of_another_form(bench: Bench, key: str) -> None:
    bench.hand_on(ROWS)
    assert bench.run("publish", SINK, idempotency_key=key).code == 65


def test_a_batch_without_rows_publishes_no_file(bench: Bench) -> None:
    bench.hand_on(pa.table({}))
    answer = bench.run("publish", SINK)
    assert answer.result is not None
    assert (answer.code, answer.result.written, answer.result.manifest) == (0, 0, None)
    assert not (bench.workspace / "data").exists()


def test_batches_of_one_dataset_are_read_together(bench: Bench) -> None:
    tables = [
        pa.table({"id": [1], "v": pa.nulls(1), "w": [1]}),
        pa.table({"id": [2], "v": ["x"], "w": [2.5]}),
        pa.table({"id": [3], "late": [True], "w": ["text"]}),
    ]
    for batch, table in enumerate(tables):
        bench.hand_on(table, batch=batch)
        assert bench.run("publish", SINK, batch=batch).code == 0
    glob = bench.workspace / "data/flights/*.parquet"
    query = f"select id, v, late, w from read_parquet('{glob}', union_by_name=true) order by id"
    assert duckdb.connect().execute(query).fetchall() == [
        (1, None, None, "1"), (2, "x", None, "2.5"), (3, None, True, "text"),
    ]  # fmt: skip
