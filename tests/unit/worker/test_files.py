"""The source `files`: every record once whatever the batch size, and broken files named with their line."""

from __future__ import annotations

import csv
import gzip
import json
import uuid
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ingestrun.model.worker import FilesSource
from ingestrun.worker.context import Context, read_context
from ingestrun.worker.file_source import FilesReader

from .support import Bench

TEXT = st.text(st.sampled_from('ab,"\n\r é\u2028'), max_size=5)


class Memory:
    """In the place of a spool."""

    def __init__(self) -> None:
        self.tables: list[pa.Table] = []
        self.rows = 0

    def add(self, table: pa.Table) -> None:
        self.tables.append(table)
        self.rows += table.num_rows


def files(path: str, **more: Any) -> dict[str, Any]:
    return {"files": {"path": path, **more}}


def context(bench: Bench, cursor: str, uid: str) -> Context:
    return read_context(bench.env("fetch", "{}", cursor=cursor, idempotency_key=f"{uid}/0"))


def read_all(bench: Bench, source: dict[str, Any], limit: int) -> list[dict[str, Any]]:
    """A chain of batches without the Parquet between, for many examples."""
    rows: list[dict[str, Any]] = []
    cursor: str | None = ""
    uid = uuid.uuid4().hex
    while cursor is not None:
        memory = Memory()
        reader = FilesReader(FilesSource.model_validate(source["files"]), context(bench, cursor, uid))
        cursor = reader.read(limit, memory)  # type: ignore[arg-type]
        assert memory.rows == limit or cursor is None
        for table in memory.tables:
            rows += table.to_pylist()
    return rows


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(st.lists(st.tuples(TEXT, TEXT), max_size=8), min_size=1, max_size=3), limit=st.integers(1, 9))
def test_csv_records_once_each(bench: Bench, parts: list[list[tuple[str, str]]], limit: int) -> None:
    for old in bench.workspace.glob("*.csv"):
        old.unlink()
    for index, part in enumerate(parts):
        with (bench.workspace / f"{index}.csv").open("w", newline="", encoding="utf-8") as file:
            # Python's writer leaves a lone carriage return unquoted, where it ends the line for every reader.
            lone = any("\r" in "".join(row) for row in part)
            end = ("\n", "\r\n")[index % 2]
            writer = csv.writer(file, lineterminator=end, quoting=csv.QUOTE_ALL if lone else csv.QUOTE_MINIMAL)
            writer.writerow(["a", "b"])
            writer.writerows(part)
    expected = [{"a": a, "b": b} for part in parts for a, b in part]
    assert read_all(bench, files("*.csv", nullValues=[]), limit) == expected


VALUES = st.none() | st.booleans() | st.integers(-9, 9) | TEXT


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(parts=st.lists(st.lists(VALUES, min_size=1, max_size=8), min_size=1, max_size=3), limit=st.integers(1, 9))
def test_json_lines_once_each(bench: Bench, parts: list[list[Any]], limit: int) -> None:
    for old in bench.workspace.glob("*.jsonl"):
        old.unlink()
    for index, part in enumerate(parts):
        lines = [json.dumps({"v": value}, ensure_ascii=index == 0) for value in part]
        (bench.workspace / f"{index}.jsonl").write_text("\n".join(lines) + "\n" * (index % 3), encoding="utf-8")
    got = [row["v"] for row in read_all(bench, files("*.jsonl"), limit)]
    every = [value for part in parts for value in part]
    assert len(got) == len(every)
    for have, want in zip(got, every, strict=True):
        assert have == want or have == json.dumps(want)  # a mixture within one batch is text


@pytest.mark.parametrize("limit", [1, 3, 7, 25, 100])
def test_parquet_rows_once_each(bench: Bench, limit: int) -> None:
    start = 0
    for index, count in enumerate([10, 0, 17, 1]):
        table = pa.table({"id": pa.array(range(start, start + count), pa.int32())})
        pq.write_table(table, bench.workspace / f"{index}.parquet", row_group_size=4)
        start += count
    batches = bench.chain(files("*.parquet"), limit)
    assert [row["id"] for batch in batches for row in batch] == list(range(28))
    assert bench.schema() == {"id": "int32"}


def test_csv_is_text_and_missing_is_null(bench: Bench) -> None:
    (bench.workspace / "in").mkdir()
    (bench.workspace / "in/a.csv").write_text("\ufeffid;code\n007;NA\n\n8;\n", encoding="utf-8")
    assert bench.run("fetch", files("in/*.csv", delimiter=";")).code == 0
    assert bench.rows() == [{"id": "007", "code": "NA"}, {"id": "8", "code": None}]
    assert bench.run("fetch", files("in/*.csv", delimiter=";", nullValues=["", "NA"])).code == 0
    assert bench.rows()[0] == {"id": "007", "code": None}


def test_compressed_files_go_on_within(bench: Bench) -> None:
    lines = [json.dumps({"id": index}) for index in range(50)]
    (bench.workspace / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    batches = bench.chain(files("*.gz"), 7)
    assert [row["id"] for batch in batches for row in batch] == list(range(50))


def test_absolute_paths_and_uris(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1}\n')
    for path in (f"{tmp_path}/a.jsonl", f"file://{tmp_path}/*.jsonl"):
        assert bench.run("fetch", files(path)).code == 0
        assert bench.rows() == [{"id": 1}]
    answer = bench.run("fetch", files("nowhere://bucket/*.csv"))
    assert (answer.code, "'nowhere'" in answer.message) == (65, True)


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"", "a.csv is empty (0 bytes)"),
        ("a.csv", b"\n", "a.csv has no header line"),
        ("a.csv", b"x,y\n1,2\n1,2,3\n", "a.csv, line 3: 3 values where the header has 2 columns"),
        ("a.csv", b'x,y\n"1\n1",2\n\n7\n', "a.csv, line 5: 1 value where"),
        ("a.csv", b'x,y\n1,2\n"1,2\n3,4\n', "a.csv, line 3: unexpected end of data"),
        ("a.csv", b"x,x\n1,2\n", "two columns are named 'x'"),
        ("a.csv", b"x,y\n1,\xff\n", "a.csv, line 2: not UTF-8"),
        ("a.jsonl", b'{"x": 1}\n\n{"x": \n', "a.jsonl, line 3: not JSON"),
        ("a.jsonl", b'{"x": 1}\n[1]\n', "a.jsonl, line 2: no JSON object but a list"),
        ("a.jsonl", b'{"x": NaN}\n', "a.jsonl, line 1: not JSON"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"x": 1}\n' * 99, mtime=0)[:-9],
            "a.jsonl.gz is not compressed as its name says",
        ),
        ("a.jsonl.gz", b"plain\n", "a.jsonl.gz is not compressed as its name says"),
        ("a.parquet", b"PAR1 no more", "a.parquet is no Parquet file"),
        ("a.xml", b"<x/>", "a.xml: its name says no format"),
    ],
)
def test_a_broken_file(bench: Bench, name: str, content: bytes, text: str) -> None:
    (bench.workspace / name).write_bytes(content)
    answer = bench.run("fetch", files(name))
    assert answer.code == 65, answer
    assert text in answer.message
    assert not bench.dir("fetch").exists()


def test_a_broken_file_is_named_by_the_batch_that_comes_to_it(bench: Bench) -> None:
    (bench.workspace / "a.csv").write_text("x\n1\n2\n")
    (bench.workspace / "b.csv").write_text("")
    first = bench.run("fetch", files("*.csv"), limit=2)
    assert first.result is not None
    assert (first.code, first.result.exhausted) == (0, False)
    second = bench.run("fetch", files("*.csv"), limit=2, batch=1, cursor=first.result.next_cursor)
    assert (second.code, "b.csv is empty" in second.message) == (65, True)


def test_no_file(bench: Bench) -> None:
    answer = bench.run("fetch", files("in/*.csv"))
    assert (answer.code, answer.message.startswith("no file matches 'in/*.csv'")) == (65, True)
    (bench.workspace / "dir.csv").mkdir()
    assert bench.run("fetch", files("*.csv")).code == 65


def test_a_position_names_the_file_and_the_place_in_it(bench: Bench) -> None:
    (bench.workspace / "a.csv").write_text("x\n1\n")
    (bench.workspace / "b.csv").write_text("x\n1\n2\n3\n")
    first = bench.run("fetch", files("*.csv"), limit=2)
    assert first.result is not None
    cursor = first.result.next_cursor
    assert json.loads(cursor or "") == {"file": "b.csv", "index": 1, "size": 8, "offset": 4, "row": 1, "line": 2}
    assert bench.run("fetch", files("*.csv"), limit=2, batch=1, cursor='{"page":1}').code == 65


def test_partitions(bench: Bench) -> None:
    for index in range(5):
        (bench.workspace / f"p{index}.csv").write_text(f"x\n{index}\n")
    seen = []
    for index in range(7):
        answer = bench.run("fetch", files("*.csv"), batch=index, partitions=7, cursor=index, limit=1)
        assert answer.result is not None
        assert answer.result.exhausted
        seen += [row["x"] for row in bench.rows(batch=index)]
    assert sorted(seen) == list("01234")
    assert bench.run("fetch", files("p{partition}.csv"), partitions=9, cursor="3").code == 0
    assert bench.rows() == [{"x": "3"}]
    for cursor in ("7", "x", ""):
        assert bench.run("fetch", files("*.csv"), partitions=7, cursor=cursor).code == 65
    assert bench.run("fetch", files("q{partition}.csv"), partitions=9, cursor="3").code == 65


def test_parquet_files_of_several_schemas(bench: Bench) -> None:
    pq.write_table(pa.table({"a": [1], "b": ["x"]}), bench.workspace / "0.parquet")
    pq.write_table(pa.table({"a": [1.5], "c": [True]}), bench.workspace / "1.parquet")
    assert bench.run("fetch", files("*.parquet")).code == 0
    assert bench.rows() == [{"a": 1.0, "b": "x", "c": None}, {"a": 1.5, "b": None, "c": True}]
    pq.write_table(pa.table({"a": [[1]]}), bench.workspace / "2.parquet")
    answer = bench.run("fetch", files("*.parquet"), idempotency_key="another-run/0")
    assert (answer.code, "column 'a' is double here and list" in answer.message) == (65, True)
