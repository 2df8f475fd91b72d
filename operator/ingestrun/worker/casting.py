"""Casting a column to a declared type value by value: what can't be read is found, not guessed.

The accepted forms are written down here rather than left to Arrow's parsers, which read "0x1F" as an integer.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from ingestrun.model.worker import ColumnType
from ingestrun.worker.errors import PermanentError

ARROW: Final = {
    ColumnType.STRING: pa.string(),
    ColumnType.INTEGER: pa.int64(),
    ColumnType.NUMBER: pa.float64(),
    ColumnType.BOOLEAN: pa.bool_(),
    ColumnType.TIMESTAMP: pa.timestamp("us", tz="UTC"),
}
_FORMS: Final = {
    ColumnType.INTEGER: r"^[+-]?[0-9]+(\.0+)?$",
    ColumnType.NUMBER: r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$",
    ColumnType.BOOLEAN: r"^(?i:true|false|1|0)$",
    ColumnType.TIMESTAMP: r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
    r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)?)?$",
}
_ZONED: Final = r"(Z|:[0-9.]+[+-][0-9:]+)$"


def cast(column: pa.Array, kind: ColumnType, name: str) -> pa.Array:
    """The column as the declared type; null where a value is null or can't be read as one.

    Raises:
        PermanentError: no value of the column's own type can be (a list as a timestamp, say).
    """
    have, target = column.type, ARROW[kind]
    if have == target or pa.types.is_null(have):
        return column.cast(target)
    if pa.types.is_dictionary(have):
        return cast(column.dictionary_decode(), kind, name)
    if pa.types.is_string(have) or pa.types.is_large_string(have) or pa.types.is_string_view(have):
        return _from_text(column.cast(pa.string()), kind)
    if kind is ColumnType.TIMESTAMP and not (pa.types.is_timestamp(have) or pa.types.is_date(have)):
        raise PermanentError(f"column {name!r} is {have}: a number says no unit, so it can't be read as a timestamp")
    if kind is ColumnType.NUMBER and pa.types.is_integer(have):
        return column.cast(target, safe=False)  # a double is what was asked for, over 2**53 it is rounded
    if kind is ColumnType.BOOLEAN and pa.types.is_integer(have):
        column = pc.if_else(pc.is_in(column, value_set=pa.array([0, 1], have)), column, pa.scalar(None, have))
    elif kind is ColumnType.BOOLEAN or (pa.types.is_boolean(have) and kind is not ColumnType.STRING):
        return pa.nulls(len(column), target)  # true is no number, and 1.0 no boolean
    return _each(column, target, name)


def _from_text(column: pa.Array, kind: ColumnType) -> pa.Array:
    if kind is ColumnType.STRING:
        return column
    nothing = pa.scalar(None, pa.string())
    column = pc.if_else(pc.match_substring_regex(column, _FORMS[kind]), column, nothing)
    target = ARROW[kind]
    if kind is ColumnType.INTEGER:
        column = pc.replace_substring_regex(column, r"^\+|\.0+$", "")
    elif kind is ColumnType.NUMBER:
        numbers = _each(column, target, "")
        return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, target))
    elif kind is ColumnType.BOOLEAN:
        column = pc.utf8_lower(column)
    elif kind is ColumnType.TIMESTAMP:
        zoned = pc.match_substring_regex(column, _ZONED)
        # Without a zone it is UTC: the node's own zone must not change the data.
        plain = _each(pc.if_else(zoned, nothing, column), pa.timestamp("us"), "").cast(target)
        return pc.coalesce(_each(pc.if_else(zoned, column, nothing), target, ""), plain)
    return _each(column, target, "")


def _each(column: pa.Array, target: pa.DataType, name: str) -> pa.Array:
    """Cast, with null for a value that does not fit; these are found by halving, as they are few."""
    try:
        return column.cast(target)
    except pa.ArrowNotImplementedError:
        raise PermanentError(f"column {name!r} is {column.type}, which can't be read as {target}") from None
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, target)
        middle = len(column) // 2
        return pa.concat_arrays([_each(column[:middle], target, name), _each(column[middle:], target, name)])
