"""`python -m dev.bench.pipeline`: the demo's ingest by one process of a pool, and by three processes a batch.

Both read the same data from a server on loopback and publish it to a temporary directory; the operator's side of the
pool is the one of the unit tests, which answers at once. Prints rows per second of wall-clock time and the CPU time of
the worker's processes, in the best of ROUNDS. It fails only if rows are missing.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.request import urlopen

import pyarrow.dataset as ds
import yaml
from tests.unit.worker.pool_operator import BASE, CHECK, PoolOperator, Served
from tests.unit.worker.support import UID

from ingestrun.model.contract import parse_result

ROOT: Final = Path(__file__).parents[2]
RUN: Final = ROOT / "dev" / "demo" / "runs" / "flights.yaml"
ROWS: Final = 336_776
ROUNDS: Final = 3
_START_SECONDS: Final = 30
_HEADER: Final = (
    "year,month,day,dep_time,sched_dep_time,dep_delay,arr_time,sched_arr_time,arr_delay,"
    "carrier,flight,tailnum,origin,dest,air_time,distance,hour,minute,time_hour"
)


@dataclass(frozen=True)
class Cost:
    """The cost of a whole ingest."""

    seconds: float
    cpu: float
    processes: int

    def line(self, name: str, rows: int) -> str:
        """Return it as a line of the report."""
        per_second = f"{rows / self.seconds:,.0f} rows/s"
        return f"{name}: {self.seconds:.2f} s, {per_second}, {self.cpu:.2f} s CPU, {self.processes} processes"


def flights(rows: int) -> str:
    """Make up flights: the columns of the demo's data, of which some values are missing."""
    lines = [_HEADER]
    carriers, airports = ("UA", "AA", "B6", "DL", "EV"), ("EWR", "LGA", "JFK")
    for n in range(rows):
        month, day, hour = 1 + n * 12 // rows, 1 + n % 28, 5 + n % 18
        late = "NA" if n % 40 == 0 else str(n % 130 - 20)
        at = "NA" if n % 40 == 0 else str(100 * hour + n % 60)
        lines.append(
            f"2013,{month},{day},{at},{100 * hour},{late},{at},{100 * hour + 55},{late},{carriers[n % 5]},{n % 6000},"
            f"N{10_000 + n % 4000},{airports[n % 3]},{airports[(n + 1) % 3]},{late},{200 + n % 2400},{hour},{n % 60},"
            f"2013-{month:02d}-{day:02d}T{hour:02d}:00:00Z"
        )
    return "\n".join(lines) + "\n"


@contextmanager
def source(data: Path) -> Iterator[str]:
    """Serve the data as the demo does; yield the URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(  # noqa: S603 - the demo's own server
        [sys.executable, "-m", "dev.demo.source_server", "--data", str(data), "--port", str(port)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/healthz").close()
                break
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        yield f"http://127.0.0.1:{port}/flights"
    finally:
        server.terminate()
        server.wait()


def stages(url: str) -> tuple[list[tuple[str, str, Any]], int]:
    """Return the stages of the demo's run with their configurations, and its batches' size."""
    spec = yaml.safe_load(RUN.read_text())["spec"]
    spec["source"]["http"]["url"] = url
    hooks = [("hook", hook["name"], {"validate": hook["validate"]}) for hook in spec["hooks"]]
    found = [("fetch", "fetch", spec["source"]), *hooks, ("publish", "publish", spec["sink"])]
    return found, spec["batches"]["size"]


def in_one_process(url: str, workspace: Path) -> Cost:
    """Ingest by a worker of a pool."""
    found, size = stages(url)
    served = Served(PoolOperator(limit=size))
    served.operator.visible = lambda batch: (workspace / "flights" / f"{UID}-{batch:06d}.parquet").exists()
    env = {
        "INGEST_POOL_URL": served.url + BASE,
        "INGEST_POOL_TOKEN": "worker-0-0",
        "INGEST_CANCELLATION_URL": served.url + CHECK,
        "INGEST_CANCELLATION_TOKEN": "worker-0-0",
        "INGEST_STAGES": json.dumps([{"stage": stage, "name": name} for stage, name, _ in found]),
        "INGEST_REJECTS": str(workspace / "rejects"),
        **{f"INGEST_CONFIG_{index}": json.dumps(config) for index, (_, _, config) in enumerate(found)},
    }
    try:
        return _measure(lambda run: run(env), workspace)
    finally:
        served.stop()


def stage_by_stage(url: str, workspace: Path) -> Cost:
    """Ingest by a process for each stage of each batch, one after another, as their pods would do it."""
    found, size = stages(url)

    def ingest(run: Callable[[dict[str, str]], None]) -> None:
        told: dict[str, str] = {}
        batch, exhausted = 0, False
        while not exhausted:
            before = ""
            for step, (stage, name, config) in enumerate(found):
                after = f"{workspace}/.ingestrun/{batch}/{step}"
                env = {
                    "INGEST_STAGE": stage,
                    "INGEST_BATCH": str(batch),
                    "INGEST_HOOK": name,
                    "INGEST_CONFIG": json.dumps(config),
                    "INGEST_INPUT": before,
                    "INGEST_OUTPUT": after,
                    "INGEST_REJECTS": f"{after}-rejects",
                    "INGEST_LIMIT": str(size),
                    "INGEST_IDEMPOTENCY_KEY": f"{UID}/{batch}",
                }
                run(env | told)
                if step == 0:
                    result = parse_result((workspace / "result").read_text())
                    exhausted = result.exhausted
                    following = {"INGEST_CURSOR": result.next_cursor or "", "INGEST_STATE": result.state or ""}
                before = after
            told = following
            batch += 1

    return _measure(ingest, workspace)


def _measure(ingest: Callable[[Callable[[dict[str, str]], None]], None], workspace: Path) -> Cost:
    base = {
        "PATH": os.environ["PATH"],
        "PYTHONPATH": str(ROOT / "operator"),
        "INGEST_CONTRACT": "v1",
        "INGEST_RUN_UID": UID,
        "INGEST_WORKSPACE": str(workspace),
        "INGEST_TERMINATION_MESSAGE_PATH": str(workspace / "result"),
    }
    cpu, processes = 0.0, 0

    def run(env: dict[str, str]) -> None:
        nonlocal cpu, processes
        process = subprocess.Popen(
            [sys.executable, "-m", "ingestrun.worker"], env=base | env, stdout=subprocess.DEVNULL
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"the worker ended with {process.returncode}: {(workspace / 'result').read_text()}")
        cpu += usage.ru_utime + usage.ru_stime
        processes += 1

    began = time.monotonic()
    ingest(run)
    return Cost(time.monotonic() - began, cpu, processes)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="how many flights to make up")
    parser.add_argument("--data", type=Path, help="a CSV file of flights in their place")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    given = parser.parse_args()
    ways = {"three processes a batch": stage_by_stage, "one process": in_one_process}
    with tempfile.TemporaryDirectory() as temporary:
        data = given.data or Path(temporary, "flights.csv")
        if given.data is None:
            data.write_text(flights(given.rows))
        costs: dict[str, list[Cost]] = {name: [] for name in ways}
        rows = data.read_bytes().count(b"\n") - 1
        with source(data) as url:
            for number in range(given.rounds):
                for name, way in ways.items():
                    workspace = Path(temporary, f"{number}-{way.__name__}")
                    workspace.mkdir()
                    costs[name].append(way(url, workspace))
                    published = ds.dataset(sorted((workspace / "flights").glob("*.parquet"))).count_rows()
                    if published != rows:
                        raise SystemExit(f"{name}: {published} rows published, {rows} served")
    print(f"{rows:,} rows, best of {given.rounds}; load average {os.getloadavg()[0]:.1f}")  # noqa: T201
    for name, found in costs.items():
        print(min(found, key=lambda cost: cost.seconds).line(name, rows))  # noqa: T201


if __name__ == "__main__":
    main()
