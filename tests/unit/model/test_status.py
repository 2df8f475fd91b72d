"""The status: what is written is read the same, and it stays small however many batches there are."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tests.fakes.world import manifest

from ingestrun.model.base import KubeModel
from ingestrun.model.contract import CURSOR_MAX_CHARS, SOURCE_DIGEST_MAX_CHARS, STATE_MAX_CHARS
from ingestrun.model.ranges import IndexRanges
from ingestrun.model.resume import LandedRecords, UnpublishedBatch, mark_of_cursor
from ingestrun.model.run import IngestRun
from ingestrun.model.size_budget import (
    KEPT_FAILURES,
    KEPT_LOGS,
    LOG_BYTES,
    MAX_CHECKPOINTS,
    MAX_FAILED_BATCHES,
    MAX_IMAGE_PINS,
    MAX_PARALLELISM,
    MESSAGE_CHARS,
    NAMED_CHILDREN,
    SAVED_STATE_BYTES,
    STATUS_BYTES,
    UNPUBLISHED_FREE_BYTES,
)
from ingestrun.model.spec import MAX_PARTITIONS, CancellationPolicy
from ingestrun.model.status import (
    AfterEndStatus,
    BatchesStatus,
    CancellationStatus,
    Checkpoint,
    ChildrenStatus,
    Condition,
    ImagePin,
    IngestRunStatus,
    OnCancelStatus,
    Phase,
    RecordsStatus,
    ResumedByStatus,
    ResumedFromStatus,
    StageFailure,
)
from ingestrun.planner.batch.ledger import add_retries
from ingestrun.planner.status.writer import finish_status, fit_status, saved_state_bytes

Model = TypeVar("Model", bound=KubeModel)

CONDITIONS = ("Succeeded", "Finished", "Cancelled", "Drained", "Backpressured", "Reconciling", "Stalled")
NOW = datetime(2026, 11, 23, 3, 4, 5, tzinfo=UTC)

TIMES = st.datetimes(datetime(2020, 1, 1), datetime(2100, 1, 1)).map(lambda at: at.replace(microsecond=0, tzinfo=UTC))
RANGES = st.sets(st.integers(0, 10**6), max_size=20).map(IndexRanges)
COUNTS = st.integers(0, 2**53)
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)


def made(model: type[Model], **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Model]:
    """Like `st.builds`, which would fill in the aliases as well."""
    return st.fixed_dictionaries(fields).map(lambda given_fields: model(**given_fields))


STATUSES = made(
    IngestRunStatus,
    observed_generation=st.integers(-1, 10**6),
    phase=st.none() | st.sampled_from(Phase),
    conditions=st.lists(
        made(
            Condition,
            type=st.sampled_from(CONDITIONS),
            status=st.sampled_from(["True", "False", "Unknown"]),
            reason=st.just("Because"),
            message=TEXT,
            last_transition_time=TIMES,
            observed_generation=st.none() | st.integers(0, 100),
        ),
        max_size=7,
    ),
    batches=made(
        BatchesStatus,
        claimed=RANGES,
        fetched=RANGES,
        published=RANGES,
        failed=RANGES,
        replay=RANGES,
        unpublished=st.lists(
            made(
                UnpublishedBatch,
                batch=COUNTS,
                cursor=TEXT,
                read=COUNTS,
                next=st.none() | TEXT.map(lambda text: text[:16]),
            ),
            max_size=3,
        ),
        checkpoints=st.lists(
            made(Checkpoint, batch=COUNTS, stage=st.none() | COUNTS, written=st.none() | COUNTS), max_size=3
        ),
        active=COUNTS,
        exhausted=st.booleans(),
        progress=TEXT,
    ),
    records=made(RecordsStatus, fetched=COUNTS, rejected=COUNTS, published=COUNTS),
    cursor=st.none() | TEXT,
    cursor_state=st.none() | TEXT,
    cursor_mark=st.none() | TEXT,
    source_digest=st.none() | TEXT,
    failures=st.lists(
        made(StageFailure, batch=COUNTS, stage=TEXT, attempt=COUNTS, reason=TEXT, message=TEXT, time=TIMES),
        max_size=3,
    ),
    images=st.lists(made(ImagePin, steps=RANGES, image=st.none() | TEXT, digest=st.none() | TEXT), max_size=3),
    start_time=st.none() | TIMES,
    completion_time=st.none() | TIMES,
    duration=st.none() | TEXT,
    last_progress_time=st.none() | TIMES,
    cancellation=st.none()
    | made(
        CancellationStatus,
        reason=st.none() | TEXT,
        requested_by=st.none() | TEXT,
        accepted_at=TIMES,
        in_flight=COUNTS,
        drained_at=st.none() | TIMES,
        published=RANGES,
        not_published=RANGES,
    ),
    after_end=st.none() | made(AfterEndStatus, published=RANGES, records=made(LandedRecords, rejected=COUNTS)),
    resumed_from=st.none() | made(ResumedFromStatus, name=st.none() | TEXT, origin_uid=TEXT),
    resumed_by=st.none() | made(ResumedByStatus, name=TEXT, uid=TEXT),
)


def dumped(status: IngestRunStatus) -> str:
    return status.model_dump_json(by_alias=True, exclude_none=True)


@given(STATUSES)
@settings(deadline=None)
def test_what_is_written_is_read_the_same(status: IngestRunStatus) -> None:
    assert IngestRunStatus.model_validate(json.loads(dumped(status))) == status
    assert IngestRunStatus.model_validate(status.model_dump(mode="json", by_alias=True, exclude_none=True)) == status


def test_a_run_that_no_operator_has_seen() -> None:
    """What the API server puts there at creation, and what an older one may have left out."""
    assert IngestRunStatus.model_validate({"observedGeneration": -1}) == IngestRunStatus()
    assert IngestRunStatus.model_validate({}) == IngestRunStatus()
    assert IngestRunStatus().batches.claimed == IndexRanges()


def test_ranges_are_text_and_times_have_whole_seconds() -> None:
    status = IngestRunStatus(
        batches=BatchesStatus(claimed=IndexRanges.span(0, 41) | IndexRanges([43])),
        start_time=NOW + timedelta(microseconds=999_999),
    )

    told = json.loads(dumped(status))

    assert told["batches"]["claimed"] == "0-41,43"
    assert told["startTime"] == "2026-11-23T03:04:05Z"


def test_a_time_of_another_zone_is_written_in_utc() -> None:
    status = IngestRunStatus.model_validate({"startTime": "2026-11-23T05:04:05+02:00"})

    assert json.loads(dumped(status))["startTime"] == "2026-11-23T03:04:05Z"


@pytest.mark.parametrize(
    "changes",
    [
        {"phase": "Done"},
        {"batches": {"claimed": "1,0"}},
        {"batches": {"active": -1}},
        {"records": {"published": -1}},
        {
            "conditions": [
                {"type": "Finished", "status": "Maybe", "reason": "x", "lastTransitionTime": "2026-11-23T03:04:05Z"}
            ]
        },
        {"conditions": [{"type": "Finished", "status": "True", "reason": "x"}]},
        {"cancellation": {"reason": "no time"}},
        {"startTime": "yesterday"},
    ],
)
def test_what_the_schema_refuses_is_refused_here(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        IngestRunStatus.model_validate(changes)


def test_a_newer_operators_fields_are_ignored() -> None:
    status = IngestRunStatus.model_validate({"phase": "Running", "mood": "good", "batches": {"retried": "0-3"}})

    assert status.phase is Phase.RUNNING


def test_ended_phases() -> None:
    assert [phase for phase in Phase if phase.ended] == [Phase.SUCCEEDED, Phase.FAILED, Phase.CANCELLED]


def test_condition_by_type() -> None:
    condition = Condition(type="Drained", status="True", reason="Drained", last_transition_time=NOW)
    status = IngestRunStatus(conditions=[condition])

    assert status.condition("Drained") is condition
    assert status.condition("Finished") is None


def test_in_flight_is_what_was_claimed_and_has_neither_ended_nor_is_to_be_claimed_again() -> None:
    batches = BatchesStatus(
        claimed=IndexRanges.span(0, 9),
        fetched=IndexRanges.span(0, 7),
        published=IndexRanges([0, 1, 4]),
        failed=IndexRanges([2]),
        replay=IndexRanges([3, 9]),
    )

    assert batches.in_flight == IndexRanges.parse("5-8")
    assert BatchesStatus().in_flight == IndexRanges()


def test_pending_replays_are_the_unpublished_batches_that_are_not_fetched() -> None:
    first, second, third = (UnpublishedBatch(batch=n, cursor=f"c{n}", read=10) for n in (3, 5, 8))
    batches = BatchesStatus(fetched=IndexRanges([0, 1, 5]), unpublished=[first, second, third])

    assert batches.pending_replays == {3: first, 8: third}


def test_checkpoints_by_batch() -> None:
    first, second = Checkpoint(batch=4, stage=1), Checkpoint(batch=7)

    assert BatchesStatus(checkpoints=[first, second]).checkpoint_by_batch == {4: first, 7: second}


def worst_status(
    *, failed: int, in_flight: int, drained: bool = True, batches: int = MAX_PARTITIONS
) -> IngestRunStatus:
    """The longest status: each failed and each unfinished batch is alone, among high and so long indexes."""
    everything = IndexRanges.span(0, batches - 1)
    holes = [batches - 2 - 4 * n for n in range(failed + in_flight)]
    lost, flying = IndexRanges(holes[:failed]), IndexRanges(holes[failed:])
    return IngestRunStatus(
        observed_generation=100,
        phase=Phase.CANCELLED,
        conditions=[
            Condition(
                type=kind,
                status="Unknown",
                reason="CompletedWithFailedBatches",
                message="m" * MESSAGE_CHARS,
                last_transition_time=NOW,
                observed_generation=100,
            )
            for kind in CONDITIONS
        ]
        + [
            # It never says more than its reason.
            Condition(
                type="Suspended", status="False", reason="Suspended", last_transition_time=NOW, observed_generation=100
            )
        ],
        batches=BatchesStatus(
            claimed=everything,
            fetched=everything - lost - flying,
            published=everything - lost - flying,
            failed=lost,
            active=in_flight,
            progress=f"{batches}/{batches}",
            unpublished=[
                UnpublishedBatch(batch=batches, cursor="c" * (UNPUBLISHED_FREE_BYTES - 72), read=2**53, next="d" * 8)
            ],
            checkpoints=[
                Checkpoint(
                    batch=batches,
                    stage=19,
                    attempt=100,
                    input_attempt=100,
                    written=2**53,
                    rejected=2**53,
                    retries=100,
                    memory_retries=10,
                    disruptions=10,
                    memory_limit=2**43,
                )
                for _ in range(min(MAX_CHECKPOINTS, in_flight))
                if not drained
            ],
        ),
        records=RecordsStatus(fetched=2**53, rejected=2**53, published=2**53),
        cursor="c" * CURSOR_MAX_CHARS,
        cursor_state="s" * STATE_MAX_CHARS,
        cursor_mark=mark_of_cursor("c"),
        source_digest="d" * SOURCE_DIGEST_MAX_CHARS,
        failures=[
            StageFailure(
                batch=batches,
                stage=f"hook {'h' * 63}",
                attempt=100,
                reason="R" * 32,
                message="m" * MESSAGE_CHARS,
                time=NOW,
                log="l" * LOG_BYTES if n < KEPT_LOGS else None,
            )
            for n in range(KEPT_FAILURES)
        ],
        retries=[
            entry.model_copy(update={"count": 10**9})
            for entry in add_retries([], [("fetch", f"R{n}") for n in range(99)])
        ],
        images=[
            ImagePin(
                steps=IndexRanges([2 * n, 2 * n + 20]), image=None if n else "i" * 128, digest="sha256:" + "d" * 64
            )
            for n in range(MAX_IMAGE_PINS)
        ],
        start_time=NOW,
        completion_time=NOW,
        duration="7y364d",
        last_progress_time=NOW,
        cancellation=CancellationStatus(
            reason="r" * 512,
            requested_by="u" * 128,
            policy=CancellationPolicy.TERMINATE,
            accepted_at=NOW,
            active_batches=in_flight,
            drained_at=NOW if drained else None,
            published=IndexRanges(list(flying)[::2] if drained else ()),
            not_published=IndexRanges(list(flying)[1::2] if drained else ()),
        ),
        after_end=AfterEndStatus(
            published=IndexRanges(list(flying)[::2]), records=LandedRecords(rejected=2**53, published=2**53)
        )
        if drained
        else None,
        resumed_from=ResumedFromStatus(name="n" * 253, uid="u" * 36, origin_uid="u" * 36),
        resumed_by=ResumedByStatus(name="n" * 253, uid="u" * 36),
    )


def by_cascade(status: IngestRunStatus, *, children: bool = False) -> IngestRunStatus:
    """The same of a run that was cancelled with its parent, has a clean-up, and children of the longest names."""
    record = status.cancellation
    assert record is not None
    clean_up = OnCancelStatus(state="Running", message="m" * (MESSAGE_CHARS + 16))
    below = ChildrenStatus(
        cancelled=999, ended_before=999, ended_before_names=["n" * 253] * NAMED_CHILDREN, waiting=999
    )
    return status.replace(
        cancellation=record.replace(
            parent="n" * 253,
            cascade=True,
            children=below if children else None,
            on_cancel=clean_up if record.drained_at is not None else None,
        )
    )


@pytest.mark.parametrize("drained", [True, False])
@pytest.mark.parametrize("failed", [0, 40, MAX_FAILED_BATCHES])
@pytest.mark.parametrize("in_flight", [0, 4, 16, 50, MAX_PARALLELISM])
def test_the_worst_status_leaves_room_in_16_kib(failed: int, in_flight: int, drained: bool) -> None:
    """3 KiB for the spec, the metadata and the managed fields; tests/api measures a whole object."""
    status = worst_status(failed=failed, in_flight=in_flight, drained=drained)
    fit = fit_status(status)

    assert len(dumped(fit).encode()) <= STATUS_BYTES
    assert fit_status(fit) == fit
    assert fit.batches == status.batches
    assert fit.cancellation == status.cancellation
    assert fit.failures[-1].message == status.failures[-1].message
    if len(dumped(status).encode()) <= STATUS_BYTES:
        assert fit == status


@pytest.mark.parametrize("children", [True, False])
@pytest.mark.parametrize("drained", [True, False])
@pytest.mark.parametrize("failed", [0, MAX_FAILED_BATCHES])
@pytest.mark.parametrize("in_flight", [0, 50, MAX_PARALLELISM])
def test_the_record_of_a_cascading_cancel_fits_too(failed: int, in_flight: int, drained: bool, children: bool) -> None:
    status = by_cascade(worst_status(failed=failed, in_flight=in_flight, drained=drained), children=children)
    fit = fit_status(status)

    assert len(dumped(fit).encode()) <= STATUS_BYTES
    assert fit_status(fit) == fit
    assert fit.batches == status.batches
    before, after = status.cancellation, fit.cancellation
    assert before is not None
    assert after is not None
    assert after.replace(children=None, on_cancel=None) == before.replace(children=None, on_cancel=None)
    if before.children is not None:
        assert after.children is not None
        assert after.children.replace(ended_before_names=[]) == before.children.replace(ended_before_names=[])
    if before.on_cancel is not None:
        assert after.on_cancel is not None
        assert after.on_cancel.state == before.on_cancel.state


def test_the_names_of_children_stay_where_there_is_room() -> None:
    status = by_cascade(worst_status(failed=0, in_flight=4), children=True)
    record = status.cancellation
    assert record is not None
    assert record.children is not None
    children = record.children.replace(ended_before_names=["geo-2026-11-23-0304"] * NAMED_CHILDREN)
    status = status.replace(cancellation=record.replace(children=children))

    assert fit_status(status) == status


def test_beside_the_copy_of_a_saved_state_what_is_said_makes_room() -> None:
    status = worst_status(failed=0, in_flight=4)
    meta = {"name": "n", "namespace": "n", "uid": "u", "resourceVersion": "1", "creationTimestamp": NOW}
    state = {"uid": "u", "batches": {"published": "1," * 1500 + "1"}, "afterEnd": {"published": "1," * 1200 + "1"}}

    def told(**spec: Any) -> IngestRunStatus:
        run = IngestRun.read({"metadata": meta, "spec": {**manifest(**spec)["spec"]}})
        assert saved_state_bytes(run.spec) <= SAVED_STATE_BYTES
        return finish_status(run, status, phase=None, conditions=(), now=NOW)

    assert told().failures == status.failures
    fit = told(resumeFrom={"savedState": state})
    assert fit.batches == told().batches
    assert [failure.log for failure in fit.failures] == [None]
    assert len(dumped(fit)) < len(dumped(status)) - 3 * 1024


def test_a_status_without_failures_is_small_at_a_million_batches() -> None:
    assert len(dumped(worst_status(failed=0, in_flight=4)).encode()) < 10 * 1024
    million = BatchesStatus(published=IndexRanges.span(0, 999_999), claimed=IndexRanges.span(0, 999_999))
    assert len(million.model_dump_json()) < 200
