from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import pyarrow as pa
import pytest

from pulse_ray.scoring.reasons import Reasons
from pulse_ray.workspace import Artefact

COLUMNS = pa.schema({"example_id": pa.string(), "selector": pa.string(), "text": pa.string()})


class Shards:
    """As much of an artifact as reasons are read from."""

    def __init__(self, shards: Sequence[pa.Table]) -> None:
        self.shards = shards

    def tables(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        yield from self.shards


def _shard(rows: Sequence[tuple[str, str, str]]) -> pa.Table:
    return pa.Table.from_pylist([dict(zip(COLUMNS.names, row, strict=True)) for row in rows], schema=COLUMNS)


def _reasons(*shards: pa.Table) -> Reasons:
    return Reasons(cast(Artefact, Shards(shards)), "base")


def test_newest_reason_of_the_selector_is_found_in_any_shard() -> None:
    shards = [
        _shard([("shop/u/10", "base", "new"), ("shop/a/b/1", "base", "slash")]),
        _shard([("shop/u/9", "base", "old"), ("shop/u/11", "sbert", "of another selector")]),
        _shard([]),
    ]
    found = _reasons(*shards).of([("shop", "u"), ("shop", "a/b"), ("shop", "nobody")])
    assert found == ["new", "slash", None]


@pytest.mark.slow
def test_reasons_may_exceed_the_2_gib_that_one_string_array_can_hold() -> None:
    text = "x" * 2**20
    shards = [_shard([(f"shop/u{shard}-{n}/1", "base", text) for n in range(64)]) for shard in range(33)]
    found = _reasons(*shards).of([("shop", "u0-0"), ("shop", "u32-63"), ("shop", "u33-0")])
    assert [reason and len(reason) for reason in found] == [2**20, 2**20, None]
