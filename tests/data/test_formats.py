"""The same reviews, written in each format, give the same tables."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from worlds import Prepare, Prepared, write_lines

LOOSE = {"min_user_interactions": 2, "min_item_interactions": 2, "partitions": 2}
Row = dict[str, Any]
World = tuple[list[Row], list[Row]]
Files = tuple[dict[str, bytes], dict[str, Any]]
"""Contents by name of a file, and what the source says beside the files' names."""

REVIEWS = [
    'She said "fine", and it was',
    "Soft  &amp; warm <b>indeed</b>",
    "Trop cher, déjà vu 🦊",
    "It's 5' 11\" tall",
    "back\\slash; comma, 'quote'",
    "null",
    "007",
    None,
]


@pytest.fixture(scope="module")
def world() -> World:
    """Interactions with ties, repeated pairs, and ratings and reviews that are missing; items, not all of them known.

    Half of the values read like numbers: no format may take them for such.
    """
    rng = random.Random(11)
    users = [f"u{n}" for n in range(20)] + [f"00{n}" for n in range(20)]
    items = [f"B{n:03d}" for n in range(15)] + [f"{n:04d}" for n in range(15)]
    rows = [
        {
            "user_id": rng.choice(users),
            "item_id": rng.choice(items),
            "rating": rng.choice([1.0, 2.0, 3.0, 4.0, 5.0, None]),
            "timestamp": 1_400_000_000 + 86_400 * rng.randrange(300),
            "review": rng.choice(REVIEWS),
        }
        for _ in range(500)
    ]
    about = [
        {
            "item_id": item,
            "title": rng.choice([f'The "{item}" lamp, large', f"1{item}", f"Tea &amp; {item}"]),
            "brand": rng.choice(["Fern & Sons", "O'Neill", "12", None]),
            "description": rng.choice(["Warm light.", "Made of wood, by hand.", None]),
            "categories": rng.choice([["Home", "Light, small"], ["Food"], []]),
        }
        for item in items[:25]
    ]
    return rows, about


def renamed(rows: Sequence[Row], names: dict[str, str]) -> list[Row]:
    """The rows under other names; what has no value is left out, as such files do."""
    return [{names[key]: value for key, value in row.items() if key in names and value is not None} for row in rows]


def lines(rows: Sequence[Row], spelled: Callable[[Row], str] = json.dumps) -> bytes:
    return "".join(spelled(row) + "\n" for row in rows).encode()


OLD = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime", "rating": "overall"}
OLD |= {"review": "reviewText"}


def amazon2014(world: World) -> Files:
    about = renamed(world[1], {"item_id": "asin", "title": "title", "brand": "brand", "description": "description"})
    for row, known in zip(about, world[1], strict=True):
        row["categories"] = [known["categories"]]
    reviews = [{"summary": "Ok", "helpful": [0, 1], **row} for row in renamed(world[0], OLD)]
    return {"reviews.json": lines(reviews), "meta.json": lines(about, repr)}, {}


def amazon2018(world: World) -> Files:
    about = renamed(world[1], {"item_id": "asin", "title": "title", "brand": "brand"})
    for row, known in zip(about, world[1], strict=True):
        row |= {"category": known["categories"], "description": [known["description"]] if known["description"] else []}
    reviews = [{"style": {"Size:": " 1"}, "verified": True, **row} for row in renamed(world[0], OLD)]
    return {"reviews.json": lines(reviews), "meta.json": lines(about)}, {}


def amazon2023(world: World) -> Files:
    new = {"user_id": "user_id", "item_id": "parent_asin", "rating": "rating", "review": "text"}
    reviews = renamed(world[0], new)
    for row, known in zip(reviews, world[0], strict=True):
        # `title` is the review's, and `asin` a variant of the item.
        row |= {"timestamp": known["timestamp"] * 1000 + 123, "title": "So so", "asin": "other", "images": []}
    about = renamed(world[1], {"item_id": "parent_asin", "title": "title", "brand": "store"})
    for row, known in zip(about, world[1], strict=True):
        row |= {"categories": known["categories"], "features": [], "main_category": "All", "details": {"a": 1}}
        row["description"] = [known["description"]] if known["description"] else []
    return {"reviews.jsonl": lines(reviews), "meta.jsonl": lines(about)}, {}


def recbole(world: World) -> Files:
    def atomic(rows: Sequence[Row], kinds: dict[str, str]) -> bytes:
        header = "\t".join(f"{name}:{kind}" for name, kind in kinds.items())
        values = ("\t".join("" if row[name] is None else str(row[name]) for name in kinds) for row in rows)
        return "".join(f"{line}\n" for line in (header, *values)).encode()

    kinds = {"user_id": "token", "item_id": "token", "rating": "float", "timestamp": "float", "review": "token_seq"}
    items = {"item_id": "token", "title": "token_seq", "brand": "token"}
    return {"shop.inter": atomic(world[0], kinds), "shop.item": atomic(world[1], items)}, {}


COLUMNS = {"user_id": "customer", "item_id": "sku", "timestamp": "when", "rating": "stars", "review": "words"}
COLUMNS |= {"title": "name", "brand": "maker", "description": "about", "categories": "shelves"}


def parquet(world: World) -> Files:
    def content(rows: Sequence[Row]) -> bytes:
        table = pa.Table.from_pylist([{COLUMNS[key]: value for key, value in row.items()} for row in rows])
        sink = io.BytesIO()
        pq.write_table(table, sink, row_group_size=100)
        return sink.getvalue()

    files = {"reviews.parquet": content(world[0]), "meta.parquet": content(world[1])}
    return files, {"kind": "table", "columns": COLUMNS}


def separated(world: World) -> Files:
    def content(rows: Sequence[Row], names: Sequence[str]) -> bytes:
        sink = io.StringIO()
        writer = csv.writer(sink)
        writer.writerows([[COLUMNS[name] for name in names], *([row[name] for name in names] for row in rows)])
        return sink.getvalue().encode()

    files = {
        "reviews.csv": content(world[0], ["review", "user_id", "rating", "timestamp", "item_id"]),
        "meta.csv": content(world[1], ["item_id", "brand", "title", "description"]),
    }
    return files, {"kind": "table", "columns": COLUMNS}


def json_table(world: World) -> Files:
    names = {name: name for name in COLUMNS}
    return {"reviews.jsonl": lines(renamed(world[0], names)), "meta.jsonl": lines(renamed(world[1], names))}, {}


FORMATS: dict[str, Callable[[World], Files]] = {
    writer.__name__: writer for writer in (amazon2014, amazon2018, amazon2023, recbole, parquet, separated, json_table)
}
LACKING = {"recbole": ("description", "categories"), "separated": ("categories",)}
"""What a format here does not carry."""
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": lambda content: pa.compress(content, "zstd", asbytes=True),
}


def run(prepared: Prepare, folder: Path, name: str, files: Files, ending: str = "") -> Prepared:
    """The tables from a format's files; their names end as they are packed."""
    contents, more = files
    source: dict[str, Any] = dict(more)
    folder.mkdir(exist_ok=True)
    for role, (file, content) in zip(("interactions", "items"), contents.items(), strict=True):
        path = folder / f"{file}{ending}"
        path.write_bytes(PACKED[ending](content))
        source[role] = str(path)
    return prepared(name, domains=[{"name": "shop", "source": source}], **LOOSE)


def tables(result: Prepared, without: Sequence[str] = ()) -> dict[str, list[Row]]:
    found = {name: result.rows(name) for name in ("interactions", "examples", "items")}
    found["items"] = [{key: row[key] for key in row if key not in without} for row in found["items"]]
    return found


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_tables(prepared: Prepare, tmp_path: Path, world: World, kind: str) -> None:
    expected = run(prepared, tmp_path / "expected", "expected", amazon2018(world))
    assert len(expected.rows("interactions")) > 300
    assert (
        len({row["title"] for row in expected.rows("items")} - {row["item_id"] for row in expected.rows("items")}) > 15
    )
    result = run(prepared, tmp_path / "files", "result", FORMATS[kind](world))
    without = LACKING.get(kind, ())
    assert tables(result, without) == tables(expected, without)
    assert result.metrics["interactions"]["accounting"] == expected.metrics["interactions"]["accounting"]
    assert result.stage.rejected() == {}


@pytest.mark.parametrize("kind", [name for name in FORMATS if name != "parquet"])
def test_packed_files_give_the_same_tables(prepared: Prepare, tmp_path: Path, world: World, kind: str) -> None:
    plain, gzipped, zstd = (
        tables(run(prepared, tmp_path / f"files{ending}", f"result{ending}", FORMATS[kind](world), ending))
        for ending in PACKED
    )
    assert gzipped == plain
    assert zstd == plain


@pytest.mark.parametrize("kind", ["amazon2014", "amazon2018", "amazon2023", "json_table"])
def test_the_first_lines_need_not_have_all_keys(prepared: Prepare, tmp_path: Path, world: World, kind: str) -> None:
    """More of them lack what the others have than are looked at to tell the format."""
    rows, about = world
    bare = [{**dict.fromkeys(about[0]), "item_id": f"unsold {n}", "title": "", "categories": []} for n in range(150)]
    early = [{**dict.fromkeys(rows[0]), "user_id": f"once {n}", "item_id": "B000", "timestamp": n} for n in range(150)]
    contents, more = FORMATS[kind]((early + rows, bare + about))
    result = run(prepared, tmp_path / "files", "result", (contents, more))
    expected = run(prepared, tmp_path / "expected", "expected", FORMATS[kind](world))
    assert tables(result) == tables(expected)
    assert result.stage.rejected() == {}


def test_a_format_that_is_named_is_read_as_it_is_told(prepared: Prepare, tmp_path: Path, world: World) -> None:
    for kind in ("amazon2014", "amazon2018", "amazon2023", "recbole"):
        files, _ = FORMATS[kind](world)
        told, named = (
            tables(run(prepared, tmp_path / kind, f"{kind}-{len(more)}", (files, more)))
            for more in ({}, {"kind": kind})
        )
        assert told == named


def test_several_files_are_one(prepared: Prepare, tmp_path: Path, world: World) -> None:
    """As a list, a folder or a pattern, in the order of their names; a file may be packed as it likes."""
    contents, _ = amazon2018(world)
    expected = tables(run(prepared, tmp_path / "expected", "expected", (contents, {})))
    folder = tmp_path / "parts"
    folder.mkdir()
    reviews, about = (content.decode().splitlines() for content in contents.values())
    parts = [
        str(write_lines(folder / "part-1.json", reviews[:200])),
        str(write_lines(folder / "part-2.json.gz", reviews[200:350])),
        str(write_lines(folder / "part-3.json", reviews[350:])),
    ]
    (folder / "_SUCCESS").write_bytes(b"")
    items = [str(write_lines(tmp_path / f"meta-{n}.json", about[n::2])) for n in range(2)]
    ways = {"list": parts, "folder": str(folder), "pattern": str(folder / "part-*")}
    for name, interactions in ways.items():
        source = {"interactions": interactions, "items": items}
        assert tables(prepared(name, domains=[{"name": "shop", "source": source}], **LOOSE)) == expected


def test_sequences_without_times_keep_their_order(prepared: Prepare, tmp_path: Path) -> None:
    sequences = {"u": ["c", "a", "b"], "v": ["b", "c"], "w": ["b", "a", "c", "d"]}
    rows = [{"user_id": user, "items": items} for user, items in sequences.items()]
    source = {"interactions": str(write_lines(tmp_path / "users.jsonl.gz", rows))}
    loose = {"min_user_interactions": 1, "min_item_interactions": 1, "partitions": 2}
    assert prepared(domains=[{"name": "shop", "source": source}], **loose).sequences() == sequences
