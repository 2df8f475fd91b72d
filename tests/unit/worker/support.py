"""A stage as the operator would run it, in this process, and a source on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ingestrun.model.contract import StageResult, parse_result
from ingestrun.worker.main import run
from ingestrun.worker.shutdown import Stop

UID = "6f0c1e1a-2b6d-4c7e-9a55-0d3f6b1c2d4e"


@dataclass
class Answer:
    """What one stage came to."""

    code: int
    result: StageResult | None

    @property
    def message(self) -> str:
        assert self.result is not None
        return self.result.message or ""


@dataclass
class Bench:
    """A workspace, and stages run on it."""

    workspace: Path

    def env(self, stage: str, config: object, *, batch: int = 0, attempt: int = 0, **more: object) -> dict[str, str]:
        base = {
            "INGEST_CONTRACT": "v1",
            "INGEST_RUN_NAME": "geo",
            "INGEST_RUN_NAMESPACE": "default",
            "INGEST_RUN_UID": UID,
            "INGEST_BATCH": str(batch),
            "INGEST_STAGE": stage,
            "INGEST_ATTEMPT": str(attempt),
            "INGEST_IDEMPOTENCY_KEY": f"{UID}/{batch}",
            "INGEST_CONFIG": config if isinstance(config, str) else json.dumps(config),
            "INGEST_WORKSPACE": str(self.workspace),
            "INGEST_TERMINATION_MESSAGE_PATH": str(self.termination),
        }
        if stage != "publish":
            base["INGEST_OUTPUT"] = str(self.dir(stage, batch, attempt))
        if stage == "hook":
            base["INGEST_INPUT"] = str(self.dir("fetch", batch, 0))
            base["INGEST_REJECTS"] = str(self.dir("rejects", batch, attempt))
        if stage == "publish":
            base["INGEST_INPUT"] = str(self.dir("fetch", batch, 0))
        return base | {f"INGEST_{name.upper()}": str(value) for name, value in more.items() if value is not None}

    @property
    def termination(self) -> Path:
        return self.workspace.parent / "termination-log"

    def dir(self, stage: str, batch: int = 0, attempt: int = 0) -> Path:
        return self.workspace / "runs" / UID / str(batch) / stage / str(attempt)

    def run(self, stage: str, config: object, stop: Stop | None = None, **more: Any) -> Answer:
        self.termination.unlink(missing_ok=True)
        code = run(self.env(stage, config, **more), stop or Stop())
        text = self.termination.read_text() if self.termination.exists() else None
        return Answer(code, parse_result(text) if text is not None else None)

    def rows(self, stage: str = "fetch", batch: int = 0, attempt: int = 0) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = pq.read_table(self.dir(stage, batch, attempt) / "data.parquet").to_pylist()
        return rows

    def schema(self, stage: str = "fetch", batch: int = 0) -> dict[str, str]:
        schema = pq.read_schema(self.dir(stage, batch) / "data.parquet")
        return {column.name: str(column.type) for column in schema}

    def hand_on(self, *tables: pa.Table, stage: str = "fetch", batch: int = 0) -> Path:
        directory = self.dir(stage, batch)
        directory.mkdir(parents=True)
        for index, table in enumerate(tables):
            pq.write_table(table, directory / f"part-{index}.parquet")
        return directory

    def chain(self, config: object, limit: int, most: int = 1000) -> list[list[dict[str, Any]]]:
        """All batches of a cursor chain; each fetch is told what the operator has from the one before."""
        batches, cursor = [], ""
        told: dict[str, Any] = {}
        for batch in range(most):
            answer = self.run("fetch", config, batch=batch, cursor=cursor, limit=limit, **told)
            assert answer.code == 0, answer
            assert answer.result is not None
            batches.append(self.rows(batch=batch))
            assert answer.result.read == answer.result.written == len(batches[-1]) <= limit
            if answer.result.exhausted:
                assert answer.result.next_cursor is None
                return batches
            assert answer.result.next_cursor
            cursor = answer.result.next_cursor
            told = {"state": answer.result.state, "source_digest": answer.result.source_digest}
        raise AssertionError("the chain has no end")


@dataclass
class Request:
    path: str
    params: dict[str, str]
    headers: dict[str, str]


@dataclass
class Reply:
    status: int = 200
    body: bytes = b"[]"
    headers: dict[str, str] = field(default_factory=dict)


def page(body: object, **headers: str) -> Reply:
    return Reply(200, json.dumps(body).encode(), {"content-type": "application/json", **headers})


@dataclass
class Site:
    """A server on loopback; `answer` is set by the test."""

    url: str
    answer: Callable[[Request], Reply] = lambda _request: Reply(404)
    requests: list[Request] = field(default_factory=list)
