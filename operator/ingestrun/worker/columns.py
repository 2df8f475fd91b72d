"""Conversion of JSON to columns, and of the columns of several pages, files or parts to one schema.

The rules, so that all batches of a dataset can be read together:

- a JSON column has the type of its values: boolean, 64-bit integer, double, or text;
- a column without any value has the null type, which goes with every other;
- integers and doubles together become double where that is exact;
- all other mixtures, nested values and numbers too wide become text: strings as they are, the rest as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter, methodcaller
from typing import Any, Final, NoReturn

import pyarrow as pa

from ingestrun.worker.errors import PermanentError

TEXT: Final = pa.string()
_CAST_ERRORS: Final = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)


def parse_json(text: str | bytes) -> Any:
    """Parse JSON as the standard has it, without Python's own `NaN` and `Infinity`.

    Raises:
        ValueError: it is not JSON.
        RecursionError: it is nested too deeply.
    """
    return json.loads(text, parse_constant=_refuse_constant)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def table_from_records(records: Sequence[dict[str, Any]]) -> pa.Table:
    """Put JSON objects into columns, in the order in which the names first occur; a missing name becomes null.

    Raises:
        PermanentError: a string is no Unicode text (half of a surrogate pair).
    """
    names: dict[str, None] = dict.fromkeys(records[0]) if records else {}
    uniform = True
    for record in records:
        if record.keys() != names.keys():
            names.update(dict.fromkeys(record))
            uniform = False
    arrays = [_column(name, list(map(_getter(name, uniform=uniform), records))) for name in names]
    if not arrays:
        return _table_without_columns(len(records))
    try:
        return pa.Table.from_arrays(arrays, names=list(names))
    except UnicodeEncodeError as error:
        raise PermanentError(f"a column's name is no Unicode text: {error.reason}") from None


def _getter(name: str, *, uniform: bool) -> Callable[[dict[str, Any]], Any]:
    # The first is three times as fast, and most sources send all names with every record.
    return itemgetter(name) if uniform else methodcaller("get", name)


def _table_without_columns(rows: int) -> pa.Table:
    """Return a table for records without fields: `{}` is a record, and it is counted."""
    if not rows:
        return pa.table({})
    # Arrow can hold rows without columns, Parquet can't, so a column of nulls carries their number.
    return pa.table({"_empty": pa.nulls(rows)})


def _column(name: str, values: list[Any]) -> pa.Array:
    try:
        try:
            array = pa.array(values)
        except _CAST_ERRORS:
            return pa.array(map(_to_text, values), TEXT)
        return pa.array(map(_to_text, values), TEXT) if pa.types.is_nested(array.type) else array
    except UnicodeEncodeError as error:
        raise PermanentError(f"column {name!a}: a value is no Unicode text: {error.reason}") from None


def _to_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return one schema that fits all, its columns in the order in which they first occur.

    Raises:
        PermanentError: two columns have one name, or two types have no common one (a date and a list, say);
            the text names the column.
    """
    fields: dict[str, pa.DataType] = {}
    for schema in schemas:
        duplicate = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if duplicate is not None:
            raise PermanentError(f"two columns are named {duplicate!r}")
        for field in schema:
            fields[field.name] = _common_type(field.name, fields.get(field.name, pa.null()), field.type)
    return pa.schema(list(fields.items()))


def _common_type(name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other:
        return one
    try:
        pair = [pa.schema([(name, one)]), pa.schema([(name, other)])]
        return pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except _CAST_ERRORS:
        if _is_scalar(one) and _is_scalar(other):
            return TEXT
        raise PermanentError(f"column {name!r} is {one} here and {other} there: these can't go together") from None


def _is_scalar(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    return any(test(kind) for test in tests)


class InexactCastError(Exception):
    """Not all values of a column fit the type, as integers over 2**53 do not fit a double."""

    def __init__(self, column: str) -> None:
        super().__init__(column)
        self.column = column


def cast_to_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Return the table with exactly the schema's columns and types; a column that it lacks becomes null.

    Raises:
        InexactCastError: the cast would change a value.
    """
    if table.schema.equals(schema):
        return table
    arrays = []
    for field in schema:
        if field.name not in table.column_names:
            arrays.append(pa.nulls(table.num_rows, field.type))
            continue
        try:
            arrays.append(table.column(field.name).cast(field.type))
        except pa.ArrowInvalid:
            raise InexactCastError(field.name) from None
    return pa.Table.from_arrays(arrays, schema=schema)


def with_text_column(schema: pa.Schema, name: str) -> pa.Schema:
    """Return the schema with that column as text, which every value of a scalar column fits.

    Raises:
        PermanentError: the column's type can't be written as text here.
    """
    index = schema.get_field_index(name)
    if not _is_scalar(schema.field(index).type):
        raise PermanentError(f"column {name!r}: not all values fit {schema.field(index).type}")
    return schema.set(index, pa.field(name, TEXT))
