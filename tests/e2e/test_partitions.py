"""Partitions listed in a file of the workspace, read by the real worker: each line once, or a sentence and nothing.

A partition is a page of the demo's source, by its number. All runs start together; each is waited for on its own, and
one Job looks at what all of them have published.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Final

import pytest
from dev.demo.__main__ import check_job

from tests.e2e.cluster import Json, Kubectl, condition, image, phase
from tests.e2e.runs import ended, events, flights, run_of, said_by

PAGE: Final = 500

WRITE: Final = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
for name, lines in json.loads(sys.argv[2]).items():
    (folder / name).write_text("".join(f"{line}\\n" for line in lines))
"""
"""No image here has a shell, or the tar that `kubectl cp` needs."""

READ: Final = """
import json, pathlib, sys, duckdb
look = "SELECT count(*), count(DISTINCT id), min(id), max(id) FROM read_parquet(?)"
files = sorted(pathlib.Path(sys.argv[1]).glob("list-*/*.parquet"))
print(json.dumps([[*file.parts[-2:], *duckdb.execute(look, [str(file)]).fetchone()] for file in files]))
"""


@dataclass(frozen=True, kw_only=True)
class Case:
    """A list; None: there is none. `changes` are the run's."""

    lines: tuple[str, ...] | None
    count: int
    changes: Json = field(default_factory=dict)


CASES: Final = {
    "whole": Case(lines=("40", "7", "300", "12"), count=4),
    "twice": Case(lines=("40", "7", "40"), count=3, changes={"onBatchFailure": "Continue"}),
    # One at a time: the first to fail ends the run before another is begun.
    "long": Case(lines=("4" * 1025, "7"), count=2, changes={"parallelism": 1}),
    "missing": Case(lines=None, count=2, changes={"parallelism": 1}),
}


@pytest.fixture(scope="module")
def started(kubectl: Kubectl, namespace: str) -> None:
    """The lists, put there by a Job; then all runs at once."""
    lists = {f"{name}.txt": case.lines for name, case in CASES.items() if case.lines is not None}
    said_by(kubectl, namespace, script("write-lists", WRITE, "lists", json.dumps(lists), writes=True))
    kubectl.apply([listed(namespace, name, case) for name, case in CASES.items()])


@pytest.fixture(scope="module")
def datasets(kubectl: Kubectl, namespace: str, started: None) -> dict[str, dict[str, list[int]]]:
    """By run, by file: its rows, its distinct ids, the first and the last; once all runs have ended and drained."""
    for name in CASES:
        ended(kubectl, namespace, f"list-{name}", seconds=240)
        kubectl("-n", namespace, "wait", f"ingestrun/list-{name}", "--for=condition=Drained", "--timeout=60s")
    found: dict[str, dict[str, list[int]]] = {f"list-{name}": {} for name in CASES}
    for dataset, file, *numbers in json.loads(said_by(kubectl, namespace, script("read-datasets", READ, ""))):
        found[dataset][file] = numbers
    return found


def script(name: str, code: str, folder: str, *arguments: str, writes: bool = False) -> Json:
    """A Job that runs Python over a folder of the volume."""
    job = check_job(name, folder, arguments, image=image("DEMO_IMAGE"))
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    container["command"] = ["/venv/bin/python", "-c", code]
    if writes:
        container["volumeMounts"][0]["readOnly"] = pod["volumes"][0]["persistentVolumeClaim"]["readOnly"] = False
    return job


def listed(namespace: str, name: str, case: Case) -> Json:
    """A run over one list: a partition is read to its end, and that is its one page, as nothing says where to go on."""
    partitions = {"count": case.count, "file": f"lists/{name}.txt"}
    body = flights(namespace, f"list-{name}", hooks=[], batches={"partitions": partitions}, **case.changes)
    http = body["spec"]["source"]["http"]
    http["params"] = {"page": "{partition}", "per_page": str(PAGE)}
    http["pagination"] = {"cursor": {"path": "next"}}
    return body


def files_of(run: Json, lines: dict[int, int]) -> dict[str, list[int]]:
    """The files that a run has to publish for these pages, by their batch."""
    uid = run["metadata"]["uid"]
    return {
        f"{uid}-{batch:06d}.parquet": [PAGE, PAGE, (page - 1) * PAGE + 1, page * PAGE] for batch, page in lines.items()
    }


def test_each_line_of_the_list_is_published_once(
    kubectl: Kubectl, namespace: str, datasets: dict[str, dict[str, list[int]]]
) -> None:
    run = run_of(kubectl, namespace, "list-whole")
    assert phase(run) == "Succeeded", condition(run, "Succeeded")
    assert run["status"]["batches"]["published"] == "0-3"
    assert run["status"]["records"] == {"fetched": 4 * PAGE, "rejected": 0, "published": 4 * PAGE}
    assert datasets["list-whole"] == files_of(run, {0: 40, 1: 7, 2: 300, 3: 12})


def test_of_two_equal_lines_the_first_is_published(
    kubectl: Kubectl, namespace: str, datasets: dict[str, dict[str, list[int]]]
) -> None:
    run = run_of(kubectl, namespace, "list-twice")
    assert (phase(run), condition(run, "Succeeded")["reason"]) == ("Succeeded", "CompletedWithFailedBatches")
    batches = run["status"]["batches"]
    assert (batches["published"], batches["failed"]) == ("0-1", "2")
    (failure,) = run["status"]["failures"]
    assert (failure["batch"], failure["stage"], failure["reason"]) == (2, "fetch", "PermanentError")
    sentence = "lists/twice.txt: line 3 is the same as line 1 ('40'): remove one"
    assert sentence in failure["message"]
    assert any(sentence in told for told in events(kubectl, namespace, "list-twice", "StageFailed"))
    assert datasets["list-twice"] == files_of(run, {0: 40, 1: 7})


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("long", "lists/long.txt: line 1 is longer than 1024 bytes"),
        ("missing", "lists/missing.txt, the list of partitions, is not in the workspace: put it there first"),
    ],
    ids=["long", "missing"],
)
def test_a_list_that_will_not_do_fails_the_run_and_publishes_nothing(
    kubectl: Kubectl, namespace: str, datasets: dict[str, dict[str, list[int]]], name: str, sentence: str
) -> None:
    run = run_of(kubectl, namespace, f"list-{name}")
    assert phase(run) == "Failed"
    for kind in ("Succeeded", "Stalled"):
        assert condition(run, kind)["reason"] == "BatchFailed"
        assert sentence in condition(run, kind)["message"]
    assert any(sentence in told for told in events(kubectl, namespace, f"list-{name}", "Failed"))
    assert run["status"]["batches"]["claimed"] == "0"
    assert run["status"]["records"] == {"fetched": 0, "rejected": 0, "published": 0}
    assert datasets[f"list-{name}"] == {}
