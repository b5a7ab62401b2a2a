"""Lines of JSON → typed columns, as fast as arrow parses them, and line by line where it refuses.

Arrow's parser is strict: a wrong type, a key given twice or a broken character makes it refuse a block. Such a block is
halved until few lines are left, and those are parsed one by one, so one bad line costs its neighbours nothing.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pj

FEW_BYTES = 2**14
"""Default size up to which a block that arrow refuses is parsed line by line."""

Fault = tuple[int, str, str]
"""Number of a line, a short reason, the detail."""


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """Usable lines as columns, `numbers` of those lines in the file, and the others."""

    table: pa.Table
    numbers: npt.NDArray[np.int64]
    faults: tuple[Fault, ...] = ()


class LineError(Exception):
    """A line that cannot be used: a short reason and the detail."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, str(detail)[:200]


@dataclass(frozen=True, kw_only=True)
class Columns:
    """What to read of each line.

    Args:
        schema: strings, lists of strings and float64 by key.
        integers: those of the strings that are numbers in the file: ids, or lists of ids.
        ids: those of the lists that hold ids, whose places count; others hold texts.
        literals: whether a line may be a Python literal, as in Amazon's metadata of 2014.
    """

    schema: pa.Schema
    integers: Collection[str] = ()
    ids: Collection[str] = ()
    literals: bool = False

    @property
    def expected(self) -> pa.Schema:
        """The schema as arrow will find it in most lines."""
        kinds = {True: pa.list_(pa.int64()), False: pa.int64()}
        fields = [(f.name, kinds[pa.types.is_list(f.type)] if f.name in self.integers else f.type) for f in self.schema]
        return pa.schema(fields)


def parse(block: bytes, first: int, columns: Columns, few_bytes: int = FEW_BYTES) -> Parsed:
    """The columns' values from a block of whole lines; other keys are skipped, and those that are absent are null.

    Args:
        first: number of the block's first line.
        few_bytes: a block that arrow refuses is halved down to this size, and then parsed line by line.
    """
    pieces = list(_pieces(block, first, columns, few_bytes))
    return Parsed(
        table=pa.concat_tables([piece.table for piece in pieces]),
        numbers=np.concatenate([piece.numbers for piece in pieces]),
        faults=tuple(fault for piece in pieces for fault in piece.faults),
    )


def _pieces(block: bytes, first: int, columns: Columns, few_bytes: int) -> Iterator[Parsed]:
    lines = block.count(b"\n") + (not block.endswith(b"\n"))
    table = _at_once(block, columns)
    # Rows and lines differ where lines are blank, or hold more or less than one object.
    if table is not None and table.num_rows == lines:
        yield Parsed(table=table, numbers=np.arange(first, first + lines))
    elif len(block) <= few_bytes or lines == 1:
        yield _one_by_one(block, first, columns)
    else:
        half = block.find(b"\n", len(block) // 2) + 1
        if half in (0, len(block)):
            half = block.rfind(b"\n", 0, len(block) // 2) + 1
        yield from _pieces(block[:half], first, columns, few_bytes)
        yield from _pieces(block[half:], first + block[:half].count(b"\n"), columns, few_bytes)


def _at_once(block: bytes, columns: Columns) -> pa.Table | None:
    try:
        str(block, "utf-8")  # Arrow does not look.
        found = pj.read_json(
            pa.BufferReader(block),
            read_options=pj.ReadOptions(use_threads=False, block_size=len(block) + 1),
            parse_options=pj.ParseOptions(explicit_schema=columns.expected, unexpected_field_behavior="ignore"),
        )
        return found.cast(columns.schema) if columns.integers else found
    except (UnicodeDecodeError, pa.ArrowException):
        return None


def _one_by_one(block: bytes, first: int, columns: Columns) -> Parsed:
    rows: list[dict[str, Any]] = []
    numbers: list[int] = []
    faults: list[Fault] = []
    for number, line in enumerate(block.split(b"\n"), start=first):
        if not line.strip():
            continue
        try:
            row = loads(line, literals=columns.literals)
            rows.append({one.name: _coerced(row.get(one.name), one, columns) for one in columns.schema})
            numbers.append(number)
        except LineError as error:
            faults.append((number, error.reason, error.detail))
    table = pa.Table.from_pylist(rows, schema=columns.schema)
    return Parsed(table=table, numbers=np.array(numbers, dtype=np.int64), faults=tuple(faults))


def loads(line: bytes, *, literals: bool = False) -> dict[str, Any]:
    """The object on one line.

    Raises:
        LineError: there is none, or a key stands in it twice.
    """
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise LineError("invalid UTF-8", error) from None
    try:
        row = json.loads(text, object_pairs_hook=_pairs)
    except (json.JSONDecodeError, RecursionError) as error:
        row = _literal(text) if literals else None
        if row is None:
            raise LineError("malformed JSON", error) from None
    if not isinstance(row, dict):
        raise LineError("not a JSON object", text[:80])
    return row


def _literal(text: str) -> object:
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None


def _pairs(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        raise LineError("key given twice", next(name for name in names if names.count(name) > 1))
    return row


def _coerced(value: object, column: pa.Field, columns: Columns) -> object:
    """A value as its column holds it; one of another kind is null, or infinite where a number is wanted."""
    if pa.types.is_list(column.type) and column.name in columns.ids:
        return [_identifier(entry) for entry in value] if isinstance(value, list) else [_identifier(value)]
    if pa.types.is_list(column.type):
        return [_encodable(text) for text in texts(value)]
    if pa.types.is_string(column.type):
        return _encodable(" ".join(texts(value))) or None if isinstance(value, list) else _identifier(value)
    if isinstance(value, bool) or value is None:
        return None
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return float("inf")


def _identifier(value: object) -> str | None:
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    return _encodable(str(value))


def texts(value: object) -> list[str]:
    """All texts in a value, lists in lists included, in order."""
    if isinstance(value, list | tuple):
        return [text for entry in value for text in texts(entry)]
    return [value] if isinstance(value, str) and value else []


def _encodable(text: str) -> str:
    # JSON can spell half of a surrogate pair, which no encoding holds.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
