"""How JSON becomes columns, and how the columns of several pages, files or parts become one schema.

The rules, so that all batches of a dataset can be read together:

- a JSON column has the type of its values: boolean, 64-bit integer, double, or text;
- no value at all gives the null type, which goes with every other;
- integers and doubles give double where that is exact;
- all other mixtures, nested values and numbers too wide give text: strings as they are, the rest as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any, Final

import pyarrow as pa

from ingestrun.worker.errors import PermanentError

TEXT: Final = pa.string()
_REFUSED: Final = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError)


def table_of(rows: Sequence[dict[str, Any]]) -> pa.Table:
    """Put JSON objects into columns, in the order in which the names first come up; a missing name is null.

    Raises:
        PermanentError: a string that is no Unicode text (half of a surrogate pair).
    """
    names: dict[str, None] = {}
    for row in rows:
        if row.keys() != names.keys():
            names.update(dict.fromkeys(row))
    arrays = [_array(name, [row.get(name) for row in rows]) for name in names]
    if not arrays:
        return empty_rows(len(rows))
    try:
        return pa.Table.from_arrays(arrays, names=list(names))
    except UnicodeEncodeError as error:
        raise PermanentError(f"a column's name is no Unicode text: {error.reason}") from None


def empty_rows(count: int) -> pa.Table:
    """Rows without columns: `{}` is a record, and it is counted."""
    if not count:
        return pa.table({})
    # Arrow can hold rows without columns, Parquet can't; a column of nulls carries their number.
    return pa.table({"_empty": pa.nulls(count)})


def _array(name: str, values: list[Any]) -> pa.Array:
    try:
        try:
            array = pa.array(values)
        except _REFUSED:
            return pa.array(map(_as_text, values), TEXT)
        return pa.array(map(_as_text, values), TEXT) if pa.types.is_nested(array.type) else array
    except UnicodeEncodeError as error:
        raise PermanentError(f"column {name!a}: a value is no Unicode text: {error.reason}") from None


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """One schema for all, its columns in the order in which they first come up.

    Raises:
        PermanentError: two columns of one name, or two types that have no common one (a date and a list, say);
            the text names the column.
    """
    fields: dict[str, pa.DataType] = {}
    for schema in schemas:
        twice = next((name for name in schema.names if schema.names.count(name) > 1), None)
        if twice is not None:
            raise PermanentError(f"two columns are named {twice!r}")
        for field in schema:
            fields[field.name] = _common_type(field.name, fields.get(field.name, pa.null()), field.type)
    return pa.schema(list(fields.items()))


def _common_type(name: str, one: pa.DataType, other: pa.DataType) -> pa.DataType:
    if one == other:
        return one
    try:
        pair = [pa.schema([(name, one)]), pa.schema([(name, other)])]
        return pa.unify_schemas(pair, promote_options="permissive").field(0).type
    except _REFUSED:
        if _is_scalar(one) and _is_scalar(other):
            return TEXT
        raise PermanentError(f"column {name!r} is {one} here and {other} there: these can't go together") from None


def _is_scalar(kind: pa.DataType) -> bool:
    types = pa.types
    tests = (types.is_boolean, types.is_integer, types.is_floating, types.is_string, types.is_large_string)
    return any(test(kind) for test in tests)


class NotExactError(Exception):
    """A column's values do not all fit the type, as integers over 2**53 do not fit a double."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with exactly these columns and types; one that it lacks is null.

    Raises:
        NotExactError: a value would be changed by the cast.
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
            raise NotExactError(field.name) from None
    return pa.Table.from_arrays(arrays, schema=schema)


def as_text(schema: pa.Schema, name: str) -> pa.Schema:
    """The schema with that column as text, which every value of a scalar column fits.

    Raises:
        PermanentError: the column's type has no form as text here.
    """
    index = schema.get_field_index(name)
    if not _is_scalar(schema.field(index).type):
        raise PermanentError(f"column {name!r}: not all values fit {schema.field(index).type}")
    return schema.set(index, pa.field(name, TEXT))
