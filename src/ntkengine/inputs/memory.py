"""Rows of what is in memory already: a data set, a frame, columns, a list of mappings or of texts.

Libraries are not imported: a `datasets.Dataset` is known by its `column_names`, a frame by its `columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ntkengine.errors import InputError
from ntkengine.inputs.tables import Row, no_column

_NO_VALUE = ("NAType", "NaTType")  # of pandas


def rows_in(source: Any, columns: Sequence[str]) -> tuple[str, Iterator[Row]]:
    """Return the source's name and its rows.

    Args:
        source: a `datasets.Dataset` (or a streamed one), a pandas frame, a mapping of columns, or an iterable of
            mappings or of texts, which then are the first of the columns.
        columns: those that are wanted; no others are read of a data set or a frame.

    Raises:
        InputError: a column that is not there, columns of unequal lengths, or what has no rows.
    """
    if hasattr(source, "column_names"):
        return "dataset", _dataset(source, columns)
    if hasattr(source, "columns") and hasattr(source, "to_dict"):
        names = [str(name) for name in source.columns]
        double = sorted({name for name in names if names.count(name) > 1} & set(columns))
        if double:
            msg = f"frame: expected distinct column names, {double[0]!r} is there twice"
            raise InputError(msg)
        _expect(columns, names, "frame")
        return "frame", _columns("frame row", {name: list(source[name]) for name in columns})
    if isinstance(source, Mapping):
        _expect(columns, list(source), "columns")
        return "columns", _columns("row", source)
    if isinstance(source, Iterable) and not isinstance(source, str | bytes):
        return "list", _records(source, columns)
    msg = f"examples: expected a path, a data set, a frame, a list of mappings or columns, got {type(source).__name__}"
    raise InputError(msg)


def class_names(source: Any, column: str | None) -> list[str] | None:
    """Return the names that a data set gives to the numbers in its label column (`ClassLabel`), None without."""
    features = getattr(source, "features", None)
    if column is None or not isinstance(features, Mapping) or column not in features:
        return None
    names = getattr(features[column], "names", None)
    return None if names is None else [str(name) for name in names]


def ordered_names(source: Any, column: str) -> list[Any] | None:
    """Return the categories of a label column of a frame, or in memory, that has an order of its own, None without."""
    if hasattr(source, "column_names") or not (hasattr(source, "columns") or isinstance(source, Mapping)):
        return None
    kind: Any = getattr(source[column], "dtype", None)
    return list(kind.categories) if getattr(kind, "ordered", None) is True else None


def missing(value: Any) -> bool:
    """Return whether a cell is empty: None, NaN, or what pandas has for it."""
    if value is None or type(value).__name__ in _NO_VALUE:
        return True
    return isinstance(value, float) and value != value


def plain(value: Any) -> Any:
    """Return an array's or a tensor's single number as a Python one, anything else as it is."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


def _dataset(source: Any, columns: Sequence[str]) -> Iterator[Row]:
    names = source.column_names
    if isinstance(names, Mapping):
        splits = ", ".join(map(str, names))
        msg = f"dataset: expected one split, got {type(source).__name__} of {splits}; take one of them"
        raise InputError(msg)
    if names is not None:  # of a stream they may be unknown
        _expect(columns, names, "dataset")
        if hasattr(source, "select_columns"):
            source = source.select_columns(list(columns))  # others may be slow to decode
    return (Row(f"dataset row {i}", dict(row)) for i, row in enumerate(source))


def _columns(where: str, source: Mapping[str, Any]) -> Iterator[Row]:
    lengths = {name: len(column) for name, column in source.items()}
    if len(set(lengths.values())) > 1:
        msg = f"columns: expected equal lengths, got {lengths}"
        raise InputError(msg)
    rows = zip(*source.values(), strict=True)
    return (Row(f"{where} {i}", dict(zip(source, values, strict=True))) for i, values in enumerate(rows))


def _records(source: Iterable[Any], columns: Sequence[str]) -> Iterator[Row]:
    kind = None
    for i, record in enumerate(source):
        where, text = f"list row {i}", isinstance(record, str)
        kind = text if kind is None else kind
        if text != kind or not text and not isinstance(record, Mapping):
            expected = "a text" if kind else "a mapping of columns"
            msg = f"{where}: expected {expected}{' like the others' * (i > 0)}, got {type(record).__name__}"
            raise InputError(msg)
        if text and len(columns) > 1:
            msg = f"{where}: a list of texts has no column {columns[1]!r}; pass label=None, or a list of mappings"
            raise InputError(msg)
        yield Row(where, {columns[0]: record} if text else record)


def _expect(columns: Sequence[str], names: Sequence[Any], where: str) -> None:
    for column in columns:
        if column not in names:
            raise no_column(where, column, names)
