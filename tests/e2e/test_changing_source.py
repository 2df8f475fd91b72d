"""Files that come and change while a run reads them by number: each row once, or a sentence that names the file."""

from __future__ import annotations

import json
from typing import Final

from tests.e2e.cluster import Json, Kubectl, condition, phase, wait_for
from tests.e2e.runs import ended, events, flights, run_of, said_by
from tests.e2e.test_partitions import script

DAYS: Final = ("02", "03", "04", "05", "06", "07", "08", "09")

WRITE: Final = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
for name, rows in json.loads(sys.argv[2]).items():
    (folder / name).write_text("day\\n" + "".join(f"{row}\\n" for row in rows))
"""

READ: Final = """
import json, pathlib, sys, duckdb
files = sorted(pathlib.Path(sys.argv[1]).rglob("*.parquet"))
print(json.dumps([duckdb.sql(f"SELECT day FROM '{file}' ORDER BY day").fetchall() for file in files]))
"""


def write(kubectl: Kubectl, namespace: str, job: str, folder: str, **days: tuple[str, ...]) -> None:
    """Write files of days, each row a day."""
    files = {f"{day}.csv": rows for day, rows in days.items()}
    said_by(kubectl, namespace, script(job, WRITE, folder, json.dumps(files), writes=True))


def by_number(namespace: str, name: str) -> Json:
    """A run of four partitions over eight files, one partition at a time."""
    body = flights(namespace, name, hooks=[], batches={"partitions": {"count": 4}}, parallelism=1)
    body["spec"]["source"] = {"files": {"path": f"landing-{name}/*.csv"}}
    return body


def paused_after_the_first_fetch(kubectl: Kubectl, namespace: str, name: str) -> None:
    """Write the eight files, begin the run, and suspend it once it has read two of them."""
    write(kubectl, namespace, f"write-{name}", f"landing-{name}", **{f"d{day}": (day,) for day in DAYS})
    kubectl.apply([by_number(namespace, name)])

    def fetched() -> bool:
        return bool(run_of(kubectl, namespace, name).get("status", {}).get("batches", {}).get("fetched"))

    wait_for(fetched, seconds=120, what="the first fetch")
    suspend(kubectl, namespace, name, on=True)
    assert run_of(kubectl, namespace, name)["status"]["batches"]["fetched"] == "0"


def suspend(kubectl: Kubectl, namespace: str, name: str, *, on: bool) -> None:
    kubectl(
        "-n", namespace, "patch", "ir", name, "--type", "merge", "-p", json.dumps({"spec": {"suspend": on or None}})
    )


def test_a_file_that_comes_later_moves_no_other(kubectl: Kubectl, namespace: str) -> None:
    paused_after_the_first_fetch(kubectl, namespace, "late-file")
    write(kubectl, namespace, "write-late", "landing-late-file", d01=("01",), d055=("055",))
    suspend(kubectl, namespace, "late-file", on=False)
    run = ended(kubectl, namespace, "late-file", seconds=180)
    assert phase(run) == "Succeeded", condition(run, "Succeeded")
    assert len(run["status"]["sourceDigest"]) == 64
    rows = json.loads(said_by(kubectl, namespace, script("read-late", READ, "late-file")))
    assert rows == [[[day] for day in days] for days in (("02", "06"), ("03", "07"), ("04", "08"), ("05", "09"))]


def test_a_file_that_changes_before_its_turn_is_named(kubectl: Kubectl, namespace: str) -> None:
    paused_after_the_first_fetch(kubectl, namespace, "changed-file")
    write(kubectl, namespace, "write-changed", "landing-changed-file", d07=("07", "07"))
    suspend(kubectl, namespace, "changed-file", on=False)
    run = ended(kubectl, namespace, "changed-file", seconds=180)
    assert phase(run) == "Failed"
    sentence = "SourceChanged: exit code 65: d07.csv has changed since the run began (it had 7 bytes, and has now 10)"
    assert sentence in condition(run, "Succeeded")["message"]
    assert any(sentence in told for told in events(kubectl, namespace, "changed-file", "Failed"))
    assert run["status"]["batches"]["published"] == "0"
