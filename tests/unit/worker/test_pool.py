"""A worker of the pool as a process, before a strict operator and a source on loopback: what it publishes, and when."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from ingestrun.model.contract import parse_result

from .pool_operator import BASE, CHECK, Ask, PoolOperator, Served, Way
from .support import UID, Bench, Reply, Request, Site, page
from .test_main import spawn

HOOK = {"validate": {"columns": [{"name": "id", "type": "integer", "required": True}]}}
SINK = {"parquet": {"path": "data"}}
PAGE = 5
BAD = 7
"""Each seventh record has no id, and is rejected."""


def records(first: int, end: int) -> list[dict[str, Any]]:
    return [{"id": None if n % BAD == 0 else n, "name": f"row {n}"} for n in range(first, end)]


def kept(end: int, first: int = 0) -> list[int]:
    return [n for n in range(first, end) if n % BAD]


@dataclass
class Pool:
    """A run: its source, its operator, its workspace, and the workers that were started."""

    bench: Bench
    site: Site
    served: Served
    total: int = 22
    stages: list[dict[str, Any]] = field(
        default_factory=lambda: [
            {"stage": "fetch", "name": "fetch"},
            {"stage": "hook", "name": "check"},
            {"stage": "publish", "name": "publish"},
        ]
    )
    before_page: Callable[[int], None] = lambda _offset: None
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def operator(self) -> PoolOperator:
        return self.served.operator

    def source(self, request: Request) -> Reply:
        offset = int(request.params["offset"])
        self.before_page(offset)
        return page(records(offset, min(self.total, offset + int(request.params["limit"]))))

    def env(self, worker: int, attempt: int = 0, **more: object) -> dict[str, str]:
        source = {"http": {"url": self.site.url, "pageSize": PAGE, "pagination": {"offset": {}}}}
        configs = [source, *[HOOK] * (len(self.stages) - 2), SINK]
        env = {
            "INGEST_CONTRACT": "v1",
            "INGEST_RUN_NAME": "geo",
            "INGEST_RUN_NAMESPACE": "default",
            "INGEST_RUN_UID": UID,
            "INGEST_POOL_URL": self.served.url + BASE,
            "INGEST_POOL_TOKEN": f"worker-{worker}-{attempt}",
            "INGEST_CANCELLATION_URL": self.served.url + CHECK,
            "INGEST_CANCELLATION_TOKEN": f"worker-{worker}-{attempt}",
            "INGEST_WORKER": str(worker),
            "INGEST_WORKER_ATTEMPT": str(attempt),
            "INGEST_STAGES": json.dumps(self.stages),
            "INGEST_WORKSPACE": str(self.bench.workspace),
            "INGEST_REJECTS": str(self.bench.workspace / "rejects"),
            "INGEST_TERMINATION_MESSAGE_PATH": str(self.bench.termination),
            **{f"INGEST_CONFIG_{index}": json.dumps(config) for index, config in enumerate(configs)},
        }
        return env | {f"INGEST_{name.upper()}": str(value) for name, value in more.items()}

    def start(self, worker: int = 0, attempt: int = 0, *command: str, **more: object) -> subprocess.Popen[str]:
        process = spawn(self.env(worker, attempt, **more), *command)
        self.processes.append(process)
        return process

    def run(self, worker: int = 0, attempt: int = 0, *command: str, **more: object) -> tuple[int, list[dict[str, Any]]]:
        return end_of(self.start(worker, attempt, *command, **more))

    def visible(self, batch: int) -> bool:
        return (self.bench.workspace / "data" / f"{UID}-{batch:06d}.parquet").exists()

    def ids(self) -> list[int]:
        files = sorted((self.bench.workspace / "data").glob("*.parquet"))
        return [row for path in files for row in pq.read_table(path)["id"].to_pylist()]

    def rejected(self) -> list[str]:
        """The names of the rows in quarantine, of the attempts whose batch was published."""
        told = [(report.batch, report.attempt) for report in self.operator.reports("done")]
        paths = [self.bench.workspace / "rejects" / f"{batch}-check-{attempt}" for batch, attempt in told]
        return [row for path in paths if path.exists() for row in pq.read_table(path)["name"].to_pylist()]

    def message(self) -> str:
        return parse_result(self.bench.termination.read_text()).message or ""

    def assert_complete(self) -> None:
        assert self.operator.violations == []
        assert self.ids() == kept(self.total)
        assert self.rejected() == [f"row {n}" for n in range(0, self.total, BAD)]
        assert self.leftovers() == []

    def assert_nothing_published(self) -> None:
        assert self.operator.violations == []
        assert self.ids() == []
        assert [path for path in self.bench.workspace.rglob("*") if path.is_file()] == []

    def leftovers(self) -> list[Path]:
        """What was written and neither published nor put into quarantine."""
        hidden = (self.bench.workspace / "data" / "_tmp").rglob("*")
        return [path for path in hidden if path.is_file()]


def end_of(process: subprocess.Popen[str], seconds: float = 60) -> tuple[int, list[dict[str, Any]]]:
    """The exit code and the log."""
    output, _ = process.communicate(timeout=seconds)
    lines = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    assert len(lines) == len(output.splitlines()), output
    return process.returncode, lines


def events(lines: list[dict[str, Any]], event: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["event"] == event]


@pytest.fixture
def pools(bench: Bench, site: Site) -> Iterator[Callable[..., Pool]]:
    made: list[Pool] = []

    def make(**more: Any) -> Pool:
        total = more.pop("total", 22)
        workspace = bench.workspace / f"run-{len(made)}"
        workspace.mkdir()
        pool = Pool(Bench(workspace), site, Served(PoolOperator(**{"limit": 10, **more})), total)
        pool.operator.visible = pool.visible
        site.answer = pool.source
        made.append(pool)
        return pool

    yield make
    for pool in made:
        for process in pool.processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
        pool.served.stop()


@pytest.fixture
def pool(pools: Callable[..., Pool]) -> Pool:
    return pools()


def test_a_chain_from_source_to_dataset(pool: Pool) -> None:
    code, log = pool.run()
    assert code == 0
    pool.assert_complete()
    assert [(r.batch, r.attempt, r.written, r.rejected) for r in pool.operator.reports()] == [
        (0, 0, 8, 2), (1, 0, 9, 1), (2, 0, 1, 1),
    ]  # fmt: skip
    assert pool.operator.kinds().count("claim") == 4, "one round trip a batch, and one to end"
    assert pool.operator.kinds().count("publish") == 3
    assert pool.message() == "3 batches done: every batch is done"
    assert [line["batch"] for line in events(log, "batch claimed")] == ["0", "1", "2"]
    assert events(log, "batch ended")[0]["outcome"] == "done"


def test_the_cursor_of_a_chain_is_told_before_the_batch_is_done(pool: Pool) -> None:
    """So that another worker can have the next batch meanwhile."""
    fetched = threading.Event()

    def way(ask: Ask) -> Way:
        if ask.kind == "fetched" and ask.body["batch"] == 0:
            return Way(after=fetched.set)
        held = ask.kind == "publish" and ask.body["batch"] == 0
        return Way(before=lambda: _wait_for(lambda: 1 in pool.operator.batches)) if held else Way()

    pool.operator.way = way
    first, second = pool.start(0), pool.start(1)
    assert end_of(first)[0] == end_of(second)[0] == 0
    assert fetched.is_set()
    pool.assert_complete()


def _wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it does not come"
        time.sleep(0.005)
