"""Ids and numbers as other programs store them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import Prepare, write_lines

from pulse_ray.errors import DataError

LOOSE = {"min_user_interactions": 1, "min_item_interactions": 1, "partitions": 2, "max_reject_fraction": 0.9}
TIMES = [1_500_000_000, 1_500_000_100, 1_500_000_200]


def domain(path: Path, **source: Any) -> dict[str, Any]:
    return {"name": "shop", "source": {"interactions": str(path), **source}}


@pytest.mark.parametrize(
    "ids",
    [
        pa.array([1, 1, 2]),
        pa.array([1.0, 1.0, 2.0]),
        pa.array(["1", "1", "2"]).dictionary_encode(),
        pa.array([b"1", b"1", b"2"]),
        pa.array(["1", "1", "2"], pa.large_string()),
    ],
    ids=["integers", "floats", "dictionary", "binary", "large"],
)
def test_ids_of_any_type_are_the_same(ids: pa.Array, prepared: Prepare, tmp_path: Path) -> None:
    items = pa.array([30, 40, 30])
    times = pa.array([datetime.fromtimestamp(time, UTC) for time in TIMES], pa.timestamp("us", "UTC"))
    pq.write_table(
        pa.table({"user_id": ids, "item_id": items, "timestamp": times, "rating": [4.0, float("nan"), None]}),
        tmp_path / "a.parquet",
    )
    result = prepared(domains=[domain(tmp_path / "a.parquet")], **LOOSE)
    assert result.sequences() == {"1": ["30", "40"], "2": ["30"]}
    found = sorted((row["timestamp"], row["rating"]) for row in result.rows("interactions"))
    assert [time for time, _ in found] == TIMES
    assert [rating for _, rating in found] == [4.0, None, None]


def test_a_type_that_no_id_has_is_named(prepared: Prepare, tmp_path: Path) -> None:
    pq.write_table(pa.table({"user_id": [["a"]], "item_id": ["b"], "timestamp": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="column 'user_id' holds lists, not ids"):
        prepared(domains=[domain(tmp_path / "a.parquet")], **LOOSE)


def test_integers_in_lines_of_json(prepared: Prepare, tmp_path: Path) -> None:
    rows: list[Any] = [{"user_id": 1, "item_id": n, "timestamp": TIMES[0] + n} for n in range(3)]
    rows += [{"user_id": "x", "item_id": 7, "timestamp": 9}, "oops"]
    result = prepared(domains=[domain(write_lines(tmp_path / "a.jsonl", rows))], **LOOSE)
    assert result.sequences() == {"1": ["0", "1", "2"], "x": ["7"]}
    assert result.stage.rejected() == {"malformed JSON": 1}


@pytest.mark.parametrize("odd", [None, "", {"a": 1}], ids=["null", "empty", "nested"])
@pytest.mark.parametrize("numbers", [False, True])
def test_sequences_lose_no_item_silently(odd: Any, numbers: bool, prepared: Prepare, tmp_path: Path) -> None:
    items = [3, 4, 5] if numbers else ["3", "4", "5"]
    lines = [{"user_id": "u", "items": items}, {"user_id": "v", "items": [items[0], odd, items[1]]}]
    result = prepared(domains=[domain(write_lines(tmp_path / "a.jsonl", lines))], **LOOSE)
    assert result.sequences() == {"u": ["3", "4", "5"], "v": ["3", "4"]}
    assert result.stage.rejected() == {"interaction without item": 1}
    assert result.metrics["interactions"]["accounting"][0]["lines"] == 6


def test_sequences_of_one_user_follow_each_other(prepared: Prepare, tmp_path: Path) -> None:
    lines = [{"user_id": "u", "items": list("abc")}, {"user_id": "u", "items": list("def")}]
    path = write_lines(tmp_path / "a.jsonl", lines)
    assert prepared(domains=[domain(path)], **LOOSE).sequences() == {"u": list("abcdef")}
    with pytest.raises(DataError, match="no times to cut at"):
        prepared("cut", domains=[domain(path)], split="temporal", **LOOSE)


def test_columns_that_are_named_must_be_there(prepared: Prepare, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("user_id,item_id,timestamp,stars,title\n" + "".join(f"u,i{n},{n},5,Bad!!\n" for n in range(4)))
    with pytest.raises(DataError, match="no column 'starz'"):
        prepared("a", domains=[domain(path, columns={"rating": "starz"})], **LOOSE)
    result = prepared("b", domains=[domain(path, columns={"rating": "stars"})], **LOOSE)
    assert {item["title"] for item in result.rows("items")} == {"i0", "i1", "i2", "i3"}, (
        "a review's title is not its item's"
    )
    told = prepared("c", domains=[domain(path, columns={"title": "title"})], **LOOSE)
    assert {item["title"] for item in told.rows("items")} == {"Bad!!"}
    about = write_lines(tmp_path / "about.jsonl", [{"id": f"i{n}", "title": f"Item {n}"} for n in range(4)])
    named = prepared("d", domains=[domain(path, items=str(about), item_columns={"item_id": "id"})], **LOOSE)
    assert {item["title"] for item in named.rows("items")} == {f"Item {n}" for n in range(4)}
    path.write_text("user_id,item_id\nu,i\n")
    with pytest.raises(DataError, match="no column 'timestamp'"):
        prepared("e", domains=[domain(path)], **LOOSE)


def test_odd_wrappings(prepared: Prepare, tmp_path: Path) -> None:
    lines = [json.dumps({"user_id": "u", "item_id": f"i{n}", "timestamp": n}) for n in range(3)]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert prepared("a", domains=[domain(path)], **LOOSE).sequences() == {"u": ["i0", "i1", "i2"]}
    with pytest.raises(DataError, match="is named twice"):
        prepared("b", domains=[domain(path) | {"source": {"interactions": [str(path), str(path)]}}], **LOOSE)
    broken = tmp_path / "a.csv"
    broken.write_text("user_id,item_id,timestamp\n" + "u\n" * 3)
    with pytest.raises(DataError, match=r"a\.csv:2: wrong number of values \(3 of 3 rows"):
        prepared("c", domains=[domain(broken)], **LOOSE)
