"""Examples as SASRec sees them: item ids alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

Key = tuple[str, str]
"""Domain and item id, or domain and user id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """An example without what was said in it: `items` are its history's item ids, oldest first."""

    example_id: str
    domain: str
    user_id: str
    split: str
    items: Sequence[str]
    target: str


def read_rows(data: pa.Table) -> list[Row]:
    """The rows of an `examples` table, in order; reviews never become Python objects."""
    history = data.column("history").combine_chunks()
    lengths = pc.list_value_length(history).to_pylist()
    items = iter(history.flatten().field("item_id").to_pylist())
    names = ("example_id", "domain", "user_id", "split", "target_item")
    columns = [data.column(name).to_pylist() for name in names]
    return [
        Row(
            example_id=example_id,
            domain=domain,
            user_id=user_id,
            split=split,
            items=[next(items) for _ in range(length)],
            target=target,
        )
        for example_id, domain, user_id, split, target, length in zip(*columns, lengths, strict=True)
    ]


def newest_rows(tables: Iterable[pa.Table]) -> dict[Key, Row]:
    """Newest training example of each domain and user: the one whose target has the highest position.

    Positions are compared, not the lengths of histories, which `prepare` cuts, nor the order of shards.
    """
    found: dict[Key, Row] = {}
    for data in tables:
        for row in read_rows(data):
            known = found.get((row.domain, row.user_id))
            if known is None or _position(row) > _position(known):
                found[row.domain, row.user_id] = row
    return found


def _position(row: Row) -> int:
    """Position of the row's target in the user's sequence, from 0: an example's id ends in it."""
    return int(row.example_id.rpartition("/")[2])
