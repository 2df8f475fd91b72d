"""What a run reads from files is fixed when it begins: each row once, or a sentence that says what has changed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ingestrun.model.contract import SOURCE_CHANGED

from .support import UID, Answer, Bench

SOURCE: Final = {"files": {"path": "landing/*.csv"}}
LIST: Final = f".ingestrun/{UID}"


@pytest.fixture
def landing(bench: Bench) -> Path:
    """Six files of two rows each: 20, 21 in c2.csv, and so on."""
    directory = bench.workspace / "landing"
    directory.mkdir()
    for number in range(2, 8):
        put(directory, number)
    return directory


def put(landing: Path, number: int) -> None:
    (landing / f"c{number}.csv").write_text(f"x\n{number}0\n{number}1\n")


def fetch(bench: Bench, index: int, count: int = 3, **more: Any) -> Answer:
    return bench.run("fetch", SOURCE, batch=index, cursor=index, partitions=count, **more)


def values(bench: Bench, *batches: int) -> list[int]:
    return [int(row["x"]) for batch in batches for row in bench.rows(batch=batch)]


def digest_of(answer: Answer) -> str:
    assert answer.code == 0, answer
    assert answer.result is not None
    assert answer.result.source_digest is not None
    return answer.result.source_digest


def assert_changed(answer: Answer, *words: str) -> None:
    assert answer.code == 65, answer
    assert answer.result is not None
    assert answer.result.reason == SOURCE_CHANGED
    for word in words:
        assert word in answer.message


def test_a_file_that_comes_between_two_partitions_moves_none(bench: Bench, landing: Path) -> None:
    first = digest_of(fetch(bench, 0))
    put(landing, 1)
    put(landing, 4.5)  # type: ignore[arg-type]
    second = digest_of(fetch(bench, 1, source_digest=first))
    put(landing, 0)
    assert digest_of(fetch(bench, 2, source_digest=first)) == first == second
    assert sorted(values(bench, 0, 1, 2)) == sorted(10 * n + m for n in range(2, 8) for m in range(2))


def test_a_file_that_goes_once_it_is_read_moves_none(bench: Bench, landing: Path) -> None:
    digest = digest_of(fetch(bench, 0))
    (landing / "c2.csv").unlink()  # of batch 0: archived by somebody
    assert fetch(bench, 1, source_digest=digest).code == fetch(bench, 2, source_digest=digest).code == 0
    assert values(bench, 1, 2) == [30, 31, 60, 61, 40, 41, 70, 71]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "and is not any more"),
        (lambda path: path.write_text("x\n30\n31\n32\n"), "(it had 8 bytes, and has now 11)"),
        (lambda path: path.write_text("x\n30\n"), "(it had 8 bytes, and has now 5)"),
        (lambda path: path.write_text("x\n98\n99\n"), "(with as many bytes)"),
        (lambda path: path.write_text(""), "and has now 0"),
    ],
)
def test_a_file_that_changes_before_it_is_read_is_named(
    bench: Bench, landing: Path, change: Callable[[Path], object], words: str
) -> None:
    digest = digest_of(fetch(bench, 0))
    os.utime(landing / "c3.csv", (1, 1))
    change(landing / "c3.csv")
    assert_changed(fetch(bench, 1, source_digest=digest), "c3.csv ", words)
    assert not bench.dir("fetch", 1).exists()


def test_a_file_that_grows_while_it_is_read_is_named(
    bench: Bench, landing: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ingestrun.worker import file_formats, file_source

    real = file_formats.reader_for

    def reader_for(kind: Any) -> Any:
        def read(*args: Any) -> Any:
            end = real(kind)(*args)
            with (landing / "c2.csv").open("a") as file:
                file.write("22\n")
            return end

        return read

    monkeypatch.setattr(file_source, "reader_for", reader_for)
    assert_changed(fetch(bench, 0), "c2.csv has changed since the run began (it had 8 bytes, and has now 11)")
    monkeypatch.undo()
    assert not bench.dir("fetch").exists()


def test_a_mounted_file_is_known_by_its_target(bench: Bench, landing: Path, tmp_path: Path) -> None:
    """As a ConfigMap is mounted: a link that stays, to a target that changes."""
    target = tmp_path / "target"
    target.write_text("x\n1\n")
    (landing / "c9.csv").symlink_to(target)
    digest = digest_of(fetch(bench, 0))
    target.write_text("x\n2\n")
    os.utime(target, (1, 1))
    assert_changed(fetch(bench, 6, 7, source_digest=digest), "c9.csv has changed")


def test_the_list_outlives_the_run_that_made_it(bench: Bench, landing: Path) -> None:
    """A run that resumes another has another UID, and the key of the first."""
    digest = digest_of(fetch(bench, 0))
    put(landing, 1)
    again = fetch(bench, 1, run_uid="the-second", source_digest=digest)
    assert digest_of(again) == digest
    assert values(bench, 0, 1) == [20, 21, 50, 51, 30, 31, 60, 61]


def test_a_list_that_is_lost_is_made_again_if_the_files_are_the_same(bench: Bench, landing: Path) -> None:
    digest = digest_of(fetch(bench, 0))
    shutil.rmtree(bench.workspace / LIST)
    assert digest_of(fetch(bench, 1, source_digest=digest)) == digest
    put(landing, 1)
    assert digest_of(fetch(bench, 2, source_digest=digest)) == digest
    assert values(bench, 0, 1, 2)[-1] == 71


def test_a_list_that_is_lost_is_told_if_the_files_are_others(bench: Bench, landing: Path) -> None:
    digest = digest_of(fetch(bench, 0))
    shutil.rmtree(bench.workspace / LIST)
    put(landing, 1)
    assert_changed(fetch(bench, 1, source_digest=digest), "the list of the files that the run reads, is gone")
    assert not (bench.workspace / LIST).exists(), "a list that is not the run's is not left for the others"


def test_a_list_that_was_written_over_is_told(bench: Bench, landing: Path) -> None:
    digest = digest_of(fetch(bench, 0))
    (path,) = (bench.workspace / LIST).iterdir()
    path.write_text(path.read_text().replace("c3.csv", "c2.csv"))
    assert_changed(fetch(bench, 1, source_digest=digest), "is not the list of the files that the run began with")
    path.write_text("garbage\n")
    assert fetch(bench, 1).code == 65


def test_fetches_that_begin_at_once_have_one_list(bench: Bench, landing: Path) -> None:
    """Real processes; files keep coming while they look."""
    environments = [bench.env("fetch", SOURCE, batch=index, cursor=index, partitions=8) for index in range(8)]
    for index, env in enumerate(environments):
        env["INGEST_TERMINATION_MESSAGE_PATH"] = str(bench.workspace / f"result-{index}")
    path = os.pathsep.join(sys.path)
    workers = []
    for number, env in enumerate(environments):
        workers.append(subprocess.Popen([sys.executable, "-m", "ingestrun.worker"], env=env | {"PYTHONPATH": path}))
        put(landing, -number)
    assert [worker.wait(timeout=60) for worker in workers] == [0] * 8
    results = [json.loads((bench.workspace / f"result-{index}").read_text()) for index in range(8)]
    assert len({result["sourceDigest"] for result in results}) == 1
    (path_of_list,) = (bench.workspace / LIST).glob("files-*.jsonl")
    listed = [json.loads(line)[0] for line in path_of_list.read_text().splitlines()]
    read = sorted(values(bench, *range(8)))
    wanted = [int(row) for name in listed for row in (landing / name).read_text().split()[1:]]
    assert read == sorted(wanted)
    assert [path.name for path in (bench.workspace / LIST).iterdir()] == [path_of_list.name]


def test_of_two_lists_the_first_counts(bench: Bench, landing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other fetch writes its list, and a file comes, between this one's look and its own list."""
    from ingestrun.worker import file_list

    real = file_list._keep
    digests: list[str] = []

    def keep(path: Path, content: bytes) -> None:
        if not digests:
            digests.append("")
            put(landing, 1)
            digests[0] = digest_of(fetch(bench, 1))
        real(path, content)

    monkeypatch.setattr(file_list, "_keep", keep)
    assert digest_of(fetch(bench, 0)) == digests[0]
    assert digest_of(fetch(bench, 2)) == digests[0]
    assert sorted(values(bench, 0, 1, 2)) == sorted(10 * n + m for n in range(1, 8) for m in range(2))


def test_a_chain_reads_the_files_that_were_there(bench: Bench, landing: Path) -> None:
    """One file comes and one goes before the place reached: by their number alone nothing would have changed."""
    rows, cursor, digest = [], "", None
    for batch in range(7):
        answer = bench.run("fetch", SOURCE, batch=batch, cursor=cursor, limit=2, source_digest=digest)
        digest = digest_of(answer)
        assert answer.result is not None
        rows += values(bench, batch)
        cursor = answer.result.next_cursor or ""
        if batch == 2:
            (landing / "c2.csv").unlink()
            put(landing, 1)
            put(landing, 9)
        if answer.result.exhausted:
            break
    assert rows == [10 * n + m for n in range(2, 8) for m in range(2)]


def test_a_chain_tells_a_file_that_was_written_again_half_read(bench: Bench, landing: Path) -> None:
    first = bench.run("fetch", SOURCE, limit=3)
    assert first.result is not None
    (landing / "c3.csv").write_text("x\n98\n99\n")
    os.utime(landing / "c3.csv", (1, 1))
    answer = bench.run(
        "fetch", SOURCE, batch=1, limit=3, cursor=first.result.next_cursor, source_digest=digest_of(first)
    )
    assert_changed(answer, "c3.csv has changed since the run began (with as many bytes)")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda root: (root / "c3.csv").unlink(), "is no longer among the files"),
        (lambda root: (root / "c2.csv").unlink(), "came or went before it"),
        (lambda root: put(root, 1), "came or went before it"),
        (lambda root: (root / "c3.csv").write_text("x\n1\n"), "must not change while it is read"),
    ],
)
def test_a_chain_without_a_digest_goes_by_the_position(
    bench: Bench, landing: Path, change: Callable[[Path], object], text: str
) -> None:
    """As in a run that an older version began, which had no list."""
    first = bench.run("fetch", SOURCE, limit=3)
    assert first.result is not None
    shutil.rmtree(bench.workspace / LIST)
    change(landing)
    assert_changed(bench.run("fetch", SOURCE, limit=3, batch=1, cursor=first.result.next_cursor), text)


def test_partitions_by_name_have_no_list(bench: Bench, landing: Path) -> None:
    answer = bench.run("fetch", {"files": {"path": "landing/c{partition}*.csv"}}, cursor="3", partitions=9)
    assert answer.result is not None
    assert (answer.code, answer.result.source_digest) == (0, None)
    assert not (bench.workspace / LIST).exists()
