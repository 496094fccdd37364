"""Rows of named values from files, each knowing where it stands."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkengine.arguments import nearest_name
from ntkengine.errors import InputError
from ntkengine.textfile import parse_json

_LONGEST_FIELD = 1 << 24
_FIELD = r'(?:"[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)'  # of a csv with tabs
_DOUBLED = re.compile(r'"[^"]*(?:""[^"]*)+"')
_OPEN = re.compile(r'"[^"]*(?:""[^"]*)*')


@dataclass(frozen=True)
class Row:
    """One row: its place, such as `train.tsv:17` (1-based line of the file), and its values by column.

    `named_at` is where its columns get their names, the row itself if that is empty.
    """

    where: str
    values: Mapping[str, Any]
    named_at: str = ""


def no_column(where: str, column: str, names: Iterable[Any]) -> InputError:
    """Return the refusal of a column that is not there, with the nearest that is."""
    there = [str(name) for name in names]
    kind = re.search(r"(\.[ct]sv):\d+$", where, re.IGNORECASE)
    if kind is not None and (told := _divided(there, "," if kind[1].lower() == ".csv" else "\t")):
        return InputError(f"{where}: no column {column!r}; {told}")
    hint = nearest_name(column, there)
    return InputError(
        f"{where}: no column {column!r}; {hint and hint + ' '}the columns are {', '.join(there) or 'none'}"
    )


def _divided(names: Sequence[str], expected: str) -> str:
    """Return what seems to divide the columns in place of what was expected; empty where nothing seems to."""
    mark = next((x for x in ";\t,|" if len(names) == 1 and x in names[0] and x != expected), None)
    return f"columns seem to be divided by {mark!r}, expected {expected!r}" if mark else ""


def rows_of(source: str | Path, header: Sequence[str] | None = None) -> tuple[str, Iterator[Row]]:
    """Return a file's name and its rows, read as they are asked for.

    Args:
        source: its path.
        header: column names of a csv or tsv without a header line.

    Raises:
        InputError: no such file, or a kind that cannot be read.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        msg = f"{path}: {'is a folder, expected a file' if path.is_dir() else 'no such file'}"
        raise InputError(msg)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        msg = f"{path}: expected one of {', '.join(_READERS)}, got {path.suffix or 'no suffix'!r}"
        raise InputError(msg)
    return str(path), reader(path, header)


def _records(name: str, records: Iterable[Any]) -> Iterator[Row]:
    for i, record in enumerate(records):
        if not isinstance(record, Mapping):
            msg = f"{name} row {i}: expected a mapping of columns, got {type(record).__name__}"
            raise InputError(msg)
        yield Row(f"{name} row {i}", record)


def _lines(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        msg = f"{path.name}:{_undecodable_line(path)}: expected UTF-8 text, found byte {error.object[error.start]:#04x}"
        raise InputError(msg) from error


def _undecodable_line(path: Path) -> int:
    """Return the 1-based line that is not UTF-8 (the decoder's own offset counts from its last block)."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return 0


def _separated(delimiter: str, quoting: int) -> Any:
    def read(path: Path, header: Sequence[str] | None) -> Iterator[Row]:
        csv.field_size_limit(_LONGEST_FIELD)
        reader = csv.reader(_lines(path), delimiter=delimiter, quoting=quoting, strict=True)  # type: ignore[arg-type]
        names = list(header) if header is not None else None
        named_at, stray = "header", False
        if names is not None:
            _distinct(names, named_at)
        while True:
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                msg = f"{path.name}:{reader.line_num}: malformed row ({error})"
                raise InputError(msg) from error
            if quoting == csv.QUOTE_NONE:
                stray = _stray_quotes(path, reader.line_num, fields, len(names or fields), stray)
            if not fields or (len(fields) == 1 and fields[0] and not fields[0].strip()):
                continue  # a blank line; an empty value is a quoted one
            if names is None:
                names, named_at = [f.strip() for f in fields], f"{path.name}:{reader.line_num}"
                _distinct(names, named_at)
                continue
            if len(fields) != len(names):
                told = _divided(names, delimiter)
                msg = f"{path.name}:{reader.line_num}: expected {len(names)} fields, got {len(fields)}"
                msg += told and f"; {told}"
                raise InputError(msg)
            yield Row(f"{path.name}:{reader.line_num}", dict(zip(names, fields, strict=True)), named_at)

    return read


def _stray_quotes(path: Path, number: int, fields: Sequence[str], columns: int, stray: bool) -> bool:
    """Return whether quotes that are opened and not closed are known to be text's own; refuse a csv's, read as text.

    Args:
        path: of a tsv, for messages and a look at all of it.
        number: of the line.
        fields: in it, as they stand.
        columns: that every row has.
        stray: whether it is known already.

    Raises:
        InputError: a field in quotes with doubled ones in it; or one that a later line closes, in a file that is a
            csv's from its first line to its last.
    """
    for field in fields:
        if not field.startswith('"'):
            continue
        stray = stray or _OPEN.fullmatch(field) is not None and not _quoted_as_csv(path, columns)
        if _DOUBLED.fullmatch(field) or not stray and _OPEN.fullmatch(field):
            msg = (
                f"{path.name}:{number}: the quotes of {field[:40]!r} are those of a csv, which a tsv has as text; "
                "write the file as csv or jsonl, or with its quotes as they stand in the text"
            )
            raise InputError(msg)
    return stray


def _quoted_as_csv(path: Path, columns: int) -> bool:
    row = re.compile(rf"{_FIELD}(?:\t{_FIELD}){{{columns - 1}}}[\r\n]*|\s*")
    lines, odd = [], False
    for line in _lines(path):
        lines.append(line)
        odd ^= line.count('"') % 2 == 1
        if not odd:
            if not row.fullmatch("".join(lines)):
                return False
            lines = []
    return not lines


def _distinct(names: Sequence[str], named_at: str) -> None:
    if len(set(names)) != len(names):
        raise InputError(f"{named_at}: expected distinct column names, got {', '.join(map(str, names))}")


def _jsonl(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        yield Row(where, parse_json(line, where, dict, "a JSON object"))


def _json(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    yield from _records(path.name, parse_json("".join(_lines(path)), path.name, list, "a list of JSON objects"))


def _parquet(path: Path, _header: Sequence[str] | None) -> Iterator[Row]:
    try:
        import pandas
    except ImportError as error:
        msg = f"{path}: reading parquet needs pandas and pyarrow; install them, or convert the file to jsonl"
        raise InputError(msg) from error
    try:
        frame = pandas.read_parquet(path)
    except (OSError, ValueError, ImportError) as error:
        msg = f"{path}: not a readable parquet file ({str(error).splitlines()[0]})"
        raise InputError(msg) from error
    yield from _records(path.name, frame.to_dict("records"))


_READERS = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _separated(",", csv.QUOTE_MINIMAL),
    ".tsv": _separated("\t", csv.QUOTE_NONE),  # text there holds stray quotes
    ".parquet": _parquet,
}
