"""A worker of the pool as a process, before a strict operator and a source on loopback: what it publishes, and when."""

from __future__ import annotations

import json
import signal
import ssl
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
from ingestrun.model.pool import Fetched, Report, ReportOutcome

from .pool_operator import BASE, CHECK, Ask, PoolOperator, Served, Way
from .support import UID, Bench, Reply, Request, Site, page
from .test_main import spawn

HOOK = {"validate": {"columns": [{"name": "id", "type": "integer", "required": True}]}}
SINK = {"parquet": {"path": "data"}}
PAGE = 5
BAD = 7
"""Each seventh record has no id, and is rejected."""
_DONE = Report(batch=0, attempt=0, outcome=ReportOutcome.DONE, fetched=Fetched(read=0), written=0, rejected=0)


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
    claims = [ask.body for ask in pool.operator.asks if ask.kind == "claim"]
    assert [[report["batch"] for report in claim["reports"]] for claim in claims] == [[], [0], [1], [2]]
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


# --- a bad network, and an operator that is away


def unavailable(status: int, **headers: str) -> Way:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Way(instead=(status, {"error": "unavailable"}, named))


BAD_WAYS = {
    "lost on the way": lambda: Way(lose_request=True),
    "answer lost": lambda: Way(lose_answer=True),
    "sent twice": lambda: Way(twice=True),
    "late": lambda: Way(before=lambda: time.sleep(0.3)),
    "503": lambda: unavailable(503),
    "503 with a time": lambda: unavailable(503, retry_after="0.05"),
    "429": lambda: unavailable(429, retry_after="0.05"),
    "404 of a proxy": lambda: Way(instead=(404, {"kind": "Status"}, {})),
    "409 of a proxy": lambda: Way(instead=(409, {}, {})),
    "redirected": lambda: Way(instead=(302, {}, {"location": "http://127.0.0.1:1/"})),
    "200 of a proxy": lambda: Way(instead=(200, {}, {})),
}


@pytest.mark.parametrize("kind", BAD_WAYS)
def test_a_network_that_fails_at_every_request(pool: Pool, kind: str) -> None:
    """Each request meets it twice, then comes through."""
    met: dict[str, int] = {}

    def way(ask: Ask) -> Way:
        content = json.dumps([ask.kind, ask.body])
        met[content] = met.get(content, 0) + 1
        return BAD_WAYS[kind]() if met[content] <= 2 else Way()

    pool.operator.way = way
    code, log = pool.run()
    assert code == 0
    pool.assert_complete()
    assert [report.attempt for report in pool.operator.reports()] == [0, 0, 0]
    assert [line["batch"] for line in events(log, "batch claimed")] == ["0", "1", "2"], "nothing is done twice"


def test_an_operator_that_goes_away_and_comes_back(pool: Pool) -> None:
    """The worker goes on with what it holds, and asks again for what it needs."""

    def before_page(offset: int) -> None:
        if offset == 10:
            pool.served.stop()

    pool.before_page = before_page
    process = pool.start()
    _wait_for(lambda: pool.served.away)
    time.sleep(1)  # it has everything ready, and asks a stopped operator for the permission
    assert pool.ids() == kept(10)
    pool.served.start()
    code, log = end_of(process)
    assert code == 0
    pool.assert_complete()
    assert [report.attempt for report in pool.operator.reports()] == [0, 0, 0]
    assert len(events(log, "worker starts")) == 1


def first_lines(process: subprocess.Popen[str], number: int) -> list[dict[str, Any]]:
    """The log's first lines, as soon as they are there."""
    assert process.stdout is not None
    return [json.loads(process.stdout.readline()) for _ in range(number)]


def test_an_operator_that_was_not_there_at_the_start(pool: Pool) -> None:
    pool.served.stop()
    process = pool.start()
    first = first_lines(process, 2)
    assert [line["event"] for line in first] == ["worker starts", "the operator gives no answer, asking again"]
    pool.served.start()
    code, log = end_of(process)
    assert code == 0
    assert events(log, "the operator gives no answer, asking again") == []
    pool.assert_complete()


def test_without_a_long_poll_the_check_is_asked_once_a_second(pool: Pool) -> None:
    pool.operator.long_poll = False
    pool.before_page = lambda _offset: time.sleep(0.25)
    began = time.monotonic()
    assert pool.run()[0] == 0
    pool.assert_complete()
    assert 1 <= pool.operator.checks <= 2 + time.monotonic() - began


# --- kills

POINTS = [("claim", 0), ("fetched", 0), ("publish", 0), ("claim", 1), ("fetched", 1), ("publish", 1), ("claim", 2)]


@pytest.mark.parametrize("seen", [False, True], ids=["before", "after"])
@pytest.mark.parametrize(("kind", "nth"), POINTS)
def test_a_worker_that_is_killed_at_any_request(pools: Callable[..., Pool], kind: str, nth: int, seen: bool) -> None:
    """Another attempt at the worker goes on: every batch is published once, by a permission that was given before."""
    pool = pools(total=13)

    def kill() -> None:
        pool.processes[0].kill()
        pool.processes[0].wait(30)

    def way(ask: Ask) -> Way:
        if (ask.kind, ask.nth, ask.worker) != (kind, nth, "worker-0-0"):
            return Way()
        return Way(after=kill, lose_answer=True) if seen else Way(before=kill, lose_request=True)

    pool.operator.way = way
    killed = end_of(pool.start())[0] == -signal.SIGKILL
    assert killed or kind == "fetched", "a batch that is done at once sends no cursor before"
    if killed:
        pool.operator.replace("worker-0-0")
        assert pool.run(0, 1)[0] == 0
    pool.assert_complete()


FAULTY_LINK = """
import os, signal, sys
real, when, number = os.link, sys.argv[1], {signal}
def link(source, target):
    if when == "before":
        os.kill(os.getpid(), number)
    real(source, target)
    if when == "after":
        os.kill(os.getpid(), number)
os.link = link
from ingestrun.worker.main import main
main()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_worker_that_is_killed_at_its_commit(pools: Callable[..., Pool], when: str) -> None:
    pool = pools(total=13)
    code, _ = pool.run(0, 0, "-c", FAULTY_LINK.format(signal="signal.SIGKILL"), when)
    assert code == -signal.SIGKILL
    assert pool.ids() == ([] if when == "before" else kept(10))
    pool.operator.replace("worker-0-0")
    assert pool.run(0, 1)[0] == 0
    assert pool.operator.batches[0].permitted == {0, 1}
    pool.assert_complete()


def test_a_worker_that_comes_back_after_it_was_replaced(pool: Pool) -> None:
    """A zombie: it was cut off while it had everything ready, and its batch is another's by now."""
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        held.set()
        release.wait(30)

    def way(ask: Ask) -> Way:
        if ask.kind == "publish" and ask.worker == "worker-0-0" and not held.is_set():
            return Way(before=hold, lose_request=True)
        return Way()

    pool.operator.way = way
    zombie = pool.start(0, 0)
    assert held.wait(30)
    pool.operator.replace("worker-0-0")
    assert pool.run(0, 1)[0] == 0
    release.set()
    code, log = end_of(zombie)
    assert code == 0
    assert "another worker has taken this one's place" in events(log, "worker ends")[0]["message"]
    pool.assert_complete()


SLOW_HOOK = """
import time
from ingestrun.worker.validate import ValidateLink
real = ValidateLink.tables
def tables(self):
    if str(self._quarantine.directory).endswith("-0"):  # the first attempt
        time.sleep(60)
    yield from real(self)
ValidateLink.tables = tables
from ingestrun.worker.main import main
main()
"""


def test_a_fetch_that_is_not_accepted_ends_the_batch_at_once(pool: Pool) -> None:
    def give_back() -> None:
        with pool.operator.lock:
            pool.operator._give_back("worker-0-0")

    pool.operator.way = lambda ask: Way(before=give_back) if (ask.kind, ask.nth) == ("fetched", 0) else Way()
    pool.total = 8
    code, log = pool.run(0, 0, "-c", SLOW_HOOK)
    assert code == 0
    assert len(events(log, "the batch is not this worker's any more, skipping")) == 1
    assert pool.operator.batches[0].permitted == {1}
    pool.assert_complete()


@pytest.mark.parametrize("kind", ["fetched", "publish"])
def test_a_batch_that_was_given_to_another_attempt_is_abandoned(pool: Pool, kind: str) -> None:
    """Nothing is reported of it, and the worker claims another."""

    def give_back() -> None:
        with pool.operator.lock:
            pool.operator._give_back("worker-0-0")

    pool.operator.way = lambda ask: Way(before=give_back) if (ask.kind, ask.nth) == (kind, 0) else Way()
    code, log = pool.run()
    assert code == 0
    assert events(log, "the batch is not this worker's any more, skipping")[0]["batch"] == "0"
    assert [(report.batch, report.attempt) for report in pool.operator.reports()] == [(0, 1), (1, 0), (2, 0)]
    pool.assert_complete()


@pytest.mark.parametrize(
    ("answer", "code", "words"),
    [
        ((404, {"error": "gone", "message": "the run is gone"}), 0, "the run is gone"),
        ((409, {"error": "replaced"}), 0, "taken this one's place"),
        ((401, {"error": "unauthorized"}), 1, "refuses"),
        ((403, {"error": "forbidden"}), 1, "refuses"),
        ((413, {"error": "too-large"}), 1, "refuses"),
        ((422, {"error": "invalid"}), 1, "refuses"),
        ((200, {"claim": {"batch": -1}}), 1, "not of this protocol"),
    ],
)
@pytest.mark.parametrize("kind", ["claim", "publish"])
def test_answers_that_end_a_worker(
    pool: Pool, kind: str, answer: tuple[int, dict[str, Any]], code: int, words: str
) -> None:
    pool.operator.way = lambda ask: Way(instead=(*answer, {})) if ask.kind == kind else Way()
    ended, log = pool.run()
    assert ended == code
    assert words in events(log, "worker ends")[0]["message"]
    assert "worker-0" not in json.dumps(log)
    pool.assert_nothing_published()


# --- cancel

CANCELS = [(kind, nth, seen) for kind, nth in POINTS[:6] for seen in (False, True)]


@pytest.mark.parametrize(("kind", "nth", "seen"), CANCELS)
def test_a_cancel_at_any_request(pools: Callable[..., Pool], kind: str, nth: int, seen: bool) -> None:
    pool = pools(total=13)

    def way(ask: Ask) -> Way:
        if (ask.kind, ask.nth) != (kind, nth):
            return Way()
        return Way(after=pool.operator.cancel) if seen else Way(before=pool.operator.cancel)

    pool.operator.way = way
    code, log = pool.run()
    assert code == 0
    assert pool.operator.violations == []
    assert (pool.operator.cancelled is not None) or kind == "fetched"
    done = [report.batch for report in pool.operator.reports("done")]
    permitted = {number for number, batch in pool.operator.batches.items() if batch.permitted}
    assert set(done) <= permitted
    # The cancel may be heard before the permission, which was given a moment earlier.
    assert permitted - set(done) <= ({nth} if (kind, seen) == ("publish", True) else set())
    assert pool.ids() == [n for number in done for n in kept(min(13, 10 * number + 10), 10 * number)]
    assert pool.leftovers() == []
    begun = {line["batch"] for line in events(log, "batch claimed")}
    skipped = {line["batch"]: line for line in events(log, "ingest run cancelled, skipping")}
    assert skipped.keys() == begun - {str(number) for number in done}
    assert all(line["stage"] in ("fetch", "hook", "publish") for line in skipped.values())
    assert {str(report.batch) for report in pool.operator.reports("cancelled")} == skipped.keys()
    assert "cancelled" in events(log, "worker ends")[0]["message"] or kind == "fetched"


@pytest.mark.parametrize(("kind", "command"), [("fetched", ("-c", SLOW_HOOK)), ("publish", ())])
def test_a_cancel_is_heard_from_the_answers_alone(pool: Pool, kind: str, command: tuple[str, ...]) -> None:
    """As where the cancellation check can't be reached."""
    pool.operator.way = lambda ask: Way(before=pool.operator.cancel) if ask.kind == kind else Way()
    code, log = pool.run(0, 0, *command, cancellation_url="")
    assert code == 0
    assert pool.operator.checks == 0
    (line,) = events(log, "ingest run cancelled, skipping")
    assert line["batch"] == "0"
    assert [report.outcome for report in pool.operator.reports()] == ["cancelled"]
    pool.assert_nothing_published()


def test_cancelled_before_the_claim_nothing_is_read(pool: Pool) -> None:
    pool.operator.cancel()
    assert pool.run()[0] == 0
    assert pool.site.requests == []
    assert pool.operator.kinds() == ["claim"]
    assert pool.message() == "0 batches done: the run is cancelled"


def test_a_cancel_does_not_wait_for_a_source_that_hangs(pool: Pool) -> None:
    hang = threading.Event()

    def before_page(offset: int) -> None:
        if offset == 15:
            pool.operator.cancel()
            hang.wait(30)

    pool.before_page = before_page
    code, log = pool.run()
    assert not hang.is_set()
    hang.set()
    assert code == 0
    (line,) = events(log, "ingest run cancelled, skipping")
    assert (line["batch"], line["stage"], line["why"]) == (
        "1",
        "fetch",
        "the run is cancelled, stopped after 5 of 10 rows",
    )
    assert pool.ids() == kept(10)
    assert [report.outcome for report in pool.operator.reports()] == ["done", "cancelled"]


def test_a_cancel_reaches_a_worker_that_waits_for_work(pools: Callable[..., Pool]) -> None:
    """Another has the only batch."""
    pool = pools(partitions=["a"])
    pool.operator.batches[0].holder = "worker-9-0"
    process = pool.start()
    _wait_for(lambda: pool.operator.kinds() == ["claim"])
    pool.operator.cancel()
    assert end_of(process, 30)[0] == 0


# --- SIGTERM


def test_sigterm_while_a_page_is_read(pool: Pool) -> None:
    reached, hang = threading.Event(), threading.Event()

    def before_page(offset: int) -> None:
        if offset == 15:
            reached.set()
            hang.wait(30)

    pool.before_page = before_page
    process = pool.start()
    assert reached.wait(30)
    process.terminate()
    code, _ = end_of(process, 30)
    hang.set()
    assert code == 143
    assert [report.outcome for report in pool.operator.reports()] == ["done", "stopped"]
    assert pool.operator.leaving == {"worker-0-0": "stopped by SIGTERM"}
    assert pool.ids() == kept(10)
    assert pool.message() == "stopped by SIGTERM"
    pool.before_page = lambda _offset: None
    assert pool.run(0, 1)[0] == 0
    pool.assert_complete()


def test_sigterm_while_there_is_no_answer_about_the_permission(pool: Pool) -> None:
    pool.operator.way = lambda ask: unavailable(503, retry_after="0.05") if ask.kind == "publish" else Way()
    process = pool.start()
    _wait_for(lambda: pool.operator.kinds().count("publish") >= 3)
    process.terminate()
    assert end_of(process, 30)[0] == 143
    assert [report.outcome for report in pool.operator.reports()] == ["stopped"]
    pool.assert_nothing_published()


@pytest.mark.parametrize("when", ["before", "after"])
def test_sigterm_after_the_permission_does_not_stop_the_commit(pool: Pool, when: str) -> None:
    code, _ = pool.run(0, 0, "-c", FAULTY_LINK.format(signal="signal.SIGTERM"), when)
    assert code == 143
    assert [report.outcome for report in pool.operator.reports()] == ["done"]
    assert pool.ids() == kept(10)
    assert pool.run(0, 1)[0] == 0
    pool.assert_complete()


def test_sigterm_without_an_operator_ends_soon(pool: Pool) -> None:
    reached = threading.Event()

    def before_page(_offset: int) -> None:
        pool.served.stop()
        reached.set()
        time.sleep(30)

    pool.before_page = before_page
    process = pool.start()
    assert reached.wait(30)
    process.terminate()
    assert end_of(process, 30)[0] == 143
    pool.assert_nothing_published()


def test_sigterm_while_waiting_for_work(pools: Callable[..., Pool]) -> None:
    pool = pools(partitions=["a"])
    pool.operator.batches[0].holder = "worker-9-0"
    process = pool.start()
    _wait_for(lambda: pool.operator.kinds() == ["claim"])
    process.terminate()
    assert end_of(process, 30)[0] == 143
    assert pool.operator.leaving == {"worker-0-0": "stopped by SIGTERM"}


def test_sigterm_while_waiting_for_more_work(pools: Callable[..., Pool]) -> None:
    """After a batch, with its report handed in."""
    pool = pools(partitions=["0", "9"], limit=None)
    pool.operator.batches[1].holder = "worker-9-0"
    source = {"http": {"url": pool.site.url + "/{partition}", "pageSize": PAGE, "pagination": {"offset": {}}}}
    process = pool.start(partitions=2, config_0=json.dumps(source))
    _wait_for(lambda: pool.operator.batches[0].done)
    process.terminate()
    assert end_of(process, 30)[0] == 143
    assert pool.operator.violations == []
    assert pool.operator.leaving == {"worker-0-0": "stopped by SIGTERM"}


# --- batches that fail, deadlines, recycling


def test_a_batch_that_fails_by_its_data_leaves_the_worker_alive(pools: Callable[..., Pool]) -> None:
    pool = pools(partitions=["a", "b", "c"], limit=None)
    source = {
        "http": {
            "url": pool.site.url + "/{partition}",
            "pageSize": PAGE,
            "pagination": {"offset": {}},
        }
    }
    pool.site.answer = lambda request: Reply(404) if request.path == "/b" else pool.source(request)
    code, log = pool.run(partitions=3, config_0=json.dumps(source))
    assert code == 0
    assert pool.operator.violations == []
    done, failed = pool.operator.reports("done"), pool.operator.reports("failed")
    assert [report.batch for report in done] == [0, 2]
    (report,) = failed
    assert (report.batch, report.stage, report.permanent, report.fetched) == (1, "fetch", True, None)
    assert "HTTP 404" in (report.message or "")
    assert pool.ids() == kept(22) * 2
    assert pool.operator.kinds().count("fetched") == 0, "a partition has no chain that waits for it"
    assert events(log, "worker ends")[0]["batches"] == 3


def test_a_failure_that_may_pass_is_another_attempt(pool: Pool) -> None:
    pages = 0

    def answer(request: Request) -> Reply:
        nonlocal pages
        pages += 1
        return Reply(200, b"{") if pages == 2 else pool.source(request)

    pool.site.answer = answer
    assert pool.run()[0] == 0
    pool.assert_complete()
    (failed,) = pool.operator.reports("failed")
    assert (failed.batch, failed.attempt, failed.permanent, failed.fetched) == (0, 0, False, None)
    assert pool.operator.batches[0].reports.keys() == {0, 1}


def test_too_many_rejected_rows_are_kept_and_nothing_is_published(pool: Pool) -> None:
    hook = {"validate": {**HOOK["validate"], "maxRejected": 1}}
    code, _ = pool.run(config_1=json.dumps(hook))
    assert code == 0
    (report,) = pool.operator.reports("failed")
    assert (report.batch, report.stage, report.permanent, report.rejected) == (0, "hook check", True, 2)
    assert report.fetched is not None
    assert report.fetched.read == 10
    assert pool.ids() == kept(22, 10), "the chain goes on"
    kept_rows = pq.read_table(pool.bench.workspace / "rejects" / "0-check-0").to_pylist()
    assert [(row["name"], row["_reason"], row["_batch"]) for row in kept_rows] == [
        ("row 0", "id: missing", 0), ("row 7", "id: missing", 0),
    ]  # fmt: skip


def test_a_stage_that_takes_longer_than_its_deadline(pool: Pool) -> None:
    """The batch fails, and the worker goes on."""
    pool.stages[0]["deadlineSeconds"] = 3
    hang = threading.Event()
    slow = iter([True])

    def before_page(offset: int) -> None:
        if offset == 15 and next(slow, False):
            hang.wait(30)

    pool.before_page = before_page
    code, log = pool.run()
    hang.set()
    assert code == 0
    (failed,) = pool.operator.reports("failed")
    assert (failed.batch, failed.stage, failed.reason) == (1, "fetch", "DeadlineExceeded")
    assert failed.message == "took longer than its deadline of 3 s"
    assert len(events(log, "worker starts")) == 1
    pool.assert_complete()


def test_the_time_that_the_operator_needs_counts_for_no_deadline(pool: Pool) -> None:
    for stage in pool.stages:
        stage["deadlineSeconds"] = 3
    late = iter([True])
    pool.operator.way = lambda ask: (
        Way(before=lambda: time.sleep(4)) if ask.kind == "publish" and next(late, False) else Way()
    )
    assert pool.run()[0] == 0
    assert pool.operator.reports("failed") == []
    pool.assert_complete()


DEAF = """
import signal, time
from ingestrun.worker.pool import course
from ingestrun.worker.validate import RuleChecker
course.GRACE_SECONDS = 0.3
def split(self, table):
    # As a library does that takes no signal until it returns.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGUSR1])
    time.sleep(60)
RuleChecker.split = split
from ingestrun.worker.main import main
main()
"""


def test_a_stage_that_can_not_be_interrupted_ends_the_worker(pool: Pool) -> None:
    pool.stages[1]["deadlineSeconds"] = 2
    code, log = pool.run(0, 0, "-c", DEAF)
    assert code == 1
    (failed,) = pool.operator.reports()
    assert (failed.outcome, failed.stage, failed.reason) == ("failed", "hook check", "DeadlineExceeded")
    assert pool.operator.leaving == {"worker-0-0": "hook check hangs"}
    assert "took longer than its deadline of 2 s" in pool.message()
    assert events(log, "stage hangs, the worker ends")[0]["hook"] == "check"
    assert pool.ids() == []
    assert pool.run(0, 1)[0] == 0
    pool.assert_complete()


def test_a_worker_is_recycled(pool: Pool) -> None:
    """It says so with its last report, and is given nothing in the same answer."""
    for attempt in range(3):
        code, log = pool.run(0, attempt, max_batches=1)
        assert code == 0
        assert len(events(log, "batch claimed")) == 1
        assert pool.operator.leaving[f"worker-0-{attempt}"] == "recycled after 1 batch"
        assert pool.message() == "1 batch done: recycled after 1 batch"
    pool.assert_complete()


def test_a_worker_that_has_lived_for_long_is_recycled(pool: Pool) -> None:
    code = """
from ingestrun.worker.pool import worker
real = worker.PoolWorker.__init__
def init(self, *given):
    real(self, *given)
    self._began -= 3600
worker.PoolWorker.__init__ = init
from ingestrun.worker.main import main
main()
"""
    ended, log = pool.run(0, 0, "-c", code, max_seconds=3600)
    assert ended == 0
    assert events(log, "worker ends")[0]["message"] == "recycled after 3600 s"
    assert len(events(log, "batch claimed")) == 1
    assert pool.run(0, 1, max_seconds=3600)[0] == 0
    pool.assert_complete()


def test_a_worker_that_has_grown_is_recycled(pool: Pool) -> None:
    code = """
from ingestrun.worker.pool import worker
sizes = iter(100 * n * 2**20 for n in (1, 2, 3, 4, 9))
last = 0
def resident():
    return last
real = worker.MemoryBound.add_batch
def add_batch(self, _resident):
    global last
    last = next(sizes)
    real(self, last)
worker.MemoryBound.add_batch = add_batch
worker.resident_bytes = resident
from ingestrun.worker.main import main
main()
"""
    pool.total = 100
    ended, log = pool.run(0, 0, "-c", code)
    assert ended == 0
    assert events(log, "worker ends")[0]["message"] == "recycled: memory has grown from 300 to 900 MiB in 5 batches"
    assert len(events(log, "batch claimed")) == 5
    assert pool.run(0, 1)[0] == 0
    pool.assert_complete()


# --- TLS


def certificate(directory: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate for loopback that signs itself, and the server's context with it."""
    cert, key = directory / f"{name}.pem", directory / f"{name}.key"
    subject = ["-subj", f"/CN={name}", "-addext", "subjectAltName=IP:127.0.0.1"]
    kind = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command = ["openssl", *kind, *subject, "-keyout", str(key), "-out", str(cert)]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return cert, context


def test_the_operator_is_known_by_its_certificate(pool: Pool, tmp_path: Path) -> None:
    cert, context = certificate(tmp_path, "ours")
    pool.served = Served(pool.operator, context)
    assert pool.run(pool_ca=cert.read_text(), cancellation_ca=cert.read_text())[0] == 0
    assert pool.operator.checks > 0
    pool.assert_complete()


def test_another_server_gets_no_token(pool: Pool, tmp_path: Path) -> None:
    """Neither one whose certificate another authority has signed, nor one that no authority of the system's has."""
    _, context = certificate(tmp_path, "ours")
    other, _ = certificate(tmp_path, "other")
    pool.served = Served(pool.operator, context)
    for authorities in (other.read_text(), ""):
        process = pool.start(pool_ca=authorities)
        first = first_lines(process, 2)
        process.terminate()
        assert end_of(process, 30)[0] == 143
        assert "CERTIFICATE_VERIFY_FAILED" in events(first, "the operator gives no answer, asking again")[0]["why"]
    assert pool.operator.asks == []


# --- the environment, and the start


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"INGEST_POOL_TOKEN": ""}, "INGEST_POOL_TOKEN is not set"),
        ({"INGEST_STAGES": "[]"}, "has to begin with fetch and end with publish"),
        ({"INGEST_STAGES": '[{"stage": "x"}]'}, "INGEST_STAGES is not valid: 0.stage"),
        ({"INGEST_CONFIG_2": ""}, "INGEST_CONFIG_2 is not set, stage publish needs it"),
        ({"INGEST_MAX_BATCHES": "0"}, "INGEST_MAX_BATCHES is '0'"),
    ],
)
def test_an_environment_that_makes_no_sense(pool: Pool, change: dict[str, str], words: str) -> None:
    code, _ = end_of(spawn(pool.env(0) | change))
    assert code == 65
    assert words in pool.message()
    assert pool.operator.asks == []


def test_a_sink_in_the_workspace_needs_one(pool: Pool) -> None:
    env = pool.env(0)
    del env["INGEST_WORKSPACE"]
    assert end_of(spawn(env))[0] == 0
    (report,) = pool.operator.reports()
    assert (report.outcome, report.stage, report.permanent) == ("failed", "publish", True)
    assert report.message == "INGEST_WORKSPACE is not set, stage publish needs it"


LOADED = """
import atexit, json, sys
from ingestrun.worker.main import main
atexit.register(lambda: print(json.dumps({"event": "loaded", "all": list(sys.modules)})))
main()
"""


def test_what_is_loaded_before_the_first_claim(pool: Pool) -> None:
    """Each package costs as much as all that a claim needs."""
    pool.operator.batches[0].reports[0] = _DONE
    ended, log = pool.run(0, 0, "-c", LOADED)
    assert ended == 0
    assert pool.operator.kinds() == ["claim"]
    loaded = set(events(log, "loaded")[0]["all"])
    assert "ingestrun.worker.pool.worker" in loaded
    assert not loaded & {"pyarrow", "httpx", "fsspec", "numpy", "asyncio"}
