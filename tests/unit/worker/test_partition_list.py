"""Partitions listed in a file of the workspace: the batch takes its own line, or says what is wrong with the list."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from ingestrun.model.contract import ENV_PARTITION_FILE
from ingestrun.worker.errors import PermanentError

from .support import Answer, Bench, Site, page

SOURCE: dict[str, Any] = {"files": {"path": "landing/{partition}.jsonl"}}


def fetch(
    bench: Bench, lines: bytes | None, *, index: int = 0, count: int, source: Any = SOURCE, **more: Any
) -> Answer:
    path = bench.workspace / "lists" / "stations.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    if lines is not None:
        path.write_bytes(lines)
    return bench.run("fetch", source, batch=index, cursor=index, partitions=count, partition_file=path, **more)


def land(bench: Bench, *names: str) -> None:
    for name in names:
        path = bench.workspace / "landing" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f'{{"station": "{name}"}}\n')


def test_the_variable_is_the_contracts() -> None:
    assert ENV_PARTITION_FILE == "INGEST_PARTITION_FILE", "what `fetch` above sets"


@pytest.mark.parametrize("lines", [b"EWR\nJFK\nLGA\n", b"EWR\nJFK\nLGA", b"\xef\xbb\xbfEWR\r\nJFK\r\nLGA\r\n"])
def test_each_batch_reads_its_own_line(bench: Bench, lines: bytes) -> None:
    land(bench, "EWR", "JFK", "LGA")
    for index, name in enumerate(("EWR", "JFK", "LGA")):
        answer = fetch(bench, lines, index=index, count=3)
        assert answer.code == 0, answer
        assert bench.rows(batch=index) == [{"station": name}]


def test_a_line_goes_into_an_url(bench: Bench, site: Site) -> None:
    site.answer = lambda _: page([{"a": 1}])
    http = {"http": {"url": f"{site.url}/s/{{partition}}", "pagination": {"link": {}}}}
    answer = fetch(bench, "Zürich HB\n".encode(), count=1, source=http)
    assert answer.code == 0, answer
    assert [request.path for request in site.requests] == ["/s/Z%C3%BCrich%20HB"]


@pytest.mark.parametrize(
    ("lines", "index", "count", "message"),
    [
        (b"a\nb\n", 0, 3, "lists/stations.txt has 2 lines, and batches.partitions.count is 3"),
        (b"a\nb\n", 2, 3, "lists/stations.txt has 2 lines, and batches.partitions.count is 3"),
        (b"a\nb\nc\n", 0, 2, "lists/stations.txt has 3 lines, and batches.partitions.count is 2"),
        (b"a\nb\n\n", 0, 2, "lists/stations.txt has 3 lines, and batches.partitions.count is 2"),
        (b"", 0, 1, "lists/stations.txt has 0 lines"),
        (b"a\n\nc\n", 1, 3, "lists/stations.txt: line 2 is empty"),
        (b"a\n  \nc\n", 1, 3, "lists/stations.txt: line 2 is empty"),
        (b"a\nb\na\n", 2, 3, "lists/stations.txt: line 3 is the same as line 1 ('a'): remove one"),
        (b"a\na\n", 1, 2, "lists/stations.txt: line 2 is the same as line 1 ('a'): remove one"),
        (b"a\nb\tc\n", 1, 2, "lists/stations.txt: line 2 has a control character in it"),
        (b"a\n\xff\n", 1, 2, "lists/stations.txt: line 2 is not UTF-8"),
        (b"a\n" + b"x" * 1025 + b"\nc\n", 1, 3, "lists/stations.txt: line 2 is longer than 1024 bytes"),
        (b"a\n" + b"x" * 2**21, 0, 2, "lists/stations.txt: line 2 is longer than 1024 bytes"),
        (None, 0, 1, "lists/stations.txt, the list of partitions, is not in the workspace: put it there first"),
    ],
)
def test_a_list_that_is_not_as_it_should_be(
    bench: Bench, lines: bytes | None, index: int, count: int, message: str
) -> None:
    land(bench, "a", "b", "c")
    answer = fetch(bench, lines, index=index, count=count)
    assert answer.code == 65
    assert message in answer.message


def test_a_list_that_changes_is_told_although_it_is_as_long_as_before(bench: Bench) -> None:
    """Sorted anew, say: line 1 would be read again as line 2, and another line not at all."""
    land(bench, "a", "b", "c")
    first = fetch(bench, b"b\nc\na\n", index=0, count=3)
    assert first.result is not None
    digest = first.result.source_digest
    assert digest == hashlib.sha256(b"b\nc\na\n").hexdigest()
    same = fetch(bench, b"b\nc\na\n", index=1, count=3, source_digest=digest)
    assert same.result is not None
    assert (same.code, same.result.source_digest) == (0, digest)
    answer = fetch(bench, b"a\nb\nc\n", index=1, count=3, source_digest=digest)
    assert answer.result is not None
    assert (answer.code, answer.result.reason) == (65, "SourceChanged")
    assert "lists/stations.txt has changed since the run began" in answer.message


def test_of_two_equal_lines_the_first_is_read(bench: Bench) -> None:
    land(bench, "a", "b")
    assert fetch(bench, b"a\nb\na\n", index=0, count=3).code == 0
    assert fetch(bench, b"a\nb\na\n", index=1, count=3).code == 0


def test_a_line_of_just_the_longest_size(bench: Bench, site: Site) -> None:
    site.answer = lambda _: page([])
    http = {"http": {"url": site.url, "params": {"p": "{partition}"}, "pagination": {"link": {}}}}
    assert fetch(bench, b"x" * 1024 + b"\r\nb\n", index=0, count=2, source=http).code == 0
    assert site.requests[0].params == {"p": "x" * 1024}


def test_the_list_must_be_a_file(bench: Bench) -> None:
    (bench.workspace / "lists" / "stations.txt").mkdir(parents=True)
    answer = fetch(bench, None, count=1)
    assert answer.code == 65
    assert "is no file" in answer.message


def test_a_long_list_is_read_in_constant_memory(bench: Bench, tmp_path: Path) -> None:
    import tracemalloc

    from ingestrun.worker.partition_list import read_line

    path = tmp_path / "long.txt"
    with path.open("w") as out:
        out.writelines(f"station-{number:011d}\n" for number in range(500_000))
    tracemalloc.start()
    try:
        assert read_line(path, "long.txt", 499_999, 500_000) == "station-00000499999"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size, f"{peak} bytes for a list of {path.stat().st_size}"


def test_a_list_of_many_blocks_is_counted_and_found_like_a_short_one(tmp_path: Path) -> None:
    """Lines of every length around the blocks in which the file is read."""
    from ingestrun.worker import partition_list

    lines = [f"{'x' * (number % 97)}{number}" for number in range(60_000)]
    path = tmp_path / "long.txt"
    path.write_text("\n".join(lines))
    assert path.stat().st_size > 2 * partition_list._BLOCK_BYTES
    for index in [*range(0, 60_000, 1777), 59_999]:
        assert partition_list.read_line(path, "long.txt", index, 60_000) == lines[index]
    lines[59_999] = lines[3]
    path.write_text("\n".join(lines))
    with pytest.raises(PermanentError, match="line 60000 is the same as line 4"):
        partition_list.read_line(path, "long.txt", 59_999, 60_000)
