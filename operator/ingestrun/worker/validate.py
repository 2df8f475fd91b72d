"""The hook `validate`: rows that break a rule go into quarantine with all their reasons, the others go on typed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack

import pyarrow as pa
import pyarrow.compute as pc

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.worker import ColumnRule, ColumnType, Validate
from ingestrun.worker import casting
from ingestrun.worker.context import Context
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import DATA_FILE, Input, ParquetFile, new_directory

REASON = "_reason"
BATCH = "_batch"
_AND = "; "


def validate(rules: Validate, context: Context, stop: Stop) -> StageResult:
    """Divide the rows of the stage before.

    Raises:
        PermanentError: a required column is not there at all, or more rows than `maxRejected` were rejected: the
            quarantine is kept then, the output is not.
        WorkerError: the input or the workspace failed.
    """
    stop.check()
    source = Input(context.need(contract.ENV_INPUT, context.input))
    output = context.need(contract.ENV_OUTPUT, context.output)
    rejects = context.need(contract.ENV_REJECTS, context.rejects)
    check = Check(rules, source.schema, empty=not source.rows)
    read = written = rejected = 0
    # Files are closed first; then the quarantine takes its name, then the output: who sees this finds the other.
    with new_directory(output) as directory, ExitStack() as quarantine:
        with ExitStack() as files:
            good = files.enter_context(ParquetFile(directory / DATA_FILE, check.schema))
            bad: ParquetFile | None = None
            for table in source.tables():
                stop.progress(read, source.rows)
                stop.check()
                kept, refused = check.divide(table)
                good.write(kept)
                if refused.num_rows:
                    if bad is None:
                        path = quarantine.enter_context(new_directory(rejects)) / DATA_FILE
                        bad = files.enter_context(ParquetFile(path, check.quarantine_schema()))
                    stamp = pa.array([context.batch] * refused.num_rows, pa.int64())
                    bad.write(refused.append_column(BATCH, stamp))
                read, written, rejected = read + table.num_rows, written + kept.num_rows, rejected + refused.num_rows
        stop.progress(read, source.rows)
        if read != source.rows or read != written + rejected:
            raise AssertionError(f"{source.rows} rows came in, {read} were read, {written} kept, {rejected} rejected")
        if rules.max_rejected is not None and rejected > rules.max_rejected:
            quarantine.close()
            raise PermanentError(
                f"{rejected} of {read} rows break the rules, maxRejected is {rules.max_rejected}; "
                f"they are kept in {rejects}, each with its reason",
                read=read,
                rejected=rejected,
            )
        stop.last_call()
        if not rejected:
            # What an earlier pod of this attempt left, should it have found another input.
            shutil.rmtree(rejects, ignore_errors=True)
    return StageResult(v=contract.VERSION, outcome=Outcome.DONE, read=read, written=written, rejected=rejected)


class Check:
    """The rules, for tables of one schema."""

    def __init__(self, rules: Validate, schema: pa.Schema, *, empty: bool) -> None:
        """Hold the rules against the schema; `empty`: there are no rows, so that no column can be missing.

        Raises:
            PermanentError: a required column is missing, or the input has columns of the quarantine's names.
        """
        self._input = schema
        self._rules = rules.columns
        missing = [rule.name for rule in rules.columns if rule.required and rule.name not in schema.names]
        if missing and not empty:
            # With no such column every row would be rejected, one by one, for what is wrong with the source.
            raise PermanentError(
                f"the required column {missing[0]!r} is not in the data; it has: {', '.join(schema.names)[:300]}"
            )
        taken = {REASON, BATCH} & set(schema.names)
        if taken:
            raise PermanentError(f"the data has a column {min(taken)!r}, a name that the quarantine needs")
        declared = {rule.name: casting.ARROW[rule.type] for rule in rules.columns if rule.type is not None}
        fields = [pa.field(field.name, declared.pop(field.name, field.type)) for field in schema]
        # A declared column is there in every batch, so that all batches have one schema.
        self.schema = pa.schema(fields + [pa.field(name, kind) for name, kind in declared.items()])

    def quarantine_schema(self) -> pa.Schema:
        """The input's columns as they came, the reason and the batch."""
        return self._input.append(pa.field(REASON, pa.string())).append(pa.field(BATCH, pa.int64()))

    def divide(self, table: pa.Table) -> tuple[pa.Table, pa.Table]:
        """The rows that keep all rules, as declared; and the others as they came, with their reasons."""
        table = table.combine_chunks()
        columns = {name: _array(table.column(name)) for name in table.column_names}  # one chunk each
        reasons: list[pa.Array] = []
        typed = dict(columns)
        for rule in self._rules:
            if rule.name in columns:
                reasons += _judge(rule, columns[rule.name], typed)
        arrays = [typed[f.name] if f.name in typed else pa.nulls(table.num_rows, f.type) for f in self.schema]
        whole = pa.Table.from_arrays(arrays, schema=self.schema)
        if not reasons:
            return whole, table.slice(0, 0).append_column(REASON, pa.array([], pa.string()))
        reason = pc.utf8_slice_codeunits(pc.binary_join_element_wise(*reasons, ""), len(_AND))
        bad = pc.not_equal(reason, "")
        refused = table.filter(bad).append_column(REASON, reason.filter(bad))
        return whole.filter(pc.invert(bad)), refused


def _array(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks else pa.array([], column.type)


def _judge(rule: ColumnRule, column: pa.Array, typed: dict[str, pa.Array]) -> Iterator[pa.Array]:
    """For each reason that some row has: a column with the reason in these rows, and nothing in the others."""
    there = pc.is_valid(column)
    if rule.required:
        yield from _reason(pc.invert(there), f"{rule.name}: missing")
    ranged = rule.minimum is not None or rule.maximum is not None
    kind = rule.type or (ColumnType.NUMBER if ranged else None)
    if kind is None:
        return
    value = casting.cast(column, kind, rule.name)
    if rule.type is not None:
        typed[rule.name] = value
    article = "an" if kind is ColumnType.INTEGER else "a"
    yield from _reason(pc.and_(there, pc.is_null(value)), f"{rule.name}: not {article} {kind}")
    # NaN is in no range: what is not known to be inside is outside.
    if rule.minimum is not None:
        low = pc.invert(pc.greater_equal(value.cast(pa.float64(), safe=False), rule.minimum))
        yield from _reason(low, f"{rule.name}: below {rule.minimum:g}")
    if rule.maximum is not None:
        high = pc.invert(pc.less_equal(value.cast(pa.float64(), safe=False), rule.maximum))
        yield from _reason(high, f"{rule.name}: above {rule.maximum:g}")


def _reason(broken: pa.Array, text: str) -> Iterator[pa.Array]:
    broken = pc.fill_null(broken, False)  # a comparison with null is null, and breaks no range
    if pc.any(broken).as_py():
        # No nulls: Arrow's join with null_handling="skip" leaves out the rows that are null throughout.
        yield pc.if_else(broken, pa.scalar(_AND + text), pa.scalar(""))
