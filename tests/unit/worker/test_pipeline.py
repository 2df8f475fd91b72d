"""The links in one process come to the same as the stages in three: the same rows, types, quarantine and counts."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestrun.model.contract import StageResult
from ingestrun.worker import collector, pipeline
from ingestrun.worker.context import Context, read_context
from ingestrun.worker.errors import PermanentError, RetryableError, WorkerError
from ingestrun.worker.pipeline import BatchResult, run_batch
from ingestrun.worker.shutdown import Cancelled, Stop

from .support import UID, Bench, Request, Site, page

SINK = {"parquet": {"path": "data"}}
FILE = f"data/{UID}-000000.parquet"
TYPED = {"name": "id", "type": "integer", "required": True}


class Course:
    """What the pipeline tells, kept; the permission is always given, unless the test says otherwise."""

    def __init__(self, permission: Callable[[], None] = lambda: None) -> None:
        self.stage = 0
        self.entered: list[int] = []
        self.result: StageResult | None = None
        self.asked: tuple[int, int] | None = None
        self._permission = permission

    def enter(self, stage: int) -> int:
        if stage not in self.entered:
            self.entered.append(stage)
        before, self.stage = self.stage, stage
        return before

    def fetched(self, result: StageResult) -> None:
        self.result = result

    def await_permission(self, written: int, rejected: int) -> None:
        self.asked = (written, rejected)
        self._permission()


def contexts(bench: Bench, configs: list[Any], **more: Any) -> list[Context]:
    kinds = ["fetch", *["hook"] * (len(configs) - 2), "publish"]
    made = []
    for index, (kind, config) in enumerate(zip(kinds, configs, strict=True)):
        env = bench.env(kind, config, **more)
        env["INGEST_REJECTS"] = str(bench.workspace / f"rejects-{index}")
        made.append(read_context(env))
    return made


def in_one(bench: Bench, configs: list[Any], course: Course | None = None, **more: Any) -> BatchResult:
    return run_batch(contexts(bench, configs, **more), Stop(), course or Course())


def one_by_one(bench: Bench, configs: list[Any], **more: Any) -> tuple[list[StageResult], str]:
    """The results of the stages, and the message of the one that failed."""
    results: list[StageResult] = []
    before = bench.dir("fetch")
    for index, config in enumerate(configs):
        if index == 0:
            answer = bench.run("fetch", config, **more)
        elif index < len(configs) - 1:
            output = bench.workspace / f"hook-{index}"
            rejects = bench.workspace / f"rejects-{index}"
            answer = bench.run("hook", config, input=before, output=output, rejects=rejects)
            before = output
        else:
            answer = bench.run("publish", config, input=before)
        assert answer.result is not None
        if answer.code:
            return results, answer.message
        results.append(answer.result)
    return results, ""


def dataset(bench: Bench) -> tuple[Any, ...]:
    """What readers see: the batch and its footer, and each hook's quarantine."""
    path = bench.workspace / FILE
    table = pq.read_table(path) if path.exists() else None
    footer = pq.read_metadata(path).metadata if path.exists() else {}
    said = {name: text for name, text in footer.items() if name.startswith(b"ingestrun.")}
    rejects = {found.name: pq.read_table(found / "data.parquet") for found in sorted(bench.workspace.glob("rejects-*"))}
    return table, said, rejects


def files(bench: Bench) -> list[str]:
    return sorted(str(path.relative_to(bench.workspace)) for path in bench.workspace.rglob("*") if path.is_file())


@pytest.fixture
def benches(tmp_path: Path) -> Callable[[], Bench]:
    count = iter(range(10_000))

    def make() -> Bench:
        workspace = tmp_path / str(next(count)) / "workspace"
        workspace.mkdir(parents=True)
        return Bench(workspace)

    return make


VALUES = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(max_size=3)
RECORDS = st.fixed_dictionaries({}, optional={"id": VALUES, "v": VALUES, "w": st.lists(st.integers(), max_size=2)})
RULES = st.lists(
    st.fixed_dictionaries(
        {"name": st.sampled_from(["id", "v", "new"])},
        optional={"type": st.sampled_from(["integer", "number", "string", "boolean"]), "required": st.booleans()},
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda rule: rule["name"],
)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of two rows, of which a handful fits into memory."""
    monkeypatch.setattr("ingestrun.worker.stage_io.ROW_GROUP_ROWS", 2)
    monkeypatch.setattr(pipeline, "MEMORY_BYTES", 100)


@pytest.mark.usefixtures("small")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pages=st.lists(st.lists(RECORDS, min_size=1, max_size=3), max_size=5), rules=st.lists(RULES, max_size=2))
def test_one_process_and_three_come_to_the_same(
    benches: Callable[[], Bench], site: Site, pages: list[list[dict[str, Any]]], rules: list[list[dict[str, Any]]]
) -> None:
    def answer(request: Request) -> Any:
        number = int(request.params["page"]) - 1
        return page(pages[number] if number < len(pages) else [])

    site.answer = answer
    source = {"http": {"url": site.url, "pageSize": 3, "pagination": {"page": {}}, "allowRepeatedPages": True}}
    configs = [source, *[{"validate": {"columns": columns}} for columns in rules], SINK]
    apart, together = benches(), benches()
    results, failure = one_by_one(apart, configs)
    course = Course()
    if failure:
        with pytest.raises(WorkerError) as caught:
            in_one(together, configs, course)
        assert str(caught.value) == failure
        assert course.stage == len(results)
        assert not (together.workspace / FILE).exists()
        return
    result = in_one(together, configs, course)
    assert dataset(together) == dataset(apart)
    assert course.result == results[0]
    assert course.entered == list(range(len(configs)))
    rejected = sum(stage.rejected for stage in results)
    assert course.asked == (result.written, result.rejected) == (results[-1].written, rejected)
    assert result.manifest == results[-1].manifest


@pytest.fixture
def mixed(bench: Bench) -> list[Any]:
    """A file whose column changes its type with every chunk, a hook that rejects some of it, and a sink."""
    values: list[Any] = [1, 2, None, 2.5, 2**60, "x", True, None, {"a": 1}, 0]
    (bench.workspace / "in.jsonl").write_text(
        "".join(json.dumps({"id": n, "v": v}) + "\n" for n, v in enumerate(values))
    )
    hook = {"validate": {"columns": [{"name": "id", "type": "integer", "minimum": 2}]}}
    return [{"files": {"path": "in.jsonl"}}, hook, SINK]


@pytest.mark.parametrize("memory", [1, 40, 10**9])
def test_rows_that_do_not_fit_into_memory(
    bench: Bench, mixed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, memory: int
) -> None:
    monkeypatch.setattr("ingestrun.worker.stage_io.ROW_GROUP_ROWS", 2)
    monkeypatch.setattr("ingestrun.worker.file_formats._CHUNK_ROWS", 2)
    monkeypatch.setattr(pipeline, "MEMORY_BYTES", memory)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "a read-only root"))
    spilled = bench.workspace / ".ingestrun"
    seen: list[int] = []
    course = Course(lambda: seen.append(len(list(spilled.rglob("_part-*")))))
    result = in_one(bench, mixed, course)
    assert (result.written, result.rejected) == (8, 2)
    assert pq.read_table(bench.workspace / FILE)["v"].to_pylist() == [
        None, "2.5", str(2**60), "x", "true", None, '{"a":1}', "0",
    ]  # fmt: skip
    assert (seen[0] > 0) == (memory < 10**9)
    assert list(spilled.rglob("rows-*")) == [], "nothing is left when the batch is done"


def test_a_temporary_directory_that_can_not_be_written(
    bench: Bench, mixed: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pipeline, "MEMORY_BYTES", 1)
    with monkeypatch.context() as patch:
        patch.setattr("ingestrun.worker.stage_io.ParquetFileWriter.write", full)
        with pytest.raises(RetryableError, match=r"the temporary directory can't take the rest \(ENOSPC\)"):
            in_one(bench, mixed)
    assert in_one(bench, mixed).written == 8


def test_nothing_is_seen_before_the_permission(bench: Bench, mixed: list[Any]) -> None:
    seen: list[list[str]] = []
    in_one(bench, mixed, Course(lambda: seen.append(files(bench))))
    (before,) = seen
    hidden = [name for name in before if name.startswith((".", "data/_tmp/"))]
    assert set(before) - set(hidden) == {"in.jsonl"}
    assert len(hidden) == 3, "the list of the files, the quarantine, and the file of the dataset"
    assert [name for name in files(bench) if not name.startswith(".")] == [FILE, "in.jsonl", "rejects-1/data.parquet"]


@pytest.mark.parametrize("error", [Cancelled("the run is cancelled", 0), KeyboardInterrupt(), RetryableError("x")])
def test_without_permission_nothing_is_left(bench: Bench, mixed: list[Any], error: BaseException) -> None:
    def refuse() -> None:
        raise error

    with pytest.raises(type(error)):
        in_one(bench, mixed, Course(refuse))
    assert [name for name in files(bench) if not name.startswith(".ingestrun")] == ["in.jsonl"]


@pytest.mark.parametrize("step", ["link", "rename", "fsync"])
def test_an_attempt_that_dies_at_a_step_of_its_commit(
    bench: Bench, mixed: list[Any], monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """The next attempt, with a quarantine of its own, comes to the same."""
    calls: Iterator[int] = iter(range(1000))

    def die(*_: object, **__: object) -> None:
        next(calls)
        raise KeyboardInterrupt

    def arm() -> None:
        if step == "rename":
            monkeypatch.setattr(Path, "rename", die)
        else:
            monkeypatch.setattr(os, step, die)

    with pytest.raises(KeyboardInterrupt):
        in_one(bench, mixed, Course(arm))
    assert next(calls) > 0
    monkeypatch.undo()
    # No batch is ever seen without its quarantine.
    assert (bench.workspace / "rejects-1").exists() or not (bench.workspace / FILE).exists()
    assert (bench.workspace / "rejects-1").exists() == (step == "link")
    with suppress(FileNotFoundError):
        (bench.workspace / "rejects-1").rename(bench.workspace / "of-the-first-attempt")
    result = in_one(bench, mixed, attempt=1)
    assert (result.written, result.rejected) == (8, 2)
    table, _, rejects = dataset(bench)
    assert (table.num_rows, rejects["rejects-1"].num_rows) == (8, 2)


def test_a_batch_that_an_earlier_attempt_has_published_is_told(bench: Bench, mixed: list[Any]) -> None:
    """Also if the run is cancelled meanwhile, because it is true; and the file stays as it is."""
    first = in_one(bench, mixed)
    inode = (bench.workspace / FILE).stat().st_ino

    def cancelled() -> None:
        raise Cancelled("the run is cancelled", 0)

    assert in_one(bench, mixed, Course(cancelled), attempt=1) == first
    assert (bench.workspace / FILE).stat().st_ino == inode


def test_other_rows_than_are_published(bench: Bench, mixed: list[Any]) -> None:
    in_one(bench, mixed)
    looser = {"validate": {"columns": [{"name": "id", "type": "integer"}]}}
    with pytest.raises(PermanentError, match="stands published with 8 rows"):
        in_one(bench, [mixed[0], looser, mixed[2]], attempt=1)


def test_a_batch_of_which_every_row_is_rejected(bench: Bench, mixed: list[Any]) -> None:
    none = {"validate": {"columns": [{"name": "id", "maximum": -1}]}}
    course = Course()
    result = in_one(bench, [mixed[0], none, mixed[2]], course)
    assert (result.written, result.rejected, result.manifest, course.asked) == (0, 10, None, (0, 10))
    assert [name for name in files(bench) if not name.startswith(".")] == ["in.jsonl", "rejects-1/data.parquet"]


def test_a_column_that_the_second_hook_misses(bench: Bench, mixed: list[Any]) -> None:
    """It is known only when the first row comes, because the first hook may hand on none."""
    missing = {"validate": {"columns": [{"name": "z", "required": True}]}}
    course = Course()
    with pytest.raises(PermanentError, match="the required column 'z' is not in the data"):
        in_one(bench, [mixed[0], mixed[1], missing, mixed[2]], course)
    assert course.stage == 2
    none = {"validate": {"columns": [{"name": "id", "maximum": -1}]}}
    assert in_one(bench, [mixed[0], none, missing, mixed[2]]).rejected == 10


def test_too_many_rejected_rows_keep_that_quarantine_alone(bench: Bench, mixed: list[Any]) -> None:
    strict = {"validate": {"columns": [{"name": "id", "maximum": 5}], "maxRejected": 3}}
    with pytest.raises(PermanentError, match="4 of 8 rows broke the rules") as caught:
        in_one(bench, [mixed[0], mixed[1], strict, mixed[2]])
    assert (caught.value.read, caught.value.rejected) == (8, 4)
    assert [name for name in files(bench) if not name.startswith(".")] == ["in.jsonl", "rejects-2/data.parquet"]


def test_tables_are_bounded(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk in memory is handed on in slices, as a row group of a file would be."""
    monkeypatch.setattr("ingestrun.worker.stage_io.ROW_GROUP_ROWS", 4)
    rows = collector.RowCollector(lambda: bench.workspace, Stop(), memory_bytes=10**6)
    rows.add(pa.table({"id": list(range(11))}))
    rows.finish()
    assert [table.num_rows for table in rows.tables()] == [4, 4, 3]
    assert list(bench.workspace.iterdir()) == []
