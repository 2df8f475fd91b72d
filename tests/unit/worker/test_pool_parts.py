"""The parts of a pool's worker by themselves: messages, settings, pauses, memory."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from ingestrun.model import pool
from ingestrun.model.pool import Claim, ClaimAnswer, ClaimRequest, Fetched, Report, ReportOutcome
from ingestrun.model.worker import FilesSource
from ingestrun.worker.context import read_context
from ingestrun.worker.errors import PermanentError, SourceChangedError
from ingestrun.worker.file_source import FilesReader
from ingestrun.worker.pool.client import Backoff, NoAnswerError, _seconds
from ingestrun.worker.pool.memory import MemoryBound, limit_bytes
from ingestrun.worker.pool.settings import read_settings

MIB = 2**20
STAGES = [
    {"stage": "fetch", "name": "fetch", "deadlineSeconds": 60},
    {"stage": "hook", "name": "check"},
    {"stage": "publish", "name": "publish"},
]
ENV = {
    "INGEST_CONTRACT": "v1",
    "INGEST_POOL_URL": "http://operator/pool",
    "INGEST_POOL_TOKEN": "t",
    "INGEST_STAGES": json.dumps(STAGES),
    "INGEST_CONFIG_0": "{}",
    "INGEST_CONFIG_1": "{}",
    "INGEST_CONFIG_2": "{}",
    "INGEST_REJECTS": "/workspace/rejects",
    "INGEST_PARTITIONS": "3",
    "INGEST_PARTITION_FILE": "/workspace/list",
}
CLAIM = Claim(batch=8, attempt=1, cursor="c", limit=1000, state="s", source_digest="d", idempotency_key="uid/8")


def test_reports_of_the_largest_size_fit_into_a_request() -> None:
    """Even if every character of a text needs three bytes."""
    fetched = Fetched(read=2**53, next_cursor="…" * 512, state="s" * 112, source_digest="d" * 64)
    report = Report(
        batch=2**53,
        attempt=2**53,
        outcome=ReportOutcome.FAILED,
        fetched=fetched,
        stage="hook " + "n" * 63,
        reason="r" * 64,
        permanent=True,
        message="…" * pool.MESSAGE_MAX_CHARS,
        log="…" * pool.LOG_MAX_CHARS,
    )
    request = ClaimRequest(reports=(report,) * pool.REPORTS_MAX, wait_seconds=25, leaving="…" * 512)
    assert len(request.render()) < pool.BODY_MAX_BYTES


@pytest.mark.parametrize(
    "text",
    [
        '{"batch": 1, "attempt": 0, "outcome": "done", "fetched": {"read": 1}}',
        '{"batch": 1, "attempt": 0, "outcome": "failed", "message": "x"}',
        '{"batch": 1, "attempt": 0, "outcome": "failed", "stage": "hook", "message": "x"}',
        '{"batch": -1, "attempt": 0, "outcome": "stopped"}',
        '{"batch": 1, "attempt": 0, "outcome": "lost"}',
    ],
)
def test_reports_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="Report"):
        Report.model_validate_json(text)


@pytest.mark.parametrize("text", ["{}", '{"exit": "x", "wait": true}', '{"wait": false}', '{"cancelled": null}'])
def test_a_claim_has_one_answer(text: str) -> None:
    with pytest.raises(ValueError, match="ClaimAnswer"):
        ClaimAnswer.model_validate_json(text)


def test_each_stage_has_the_environment_that_its_own_container_would_have() -> None:
    settings = read_settings(ENV)
    fetch, hook, publish = (read_context(settings.stage_env(CLAIM, index)) for index in range(3))
    assert (fetch.batch, fetch.attempt, fetch.cursor, fetch.limit, fetch.state) == (8, 1, "c", 1000, "s")
    assert (fetch.source_digest, fetch.key, fetch.partitions, fetch.partition_file) == ("d", "uid/8", None, None)
    assert (hook.hook, hook.rejects) == ("check", Path("/workspace/rejects/8-check-1"))
    assert (fetch.hook, fetch.rejects, publish.hook, publish.rejects) == (None, None, None, None)
    assert fetch.workspace is None


def test_a_partition_is_told_of_their_number() -> None:
    claim = CLAIM.model_copy(update={"partition": True})
    context = read_context(read_settings(ENV).stage_env(claim, 0))
    assert (context.partitions, context.partition_file) == (3, Path("/workspace/list"))


def test_without_a_workspace_each_fetch_lists_the_files_again(tmp_path: Path) -> None:
    """And notices if they are not the same."""
    context = read_context(
        read_settings(ENV).stage_env(CLAIM.model_copy(update={"source_digest": None, "cursor": None}), 0)
    )
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("id\n1\n")
    source = FilesSource(path=f"{tmp_path}/*.csv")
    began = FilesReader(source, context)
    later = replace(context, source_digest=began.source_digest)
    assert FilesReader(source, later).source_digest == began.source_digest
    (tmp_path / "c.csv").write_text("id\n1\n")
    with pytest.raises(SourceChangedError, match=r"^the files are not those that the run began with"):
        FilesReader(source, later)
    with pytest.raises(PermanentError, match=r"'in/\*.csv' is in the workspace, and the run has none"):
        FilesReader(FilesSource(path="in/*.csv"), context)


def test_pauses_grow_to_a_bound_and_are_never_the_same_for_all() -> None:
    bounds = [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    several = [Backoff() for _ in range(20)]
    for bound in bounds:
        pauses = [backoff.pause(NoAnswerError("x")) for backoff in several]
        assert all(bound / 2 <= pause <= bound for pause in pauses)
        assert len(set(pauses)) > 1


def test_a_time_that_was_asked_for_is_kept() -> None:
    pauses = [Backoff().pause(NoAnswerError("x", 2.0)) for _ in range(50)]
    assert all(2.0 <= pause <= 2.4 for pause in pauses)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0.1", 0.1), ("3", 3.0), ("1e9", 60.0), ("-1", None), ("soon", None), (None, None), ("nan", None)],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert _seconds(text) == seconds


@pytest.mark.parametrize(("limit", "bound"), [(None, 356), (1000, 356), (400, 300), (120, 100)])
def test_memory_is_bounded_by_growth_and_by_the_limit(limit: int | None, bound: int) -> None:
    memory = MemoryBound(None if limit is None else limit * MIB)
    for resident in (500, 400, 100):
        assert memory.growth(10_000 * MIB) is None, "a first batch may need what it needs"
        memory.add_batch(resident * MIB)
    assert memory.growth(bound * MIB) is None
    assert memory.growth(bound * MIB + 1) == f"memory has grown from 100 to {bound} MiB in 3 batches"


@pytest.mark.parametrize(
    ("name", "text", "limit"),
    [
        ("memory.max", "max\n", None),
        ("memory.max", "1048576\n", MIB),
        ("memory/memory.limit_in_bytes", "9223372036854771712\n", None),
        ("memory/memory.limit_in_bytes", "1048576\n", MIB),
        ("another", "1", None),
    ],
)
def test_memory_limit_of_the_container(tmp_path: Path, name: str, text: str, limit: int | None) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert limit_bytes(tmp_path) == limit
