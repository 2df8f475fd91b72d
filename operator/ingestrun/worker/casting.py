"""Casting a column to a declared type value by value: a value that can't be read becomes null, never a guess.

The accepted forms of text are written here and not left to Arrow's parsers, which read "0x1F" as an integer.
"""

from __future__ import annotations

from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from ingestrun.model.worker import ColumnType
from ingestrun.worker.errors import PermanentError

ARROW_TYPES: Final = {
    ColumnType.STRING: pa.string(),
    ColumnType.INTEGER: pa.int64(),
    ColumnType.NUMBER: pa.float64(),
    ColumnType.BOOLEAN: pa.bool_(),
    ColumnType.TIMESTAMP: pa.timestamp("us", tz="UTC"),
}
_PATTERNS: Final = {
    ColumnType.INTEGER: r"^[+-]?[0-9]+(\.0+)?$",
    ColumnType.NUMBER: r"^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$",
    ColumnType.BOOLEAN: r"^(?i:true|false|1|0)$",
    ColumnType.TIMESTAMP: r"^[0-9]{4}-[0-9]{2}-[0-9]{2}([T ][0-9]{2}:[0-9]{2}(:[0-9]{2}(\.[0-9]{1,6})?)?"
    r"(Z|[+-][0-9]{2}(:?[0-9]{2})?)?)?$",
}
_ZONED: Final = r"(Z|:[0-9.]+[+-][0-9:]+)$"


def cast(column: pa.Array, kind: ColumnType, name: str) -> pa.Array:
    """Cast a column to the declared type; a value that is null or can't be read as that type becomes null.

    Raises:
        PermanentError: no value of the column's own type can be cast (a list to a timestamp, say).
    """
    source = column.type
    if source == ARROW_TYPES[kind] or pa.types.is_null(source):
        return column.cast(ARROW_TYPES[kind])
    if pa.types.is_dictionary(source):
        return cast(column.dictionary_decode(), kind, name)
    if pa.types.is_string(source) or pa.types.is_large_string(source) or pa.types.is_string_view(source):
        return _cast_text(column.cast(pa.string()), kind)
    return _cast_typed(column, kind, name)


def _cast_typed(column: pa.Array, kind: ColumnType, name: str) -> pa.Array:
    source, target = column.type, ARROW_TYPES[kind]
    if kind is ColumnType.TIMESTAMP and not (pa.types.is_timestamp(source) or pa.types.is_date(source)):
        raise PermanentError(f"column {name!r} is {source}: a number says no unit, so it can't be read as a timestamp")
    if kind is ColumnType.NUMBER and pa.types.is_integer(source):
        return column.cast(target, safe=False)  # rounds integers above 2**53, since a double was asked for
    if kind is ColumnType.BOOLEAN and pa.types.is_integer(source):
        column = pc.if_else(pc.is_in(column, value_set=pa.array([0, 1], source)), column, pa.scalar(None, source))
    elif kind is ColumnType.BOOLEAN or (pa.types.is_boolean(source) and kind is not ColumnType.STRING):
        return pa.nulls(len(column), target)  # true is not a number, and 1.0 is not a boolean
    return _cast_or_null(column, target, name)


def _cast_text(column: pa.Array, kind: ColumnType) -> pa.Array:
    if kind is ColumnType.STRING:
        return column
    null = pa.scalar(None, pa.string())
    column = pc.if_else(pc.match_substring_regex(column, _PATTERNS[kind]), column, null)
    target = ARROW_TYPES[kind]
    if kind is ColumnType.INTEGER:
        column = pc.replace_substring_regex(column, r"^\+|\.0+$", "")
    elif kind is ColumnType.NUMBER:
        numbers = _cast_or_null(column, target, "")
        return pc.if_else(pc.is_finite(numbers), numbers, pa.scalar(None, target))
    elif kind is ColumnType.BOOLEAN:
        column = pc.utf8_lower(column)
    elif kind is ColumnType.TIMESTAMP:
        zoned = pc.match_substring_regex(column, _ZONED)
        # Without a zone it is UTC, because the data must not depend on the node's own zone.
        without_zone = _cast_or_null(pc.if_else(zoned, null, column), pa.timestamp("us"), "").cast(target)
        return pc.coalesce(_cast_or_null(pc.if_else(zoned, column, null), target, ""), without_zone)
    return _cast_or_null(column, target, "")


def _cast_or_null(column: pa.Array, target: pa.DataType, name: str) -> pa.Array:
    """Cast, with null for each value that does not fit. They are found by halving, which is fast as they are few."""
    try:
        return column.cast(target)
    except pa.ArrowNotImplementedError:
        raise PermanentError(f"column {name!r} is {column.type}, which can't be read as {target}") from None
    except pa.ArrowInvalid:
        if len(column) == 1:
            return pa.nulls(1, target)
        half = len(column) // 2
        return pa.concat_arrays(
            [_cast_or_null(column[:half], target, name), _cast_or_null(column[half:], target, name)]
        )
