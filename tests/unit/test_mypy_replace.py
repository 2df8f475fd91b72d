"""mypy sees through `KubeModel.replace`: one run of it on a few lines, each with what it says of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]

LINES = """\
from datetime import datetime
from ingestrun.model.base import KubeModel
from ingestrun.model.status import BatchesStatus, IngestRunStatus, Phase
def right(status: IngestRunStatus, now: datetime) -> IngestRunStatus:
    return status.replace(completion_time=now, phase=None, batches=status.batches.replace(active=1))
def misspelt(status: IngestRunStatus, now: datetime) -> None:
    status.replace(compeltion_time=now)  # error: call-arg
def alias(status: IngestRunStatus, now: datetime) -> None:
    status.replace(completionTime=now)  # error: call-arg
def wrong_type(status: IngestRunStatus) -> None:
    status.replace(completion_time="now")  # error: arg-type
def unread(batches: BatchesStatus) -> None:
    batches.replace(claimed="0-3")  # error: arg-type
def wrong_result(status: IngestRunStatus) -> BatchesStatus:
    return status.replace(phase=Phase.RUNNING)  # error: return-value
def one_of_two(part: IngestRunStatus | BatchesStatus) -> None:
    part.replace(phase=None)  # error: call-arg
class Base(KubeModel):
    a: int = 0
class Derived(Base):
    b: str = ""
def inherited(part: Derived) -> Derived:
    return part.replace(a=1, b="b")
def inherited_wrong(part: Derived) -> None:
    part.replace(a="a")  # error: arg-type
def another_replace(text: str, now: datetime) -> str:
    return text.replace("a", "b") + str(now.replace(year=2027))
"""


def test_mypy_knows_the_fields_that_replace_takes(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(LINES)
    expected = {
        number: match[1]
        for number, line in enumerate(LINES.splitlines(), 1)
        if (match := re.search(r"# error: ([a-z-]+)", line))
    }

    command = (sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "--no-pretty", str(snippet))
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    found = re.findall(r"snippet\.py:([0-9]+): error: .*\[([a-z-]+)\]", done.stdout)
    assert {int(number): code for number, code in found} == expected, done.stdout + done.stderr
