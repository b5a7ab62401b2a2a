"""The peer of `prepare`: the same work in one process with all of it in memory, as one writes it with polars.

    python -m benchmarks._polars_prepare reviews.json.gz metadata.json.gz DOMAIN FOLDER

Reads Amazon 2018 files, sets unusable rows aside, keeps each user's first review of an item, takes the 5-core, cleans
texts, leaves two out and writes `interactions`, `items` and `examples` as Parquet into the folder. Cleaning calls the
very functions of the package, on those texts alone that need it. Prints a JSON object: seconds for the imports and for
the work, its steps, and the peak of the process's memory.
"""

from __future__ import annotations

import json
import sys
import time

STARTED = time.monotonic()

from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import polars as pl  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from pulse_ray.data.tidy import RAW_DESCRIPTION_CHARS, tidy_item  # noqa: E402
from pulse_ray.schema import TABLES  # noqa: E402
from pulse_ray.text import clean, item_text  # noqa: E402

IMPORTED = time.monotonic()

CORE = 5
MAX_SEQUENCE = 50
MAX_REVIEW_CHARS = 10_000
REVIEW = {
    "reviewerID": pl.String,
    "asin": pl.String,
    "unixReviewTime": pl.Int64,
    "overall": pl.Float32,
    "reviewText": pl.String,
}
ITEM: dict[str, pl.DataType | type[pl.DataType]] = {
    "asin": pl.String,
    "title": pl.String,
    "description": pl.List(pl.String),
    "brand": pl.String,
    "category": pl.List(pl.String),
}
NEEDS_CLEANING = r"[&<]|[^\S ]|  |^ | $|[^\x20-\x7E]"
STEP = ("item_id", "timestamp", "rating", "review")


def read_reviews(path: str) -> pl.DataFrame:
    """Usable reviews under the package's names; `order` is the line."""
    return (
        pl.scan_ndjson(path, schema=REVIEW)
        .with_row_index("order", offset=1)
        .select(
            "order",
            user_id=pl.col("reviewerID").str.strip_chars(),
            item_id=pl.col("asin").str.strip_chars(),
            timestamp="unixReviewTime",
            rating="overall",
            review=pl.col("reviewText").str.head(MAX_REVIEW_CHARS),
        )
        .filter(
            pl.col("user_id").str.len_bytes() > 0,
            pl.col("item_id").str.len_bytes() > 0,
            pl.col("timestamp").is_between(0, int(time.time())),
            pl.col("rating").is_null() | pl.col("rating").is_between(1, 5),
        )
        .collect()
    )


def core(reviews: pl.DataFrame) -> pl.DataFrame:
    """The k-core's reviews with their texts, by user and time."""
    pairs = reviews.select("user_id", "item_id", "timestamp", "order").sort("timestamp", "order")
    pairs = pairs.unique(["user_id", "item_id"], keep="first", maintain_order=True)
    before = -1
    while pairs.height != before:
        before = pairs.height
        pairs = pairs.filter(pl.len().over("item_id") >= CORE)
        pairs = pairs.filter(pl.len().over("user_id") >= CORE)
    return reviews.join(pairs.select("order"), on="order", how="semi").sort("user_id", "timestamp", "order")


def cleaned(rows: pl.DataFrame) -> pl.DataFrame:
    """With readable reviews; those without words are null."""
    dirty = pl.col("review").str.contains(NEEDS_CLEANING)
    mended = rows.filter(dirty).select("order", "review")
    mended = mended.with_columns(mended=pl.Series([clean(text) for text in mended["review"]], dtype=pl.String))
    rows = rows.join(mended.select("order", "mended"), on="order", how="left", maintain_order="left")
    review = pl.coalesce("mended", "review")
    return rows.select("user_id", *STEP[:-1], review=pl.when(review != "").then(review))


def split(rows: pl.DataFrame, domain: str) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Examples, the last two of each user held out, and each item's count of the others."""
    users = rows.group_by("user_id", maintain_order=True).agg(steps=pl.struct(STEP), length=pl.len().cast(pl.Int64))
    examples = []
    for name, back in (("train", 3), ("validation", 2), ("test", 1)):
        at = pl.col("length") - back
        start = pl.max_horizontal(at - MAX_SEQUENCE, 0)
        examples.append(
            users.select(
                example_id=pl.format(f"{domain}/{{}}/{{}}", "user_id", at),
                domain=pl.lit(domain),
                user_id="user_id",
                split=pl.lit(name),
                history=pl.col("steps").list.slice(start, at - start),
                target_item=pl.col("steps").list.get(at).struct.field("item_id"),
            )
        )
    trained = pl.int_range(pl.len()).over("user_id") < pl.len().over("user_id") - 2
    popularity = rows.select("item_id", trained=trained).group_by("item_id").agg(popularity=pl.col("trained").sum())
    return pl.concat(examples), popularity


def describe(path: str, popularity: pl.DataFrame, domain: str) -> list[dict[str, Any]]:
    """The items of the core with their texts; lines about one item complete each other, the first one first."""
    lines = pl.scan_ndjson(path, schema=ITEM).collect().join(popularity, left_on="asin", right_on="item_id", how="semi")
    known: dict[str, dict[str, Any]] = {}
    for asin, title, description, brand, categories in lines.iter_rows():
        text = " ".join(part for part in description or [] if part)[:RAW_DESCRIPTION_CHARS]
        about = tidy_item(title, text, brand, [kind for kind in categories or [] if kind])
        fields = known.setdefault(asin, {})
        fields |= {key: fields.get(key) or value for key, value in about.items()}
    nothing = tidy_item(None, None, None, [])
    items = []
    for item_id, count in popularity.iter_rows():
        about = known.get(item_id, nothing)
        title, text = item_text(about["title"], about["description"], about["brand"], about["categories"])
        items.append(
            about
            | {"domain": domain, "item_id": item_id, "title": title or item_id, "text": text or item_id}
            | {"popularity": count}
        )
    return items


def main(reviews: str, metadata: str, domain: str, folder: str) -> None:
    """Does the work, writes the tables and prints what it took."""
    seconds = {"imports": IMPORTED - STARTED}
    last = time.monotonic()

    def lap(name: str) -> None:
        nonlocal last
        seconds[name], last = time.monotonic() - last, time.monotonic()

    raw = read_reviews(reviews)
    lap("read")
    kept = core(raw)
    read, raw = raw.height, pl.DataFrame()
    lap("core")
    kept = cleaned(kept)
    lap("clean")
    examples, popularity = split(kept, domain)
    lap("split")
    items = describe(metadata, popularity, domain)
    lap("items")
    tables = {
        "interactions": kept.with_columns(domain=pl.lit(domain)).to_arrow(),
        "items": pa.Table.from_pylist(items, schema=TABLES["items"]),
        "examples": examples.to_arrow(),
    }
    for name, table in tables.items():
        columns = table.select(TABLES[name].names)
        pq.write_table(columns.cast(TABLES[name]), Path(folder) / f"{name}.parquet", compression="zstd")
    lap("write")
    status = Path("/proc/self/status").read_text()
    [peak] = [int(line.split()[1]) / 2**20 for line in status.splitlines() if line.startswith("VmHWM:")]
    work = sum(seconds.values()) - seconds["imports"]
    steps = {name: round(step, 2) for name, step in seconds.items()}
    figures = {
        "rows": read,
        "kept": kept.height,
        "work_s": round(work, 3),
        "peak_gib": round(peak, 2),
        "steps_s": steps,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
