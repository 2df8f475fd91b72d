"""The hook `validate`: rows that break a rule go into quarantine with all reasons, the others are handed on, typed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from ingestrun.model import contract
from ingestrun.model.contract import Outcome, StageResult
from ingestrun.model.text import pluralize
from ingestrun.model.worker import ColumnRule, ColumnType, Validate
from ingestrun.worker import casting
from ingestrun.worker.context import Context
from ingestrun.worker.errors import PermanentError
from ingestrun.worker.shutdown import Stop
from ingestrun.worker.stage_io import DATA_FILE, InputReader, ParquetFileWriter, atomic_directory

REASON_COLUMN: Final = "_reason"
BATCH_COLUMN: Final = "_batch"
_SEPARATOR: Final = "; "


def validate(rules: Validate, context: Context, stop: Stop) -> StageResult:
    """Split the rows of the stage before into those that keep all rules and those that break one.

    Raises:
        PermanentError: a required column is missing from the data, or more rows than `maxRejected` were rejected; then
            the quarantine is kept, and the output is not.
        WorkerError: the input or the workspace failed.
    """
    stop.raise_if_stopped()
    source = InputReader(context.require(contract.ENV_INPUT, context.input))
    output = context.require(contract.ENV_OUTPUT, context.output)
    rejects = context.require(contract.ENV_REJECTS, context.rejects)
    checker = RuleChecker(rules, source.schema, empty=not source.rows)
    read = written = rejected = 0
    # The files are closed first, then the quarantine gets its name, then the output, which so never appears without it.
    with atomic_directory(output) as directory, ExitStack() as quarantine:
        with ExitStack() as files:
            valid_file = files.enter_context(ParquetFileWriter(directory / DATA_FILE, checker.schema))
            invalid_file: ParquetFileWriter | None = None
            for table in source.tables():
                stop.set_progress(read, source.rows)
                stop.raise_if_stopped()
                valid, invalid = checker.split(table)
                valid_file.write(valid)
                if invalid.num_rows:
                    if invalid_file is None:
                        path = quarantine.enter_context(atomic_directory(rejects)) / DATA_FILE
                        invalid_file = files.enter_context(ParquetFileWriter(path, checker.quarantine_schema))
                    batch = pa.array([context.batch] * invalid.num_rows, pa.int64())
                    invalid_file.write(invalid.append_column(BATCH_COLUMN, batch))
                read, written, rejected = read + table.num_rows, written + valid.num_rows, rejected + invalid.num_rows
        stop.set_progress(read, source.rows)
        if read != source.rows or read != written + rejected:
            raise AssertionError(
                f"{pluralize(source.rows, 'row')} came in, {read} read, {written} kept, {rejected} rejected"
            )
        if rules.max_rejected is not None and rejected > rules.max_rejected:
            quarantine.close()
            raise PermanentError(
                f"{rejected} of {pluralize(read, 'row')} broke the rules, maxRejected is {rules.max_rejected}; "
                f"they are kept in {rejects}, each with its reason",
                read=read,
                rejected=rejected,
            )
        stop.commit_point()
        if not rejected:
            # An earlier pod of this attempt may have left some, if it found another input.
            shutil.rmtree(rejects, ignore_errors=True)
    return StageResult(v=contract.VERSION, outcome=Outcome.DONE, read=read, written=written, rejected=rejected)


class RuleChecker:
    """Checks tables of one schema against the rules."""

    def __init__(self, rules: Validate, schema: pa.Schema, *, empty: bool) -> None:
        """Check the schema; with `empty`, no column counts as missing, because there are no rows to have it.

        Raises:
            PermanentError: a required column is missing, or the input has a column that the quarantine adds.
        """
        self._input = schema
        self._rules = rules.columns
        missing = [rule.name for rule in rules.columns if rule.required and rule.name not in schema.names]
        if missing and not empty:
            # Every row would be rejected, one by one, although it is the source that is wrong.
            raise PermanentError(
                f"the required column {missing[0]!r} is not in the data; it has: {', '.join(schema.names)[:300]}"
            )
        reserved = {REASON_COLUMN, BATCH_COLUMN} & set(schema.names)
        if reserved:
            raise PermanentError(f"the data has a column {min(reserved)!r}, a name that the quarantine needs")
        declared = {rule.name: casting.ARROW_TYPES[rule.type] for rule in rules.columns if rule.type is not None}
        fields = [pa.field(field.name, declared.pop(field.name, field.type)) for field in schema]
        # Every batch has the declared columns, so that all batches have one schema.
        self.schema = pa.schema(fields + [pa.field(name, kind) for name, kind in declared.items()])

    @property
    def quarantine_schema(self) -> pa.Schema:
        """The input's columns unchanged, and the reason and the batch."""
        added = [pa.field(REASON_COLUMN, pa.string()), pa.field(BATCH_COLUMN, pa.int64())]
        return pa.schema([*self._input, *added])

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
