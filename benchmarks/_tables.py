"""Whether two sets of Parquet files hold the same rows, without holding either."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import polars as pl
import pyarrow.parquet as pq

BATCH_ROWS = 8192

KEYS = {
    "interactions": ("domain", "user_id", "timestamp", "item_id"),
    "items": ("domain", "item_id"),
    "examples": ("example_id",),
}
"""What a table's rows are told apart by. A user has an item once, so that the time alone need not."""


def differences(table: str, ours: Sequence[Path], theirs: Sequence[Path]) -> tuple[int, str]:
    """How many rows only one side has, changed rows counted twice, and the keys of some of them.

    A row's digest covers all of its columns with what is nested in them. The order of rows within a user counts too.
    """
    sides = [_digests(table, files) for files in (ours, theirs)]
    only = [one.join(other, on=one.columns, how="anti", nulls_equal=True) for one, other in (sides, sides[::-1])]
    found = pl.concat(
        [frame.with_columns(side=pl.lit(side)) for frame, side in zip(only, ("ours", "theirs"), strict=True)]
    )
    return found.height + abs(sides[0].height - sides[1].height), str(found.head(3).rows())


def _digests(table: str, files: Iterable[Path]) -> pl.DataFrame:
    """Keys, place among the user's interactions, and digest of each row."""
    parts = []
    for file in sorted(files):
        for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
            frame = pl.DataFrame(batch)
            digest = pl.struct(pl.all()).struct.json_encode().hash(seed=0)
            parts.append(frame.select(*KEYS[table], digest=digest))
    found = pl.concat(parts)
    if table == "interactions":
        found = found.with_columns(place=pl.int_range(pl.len()).over("domain", "user_id"))
    return found
