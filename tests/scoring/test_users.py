"""The input: columns, row ranges that are read without the file, and rows that cannot be scored."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fake_shop
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pulse_ray.errors import DataError
from pulse_ray.schema import INTERACTION, Item, Reject
from pulse_ray.scoring.users import ShardReader, UserRow, open_users, understand

ITEMS = {"shop": {name: Item(item_id=name, title=name, text=name) for name in ("a", "b", "c", "d")}}


def write(path: Path, rows: int, group: int, first: int = 0) -> Path:
    users = [f"u{first + number}" for number in range(rows)]
    pq.write_table(pa.table({"user_id": users, "history": [["a"]] * rows}), path, row_group_size=group)
    return path


@pytest.mark.parametrize("group", [3, 7, 10, 1000])
@pytest.mark.parametrize("size", [1, 4, 10, 50])
def test_shards_hold_every_row_once_whatever_the_row_groups(tmp_path: Path, group: int, size: int) -> None:
    write(tmp_path / "b.parquet", 23, group, first=40)
    write(tmp_path / "a.parquet", 40, group)
    (tmp_path / "_SUCCESS").write_text("")
    users = open_users(str(tmp_path), ["shop"])
    parts = users.shards(size)
    assert (users.rows, len(parts)) == (63, -(-40 // size) + -(-23 // size))
    assert parts == sorted(parts)
    reader = ShardReader(users)
    seen = [name for part in parts for name in reader.read(part)[2].column("user_id").to_pylist()]
    assert seen == [f"u{number}" for number in range(63)]
    backwards = [reader.read(part) for part in parts[::-2]]
    assert all(
        data.column("user_id")[0].as_py() == f"u{start + 40 * (file.name == 'b.parquet')}"
        for file, start, data in backwards
    )


def test_a_pass_over_a_large_row_group_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    users = open_users(str(write(tmp_path / "users.parquet", 5000, 5000)), ["shop"])
    begun = 0
    original = pq.ParquetFile.iter_batches

    def counted(self: pq.ParquetFile, *args: Any, **kwargs: Any) -> Any:
        nonlocal begun
        begun += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", counted)
    reader = ShardReader(users)
    for part in users.shards(100)[::2]:  # as one of two actors is handed them
        reader.read(part)
    assert begun == 1


def test_a_file_that_shrank_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "users.parquet", 20, 20)
    users = open_users(str(path), ["shop"])
    write(path, 12, 12)
    with pytest.raises(DataError, match="lost rows"):
        ShardReader(users).read(users.shards(10)[1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"history": [["a"]]}, "no column 'user_id'"),
        ({"user_id": ["u"]}, "no column 'history'"),
        ({"user_id": [1], "history": [["a"]]}, "'user_id' is int64"),
        ({"user_id": ["u"], "history": ["a"]}, "'history' is string"),
        ({"user_id": ["u"], "history": [[1]]}, r"'history' is list<.*int64>"),
        ({"user_id": ["u"], "history": [[{"id": "a"}]]}, "'history' is list<.*struct"),
        ({"user_id": ["u"], "history": [["a"]], "candidates": [[2]]}, "'candidates' is"),
        ({"user_id": ["u"], "history": [["a"]], "reason": [2]}, "'reason' is int64"),
        ({"user_id": pa.array([], pa.string()), "history": pa.array([], pa.list_(pa.string()))}, "holds no users"),
    ],
)
def test_columns_that_cannot_be_read_are_named(tmp_path: Path, columns: dict[str, Any], message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "users.parquet")
    with pytest.raises(DataError, match=message):
        open_users(str(tmp_path / "users.parquet"), ["shop"])


def test_several_domains_need_their_column_and_files_must_be_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "users.parquet", 3, 3)
    with pytest.raises(DataError, match="no column 'domain'"):
        open_users(str(path), ["shop", "pantry"])
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot read"):
        open_users(str(path), ["shop"])
    with pytest.raises(DataError, match="holds no users"):
        open_users(str(tmp_path / "absent.parquet"), ["shop"])


def test_lists_and_strings_of_every_width_are_read(tmp_path: Path) -> None:
    columns = {
        "user_id": pa.array(["u"], pa.large_string()),
        "history": pa.array([["a", "b"]], pa.large_list(pa.large_string())),
        "domain": pa.array(["shop"]).dictionary_encode(),
        "age": pa.array([7]),
    }
    pq.write_table(pa.table(columns), tmp_path / "users.parquet")
    users = open_users(str(tmp_path / "users.parquet"), ["shop"])
    assert users.ignored() == ["age"]
    [row] = ShardReader(users).read(users.shards(5)[0])[2].to_pylist()
    assert row == {"user_id": "u", "history": ["a", "b"], "domain": "shop"}


def test_columns_without_any_value_are_as_good_as_missing(tmp_path: Path) -> None:
    columns = {"user_id": ["u"], "history": [["a"]], "candidates": pa.nulls(1), "reason": pa.nulls(1)}
    pq.write_table(pa.table(columns), tmp_path / "users.parquet")
    users = open_users(str(tmp_path / "users.parquet"), ["shop"])
    [row] = ShardReader(users).read(users.shards(5)[0])[2].to_pylist()
    assert known({**row, "domain": "shop"}).candidates is None
    pq.write_table(pa.table({"user_id": ["u"], "history": [[]]}), tmp_path / "empty.parquet")
    assert open_users(str(tmp_path / "empty.parquet"), ["shop"]).rows == 1


def test_a_repeated_column_is_named(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays(
        [pa.array(["u"]), pa.array(["v"]), pa.array([["a"]])], ["user_id", "user_id", "history"]
    )
    pq.write_table(twice, tmp_path / "users.parquet")
    with pytest.raises(DataError, match="two columns 'user_id'"):
        open_users(str(tmp_path / "users.parquet"), ["shop"])


def test_files_of_one_name_in_several_folders_are_told_apart_and_others_left_alone(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "part-0.parquet", 2, 2)
    (tmp_path / "readme.txt").write_text("What this is")
    assert [file.name for file in open_users(str(tmp_path), ["shop"]).files] == ["a/part-0.parquet", "b/part-0.parquet"]


def known(row: dict[str, Any]) -> UserRow:
    found = understand(row, "users.parquet:0", ITEMS, 3, None)
    assert isinstance(found, UserRow), found
    return found


def test_a_row_is_understood() -> None:
    row = known(
        fake_shop.user("u", ["a", "x", "b", "c", "d", None], candidates=["c", "y", "c", "a"], reason=" so \x07")
    )
    assert [step.item_id for step in row.history.interactions] == ["b", "c", "d"]
    assert (row.candidates, row.reason) == (("c", "a"), "so")
    assert row.history.example_id == "shop/u/6"


def test_interactions_keep_what_is_of_use() -> None:
    steps = [
        {"item_id": "a", "timestamp": 5, "rating": 4.0, "review": "<b>fine</b>"},
        {"item_id": "b", "timestamp": None, "rating": 9.0, "review": ""},
    ]
    data = pa.table({"history": pa.array([steps], pa.list_(INTERACTION))})
    row = known(fake_shop.user("u", data.to_pylist()[0]["history"]))
    first, second = row.history.interactions
    assert (first.timestamp, first.rating, first.review) == (5, 4.0, "fine")
    assert (second.timestamp, second.rating, second.review) == (1, None, None)
    other = {"item_id": "a", "timestamp": datetime(2020, 1, 1), "rating": Decimal("3.5")}
    [step] = known(fake_shop.user("u", [other])).history.interactions
    assert (step.timestamp, step.rating) == (1577836800, 3.5)
    [step] = known(fake_shop.user("u", [{"item_id": "a", "timestamp": 2**63}])).history.interactions
    assert step.timestamp == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (fake_shop.user(None), "no user"),
        (fake_shop.user("u", domain="books"), "unknown domain"),
        (fake_shop.user("u", domain=None), "unknown domain"),
        (fake_shop.user("u", None), "empty history"),
        (fake_shop.user("u", []), "empty history"),
        (fake_shop.user("u", ["x", None]), "unknown items only"),
        (fake_shop.user("u", ["a"], candidates=["x"]), "no known candidates"),
        (fake_shop.user("u", ["a"], candidates=[]), "no known candidates"),
    ],
)
def test_what_cannot_be_scored_says_why(row: dict[str, Any], reason: str) -> None:
    found = understand(row, "users.parquet:7", ITEMS, 3, None)
    assert isinstance(found, Reject)
    assert (found.key, found.reason) == ("users.parquet:7", reason)
