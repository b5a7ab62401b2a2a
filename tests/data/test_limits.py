"""Sizes that only large data reaches: bytes of text in one array, rows held before they are written, shard numbers."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from worlds import Prepare, amazon, bind, review, write_lines

from pulse_ray.data import preparation
from pulse_ray.data.jsonlines import Columns, parse
from pulse_ray.data.pieces import Pieces
from pulse_ray.data.preparation import RAW_INTERACTIONS
from pulse_ray.errors import DataError

LOOSE = {"min_user_interactions": 1, "min_item_interactions": 1, "partitions": 1, "positions_per_user": 9}
TEXT = "Soft and warm, and it lasts. " * 10


@pytest.fixture
def domain(tmp_path: Path) -> dict[str, object]:
    rows = [review(f"u{user}", f"i{n}", n, reviewText=TEXT) for user in range(12) for n in range(6)]
    return amazon(write_lines(tmp_path / "reviews.json", rows))


def test_partition_with_too_much_text_names_the_setting_to_raise(
    prepared: Prepare, domain: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = 72 * len(TEXT.strip())
    monkeypatch.setattr(preparation, "TEXT_BYTES", whole // 2)
    with pytest.raises(DataError, match=r"the reviews of partition 0 have [\d,]+ bytes.*Set prepare\.partitions=4"):
        prepared(domains=[domain], **LOOSE)


def test_examples_with_long_reviews_go_to_smaller_shards(
    prepared: Prepare, domain: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = prepared("expected", domains=[domain], **LOOSE)
    gather = preparation._gather
    limit = 20 * len(TEXT)

    def limited(*args: object) -> pa.Table:
        rows = gather(*args)  # type: ignore[arg-type]
        monkeypatch.setattr(preparation, "TEXT_BYTES", limit)
        return rows

    monkeypatch.setattr(preparation, "_gather", limited)
    result = prepared("result", domains=[domain], **LOOSE)
    examples = result.stage.output("examples")
    assert len(examples.parts("train")) > len(expected.stage.output("examples").parts("train")) == 1
    for table in examples.tables():
        reviews = [step["review"] for history in table.column("history").to_pylist() for step in history]
        assert sum(map(len, reviews)) <= limit
    assert result.rows("examples") == expected.rows("examples")


def test_rows_written_at_every_call_give_the_same_pieces(tmp_path: Path) -> None:
    stage = bind(tmp_path, {"domains": [{"name": "shop", "source": {"kind": "synthetic"}}], "partitions": 3})
    pieces = Pieces(stage, 0)
    row = {"item_id": "i", "timestamp": 1, "rating": None, "review": "Fine."}
    rows = [[{**row, "user_id": f"u{n}", "order": 7 * call + n} for n in range(call)] for call in range(6)]
    for name, flush_bytes in (("many", 0), ("one", 2**25)):
        with pieces.dealer(name, RAW_INTERACTIONS, "user_id", flush_bytes) as dealer:
            for chunk in rows:
                dealer.deal(pa.Table.from_pylist(chunk, schema=RAW_INTERACTIONS))
    for partition in range(3):
        assert pieces.get("many", partition).equals(pieces.get("one", partition))
    assert sum(pieces.get("many", partition).height for partition in range(3)) == sum(range(6))
    batches = {name: sum(len(list(pieces.batches(name, n))) for n in range(3)) for name in ("many", "one")}
    assert batches["many"] > batches["one"]


def test_refused_block_costs_no_good_line_however_far_it_is_halved() -> None:
    lines = [b'{"user": "u%d", "n": %d}' % (n, n) for n in range(50)]
    for bad in (3, 17, 49):
        lines[bad] = b'{"user": ' + b"x" * bad
    block = b"\n".join(lines) + b"\n"
    columns = Columns(schema=pa.schema({"user": pa.string(), "n": pa.float64()}))
    whole = parse(block, 1, columns)
    assert [number for number, *_ in whole.faults] == [4, 18, 50]
    for few_bytes in (0, 100, 500):
        parsed = parse(block, 1, columns, few_bytes)
        assert parsed.table.equals(whole.table)
        assert (parsed.numbers == whole.numbers).all()
        assert parsed.faults == whole.faults


def test_partitions_without_rows_give_the_same_tables(prepared: Prepare, domain: dict[str, object]) -> None:
    few, many = (
        prepared(f"{partitions}", domains=[domain], **{**LOOSE, "partitions": partitions}) for partitions in (1, 40)
    )
    for name in ("interactions", "examples", "items"):
        keys = list(pl.DataFrame(few.rows(name)).columns[:3])
        assert sorted(few.rows(name), key=lambda row: [str(row[key]) for key in keys]) == sorted(
            many.rows(name), key=lambda row: [str(row[key]) for key in keys]
        )
