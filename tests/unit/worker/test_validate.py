"""The hook `validate`: every row goes on or into quarantine, none is lost, and the reason is there."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingestrun.model.worker import ColumnType, Validate
from ingestrun.worker.casting import ARROW_TYPES, cast
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.validate import RuleChecker

from .support import Bench


def rules(*columns: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"validate": {"columns": list(columns), **more}}


FLIGHTS = rules(
    {"name": "id", "type": "integer", "required": True, "minimum": 1},
    {"name": "distance", "type": "number", "minimum": 0, "maximum": 5000},
    {"name": "at", "type": "timestamp"},
)


def test_rows_are_divided(bench: Bench) -> None:
    table = pa.table(
        {
            "id": ["1", "x", "3", None, "0"],
            "distance": ["1.5", "-3", "9e9", "12", None],
            "at": ["2013-01-01T05:00:00Z", None, "2013-01-01", "nope", "2013-01-01 05:00:00+02:00"],
            "note": ["a", "b", "c", "d", "e"],
        }
    )
    bench.hand_on(table)
    answer = bench.run("hook", FLIGHTS, batch=0, hook="check")
    assert answer.result is not None
    assert (answer.code, answer.result.read, answer.result.written, answer.result.rejected) == (0, 5, 1, 4)
    assert bench.rows("hook") == [
        {"id": 1, "distance": 1.5, "at": datetime(2013, 1, 1, 5, tzinfo=UTC), "note": "a"},
    ]
    rejects = bench.rows("rejects")
    assert [row["_reason"] for row in rejects] == [
        "id: not an integer; distance: below 0",
        "distance: above 5000",
        "id: missing; at: not a timestamp",
        "id: below 1",
    ]
    assert rejects[0] | {"_reason": ""} == {
        "id": "x", "distance": "-3", "at": None, "note": "b", "_reason": "", "_batch": 0,
    }  # fmt: skip


def test_all_batches_have_the_declared_columns(bench: Bench) -> None:
    for batch, table in enumerate([pa.table({"id": [1]}), pa.table({"id": ["2"], "at": pa.nulls(1)})]):
        bench.hand_on(table, batch=batch)
        assert bench.run("hook", FLIGHTS, batch=batch).code == 0
    assert bench.schema("hook", 0) == bench.schema("hook", 1)
    assert not bench.dir("rejects").exists()


def test_several_parts_and_an_empty_batch(bench: Bench) -> None:
    bench.hand_on(pa.table({"id": [1, 2]}), pa.table({"id": [2.0], "new": ["x"]}))
    answer = bench.run("hook", FLIGHTS)
    assert answer.result is not None
    assert answer.result.written == 3
    bench.hand_on(pa.table({}), batch=1)
    answer = bench.run("hook", FLIGHTS, batch=1)
    assert answer.code == 0
    assert bench.rows("hook", 1) == []


def test_a_missing_required_column_is_no_matter_of_rows(bench: Bench) -> None:
    bench.hand_on(pa.table({"ident": [1]}))
    answer = bench.run("hook", FLIGHTS)
    assert answer.code == 65
    assert "'id' is not in the data; it has: ident" in answer.message
    assert not bench.dir("hook").exists()


def test_too_many_rejected(bench: Bench) -> None:
    bench.hand_on(pa.table({"id": [0, 1, -1]}))
    config = rules({"name": "id", "minimum": 1}, maxRejected=1)
    answer = bench.run("hook", config)
    assert answer.result is not None
    assert (answer.code, answer.result.read, answer.result.rejected) == (65, 3, 2)
    assert "2 of 3 rows" in answer.message
    assert len(bench.rows("rejects")) == 2
    assert not bench.dir("hook").exists()
    assert bench.run("hook", rules({"name": "id", "minimum": 1}, maxRejected=2), attempt=1).code == 0


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ("{", "not JSON"),
        ({"transform": {}}, "the built-in hook is"),
        (rules(), "columns"),
        (rules({"name": "a", "type": "date"}), "columns.0.type"),
        (rules({"name": "a", "type": "string", "minimum": 1}), "minimum and maximum are for"),
        (rules({"name": "a", "minimum": 2, "maximum": 1}), "must not be above"),
        (rules({"name": "a"}, {"name": "a"}), "the same column name"),
    ],
)
def test_a_bad_configuration(bench: Bench, config: Any, text: str) -> None:
    bench.hand_on(pa.table({"a": [1]}))
    answer = bench.run("hook", config)
    assert answer.code == 65
    assert text in answer.message


def test_input_that_is_not_there_is_never_an_empty_batch(bench: Bench) -> None:
    assert bench.run("hook", FLIGHTS).code == 1
    directory = bench.hand_on()
    assert "is empty" in bench.run("hook", FLIGHTS).message
    (directory / "rows.csv").write_text("a\n1\n")
    assert "holds 'rows.csv'" in bench.run("hook", FLIGHTS).message
    (directory / "rows.csv").rename(directory / "rows.parquet")
    answer = bench.run("hook", FLIGHTS)
    assert (answer.code, "no Parquet file" in answer.message) == (65, True)


def test_a_pod_that_runs_the_same_attempt_again(bench: Bench) -> None:
    bench.hand_on(pa.table({"id": [1, 0]}))
    for _ in range(2):
        assert bench.run("hook", FLIGHTS).code == 0
        assert [path.name for path in bench.dir("hook").parent.iterdir()] == ["0"]
        assert len(bench.rows("rejects")) == 1
    assert bench.run("hook", rules({"name": "id"})).code == 0
    assert not bench.dir("rejects").exists()


def test_sigterm_before_the_point_of_no_return_leaves_no_quarantine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.hand_on(pa.table({"id": [1, 0]}))
    stop, commit_point = Stop(), Stop.commit_point

    def late(self: Stop) -> None:
        self._sigterm_received = True
        commit_point(self)

    monkeypatch.setattr(Stop, "commit_point", late)
    assert bench.run("hook", FLIGHTS, stop).code == 143
    assert [path for path in bench.workspace.rglob("*") if path.is_file()] == [bench.dir("fetch") / "part-0.parquet"]


CASES: list[tuple[ColumnType, list[Any], list[Any]]] = [
    (ColumnType.INTEGER, ["7", "-7", "+7", "007", "7.0"], [7, -7, 7, 7, 7]),
    (ColumnType.INTEGER, ["7.5", "", " 7", "0x1F", "9" * 19, None], [None] * 6),
    (ColumnType.INTEGER, [1.0, 1.5, float("nan"), 1e300], [1, None, None, None]),
    (ColumnType.INTEGER, [True, False], [None, None]),
    (ColumnType.NUMBER, ["1", "-1.5", "+.5", "5.", "1e3"], [1, -1.5, 0.5, 5, 1000]),
    (ColumnType.NUMBER, ["nan", "inf", "1e999", "1,5", "."], [None] * 5),
    (ColumnType.NUMBER, [2**53 + 1], [float(2**53)]),
    (ColumnType.BOOLEAN, ["true", "FALSE", "1", "0", "yes", ""], [True, False, True, False, None, None]),
    (ColumnType.BOOLEAN, [1, 0, 2], [True, False, None]),
    (ColumnType.BOOLEAN, [1.0], [None]),
    (ColumnType.STRING, [1, 2], ["1", "2"]),
    (ColumnType.STRING, [True], ["true"]),
    (ColumnType.TIMESTAMP, [date(2013, 1, 1)], [datetime(2013, 1, 1, tzinfo=UTC)]),
    (
        ColumnType.TIMESTAMP,
        ["2013-01-01", "2013-01-01 05:00", "2013-01-01T05:00:00.25-05:00", "2013-02-31", "01/02/2013", "1357016400"],
        [
            datetime(2013, 1, 1, tzinfo=UTC),
            datetime(2013, 1, 1, 5, tzinfo=UTC),
            datetime(2013, 1, 1, 10, 0, 0, 250000, tzinfo=UTC),
            None,
            None,
            None,
        ],
    ),
]


@pytest.mark.parametrize(("kind", "given_values", "expected"), CASES)
def test_casting(kind: ColumnType, given_values: list[Any], expected: list[Any]) -> None:
    result = cast(pa.array(given_values), kind, "c")
    assert result.type == ARROW_TYPES[kind]
    assert result.to_pylist() == expected


def test_what_can_never_be_cast() -> None:
    with pytest.raises(PermanentError, match="no unit"):
        cast(pa.array([1]), ColumnType.TIMESTAMP, "c")
    with pytest.raises(PermanentError, match="'c' is list"):
        cast(pa.array([[1]]), ColumnType.INTEGER, "c")


VALUES = st.none() | st.text(max_size=6) | st.integers(-(2**70), 2**70).map(str) | st.floats().map(str)


@given(rows=st.lists(st.tuples(VALUES, VALUES), max_size=40), kinds=st.tuples(*[st.sampled_from(ColumnType)] * 2))
def test_nothing_is_lost_or_counted_twice(rows: list[tuple[Any, Any]], kinds: tuple[ColumnType, ColumnType]) -> None:
    table = pa.table({
        "n": pa.array(range(len(rows)), pa.int64()),
        "a": pa.array([a for a, _ in rows], pa.string()),
        "b": pa.array([b for _, b in rows], pa.string()),
    })  # fmt: skip
    config = Validate.model_validate(
        {
            "columns": [
                {"name": "a", "type": kinds[0], "required": True},
                {"name": "b", "type": kinds[1]},
                {"name": "n", "minimum": 1, "maximum": 30},
            ]
        }
    )
    checker = RuleChecker(config, table.schema, empty=not rows)
    kept, refused = checker.split(table)
    assert kept.schema == checker.schema
    assert sorted(kept["n"].to_pylist() + refused["n"].to_pylist()) == list(range(len(rows)))
    for row in refused.to_pylist():
        assert (row["a"], row["b"]) == rows[row["n"]]
        assert row["_reason"]
    for row in kept.to_pylist():
        assert row["a"] is not None
        assert 1 <= row["n"] <= 30
        assert (row["b"] is None) == (rows[row["n"]][1] is None)
