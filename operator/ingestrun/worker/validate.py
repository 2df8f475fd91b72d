"""The hook `validate`: rows that break a rule go into quarantine with all reasons, the others are handed on, typed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from ingestrun.model.text import pluralize
from ingestrun.model.worker import ColumnRule, ColumnType, Validate
from ingestrun.worker import casting
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.quarantine import Quarantine
from ingestrun.worker.rows import Rows
from ingestrun.worker.shutdown import Stop

REASON_COLUMN: Final = "_reason"
BATCH_COLUMN: Final = "_batch"
_SEPARATOR: Final = "; "


class ValidateLink:
    """The link that divides the rows that come in into those that keep all rules and those that break one."""

    def __init__(self, rules: Validate, source: Rows, quarantine: Quarantine, batch: int, stop: Stop) -> None:
        """Check the rules against the schema; no row is read yet.

        Raises:
            PermanentError: a required column is missing from the data, or a column has a name of the quarantine's.
        """
        self._rules = rules
        self._source = source
        self._quarantine = quarantine
        self._batch = batch
        self._stop = stop
        # Of rows that another hook hands on, it is not known yet whether there are any.
        self._checker = RuleChecker(rules, source.schema, empty=not source.rows)
        self.schema = self._checker.schema
        self.rows: int | None = None
        self.read = 0
        self.rejected = 0

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows that keep all rules; the others are in the quarantine then.

        Raises:
            PermanentError: more rows than `maxRejected` were rejected; then the quarantine is kept.
            WorkerError: the input or the workspace failed.
        """
        written = 0
        for table in self._source.tables():
            self._stop.set_progress(self.read, self._source.rows)
            self._stop.raise_if_stopped()
            if table.num_rows:
                self._checker.require_columns()
            valid, invalid = self._checker.split(table)
            if invalid.num_rows:
                batch = pa.array([self._batch] * invalid.num_rows, pa.int64())
                self._quarantine.add(invalid.append_column(BATCH_COLUMN, batch))
            self.read += table.num_rows
            self.rejected += invalid.num_rows
            written += valid.num_rows
            yield valid
        self._stop.set_progress(self.read, self._source.rows)
        self._verify_account(written)
        self.rows = written

    def _verify_account(self, written: int) -> None:
        total = self._source.rows
        if self.read != total or self.read != written + self.rejected:
            came = pluralize(total or 0, "row")
            raise AssertionError(f"{came} came in, {self.read} read, {written} kept, {self.rejected} rejected")
        most = self._rules.max_rejected
        if most is not None and self.rejected > most:
            self._quarantine.keep()
            raise PermanentError(
                f"{self.rejected} of {pluralize(self.read, 'row')} broke the rules, maxRejected is {most}; "
                f"they are kept in {self._quarantine.directory}, each with its reason",
                read=self.read,
                rejected=self.rejected,
            )


class RuleChecker:
    """Checks tables of one schema against the rules."""

    def __init__(self, rules: Validate, schema: pa.Schema, *, empty: bool) -> None:
        """Check the schema; with `empty`, no column counts as missing, because there are no rows to have it.

        Raises:
            PermanentError: a required column is missing, or the input has a column that the quarantine adds.
        """
        self._input = schema
        self._rules = rules.columns
        if not empty:
            self.require_columns()
        reserved = {REASON_COLUMN, BATCH_COLUMN} & set(schema.names)
        if reserved:
            raise PermanentError(f"the data has a column {min(reserved)!r}, a name that the quarantine needs")
        declared = {rule.name: casting.ARROW_TYPES[rule.type] for rule in rules.columns if rule.type is not None}
        fields = [pa.field(field.name, declared.pop(field.name, field.type)) for field in schema]
        # Every batch has the declared columns, so that all batches have one schema.
        self.schema = pa.schema(fields + [pa.field(name, kind) for name, kind in declared.items()])

    def require_columns(self) -> None:
        """Check that the columns that every row must have are there at all.

        Raises:
            PermanentError: one is not. Every row would be rejected, one by one, although it is the source that is
                wrong.
        """
        missing = [rule.name for rule in self._rules if rule.required and rule.name not in self._input.names]
        if missing:
            raise PermanentError(
                f"the required column {missing[0]!r} is not in the data; it has: {', '.join(self._input.names)[:300]}"
            )

    def split(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """Return the rows that keep all rules, as the declared types, and the others unchanged, with their reasons."""
        table = table.combine_chunks()
        columns = {name: _single_chunk(table.column(name)) for name in table.column_names}
        reasons: list[pa.Array] = []
        typed = dict(columns)
        for rule in self._rules:
            if rule.name in columns:
                reasons += _violations(rule, columns[rule.name], typed)
        arrays = [typed[f.name] if f.name in typed else pa.nulls(table.num_rows, f.type) for f in self.schema]
        whole = pa.Table.from_arrays(arrays, schema=self.schema)
        if not reasons:
            return whole, table.slice(0, 0).append_column(REASON_COLUMN, pa.array([], pa.string()))
        reason = pc.utf8_slice_codeunits(pc.binary_join_element_wise(*reasons, ""), len(_SEPARATOR))
        broken = pc.not_equal(reason, "")
        invalid = table.filter(broken).append_column(REASON_COLUMN, reason.filter(broken))
        return whole.filter(pc.invert(broken)), invalid


def _single_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _violations(rule: ColumnRule, column: pa.Array, typed: dict[str, pa.Array]) -> Iterator[pa.Array]:
    """Yield a column for each reason that applies to any row: the reason in these rows, "" in the others.

    The column as its declared type is put into `typed`.
    """
    present = pc.is_valid(column)
    if rule.required:
        yield from _reason_column(pc.invert(present), f"{rule.name}: missing")
    ranged = rule.minimum is not None or rule.maximum is not None
    kind = rule.type or (ColumnType.NUMBER if ranged else None)
    if kind is None:
        return
    value = casting.cast(column, kind, rule.name)
    if rule.type is not None:
        typed[rule.name] = value
    article = "an" if kind is ColumnType.INTEGER else "a"
    yield from _reason_column(pc.and_(present, pc.is_null(value)), f"{rule.name}: not {article} {kind}")
    # NaN is in no range, so the test is "not inside" and not "outside".
    if rule.minimum is not None:
        low = pc.invert(pc.greater_equal(value.cast(pa.float64(), safe=False), rule.minimum))
        yield from _reason_column(low, f"{rule.name}: below {rule.minimum:g}")
    if rule.maximum is not None:
        high = pc.invert(pc.less_equal(value.cast(pa.float64(), safe=False), rule.maximum))
        yield from _reason_column(high, f"{rule.name}: above {rule.maximum:g}")


def _reason_column(broken: pa.Array, text: str) -> Iterator[pa.Array]:
    broken = pc.fill_null(broken, False)  # a comparison with null gives null, and breaks no range
    if pc.any(broken).as_py():
        # "" and not null, because Arrow's join with null_handling="skip" leaves out rows that are null throughout.
        yield pc.if_else(broken, pa.scalar(_SEPARATOR + text), pa.scalar(""))
