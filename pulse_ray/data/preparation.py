"""Raw rows → interactions, items, examples, in steps that each hold one hash partition of users (or of items).

    read_file    a file's rows are dealt out to partitions: interactions by user, items by item
    deduplicate  one interaction a user and item; items are counted
    weigh, thin  rare items are named, then dropped with rare users; again until none is rare (k-core), or once
    rank, limit  the users with the smallest hashes are chosen, where `max_users` is set
    split        order by time, leave two out, write `interactions` and `examples`
    describe     join what the sources say of the remaining items, write `items`

A step is a function of a stage and some numbers: domain, partition. It reads and writes `pieces` in a scratch folder of
the workspace and returns counts. So steps run anywhere, may be tried again, and the driver never sees a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from pulse_ray.config import SyntheticSource
from pulse_ray.data.pieces import SCRATCH, Pieces, parquet, stable_hash
from pulse_ray.data.sources import RAW_INTERACTIONS, RAW_ITEMS, Chunk, FileKind, Row, addresses, read, tidy_item
from pulse_ray.data.synthetic import Shop
from pulse_ray.schema import INTERACTION, SPLITS, TABLES, Reject, Split, example_id
from pulse_ray.seeding import derive
from pulse_ray.text import clean, item_text
from pulse_ray.workspace import Artefact, Part, StageRun

FILES: tuple[FileKind, ...] = ("reviews", "metadata")
EVERYONE = 2**63 - 1
"""The limit of hashes that lets every user pass."""

ITEM_COUNTS = ("items", "made_titles", "without_text")
"""What `describe` counts: items, those whose title had to be made, those of which nothing is known but the id."""

Counts = dict[str, int]


def read_file(stage: StageRun, domain: int, file: int) -> Counts:
    """Deals the rows of one of the domain's files out to partitions; lines that cannot be used go to the rejects."""
    name, kind, pieces = stage.config.prepare.domains[domain].name, FILES[file], Pieces(stage, domain)
    rows = 0
    with (
        pieces.dealer(f"{kind}-rows", RAW_INTERACTIONS, key="user_id") as interactions,
        pieces.dealer(f"{kind}-items", RAW_ITEMS, key="item_id") as items,
    ):
        for number, chunk in enumerate(_chunks(stage, domain, kind)):
            _set_aside(stage, f"{name}-{kind}-{number:05d}", chunk.rejects)
            interactions.deal(chunk.interactions)
            items.deal(chunk.items)
            rows += chunk.interactions.num_rows
    return {"rows": rows}


def rejects(stage: StageRun) -> Artefact:
    """Lines that could not be used, kept with the pieces until the stage knows that the rest can be."""
    return Artefact(stage.workspace.filesystem, f"{stage.workspace.artefact(SCRATCH).path}/rejects", "rejects")


def _set_aside(stage: StageRun, part: Part, found: Sequence[Reject]) -> None:
    if found:
        rows = [{"stage": stage.spec.name, **asdict(one)} for one in found]
        rejects(stage).write(part, pa.Table.from_pylist(rows, schema=TABLES["rejects"]))


def _chunks(stage: StageRun, domain: int, kind: FileKind) -> Iterator[Chunk]:
    config = stage.config.prepare.domains[domain]
    if not isinstance(config.source, SyntheticSource):
        yield from read(addresses(config)[kind], kind, stage.config.prepare)
        return
    shop = Shop(config.source, derive(stage.config.seed, "synthetic", config.name))
    # For tests alone: what drove each purchase. No stage reads it.
    truth = stage.workspace.artefact("truth")
    truth.write_bytes(f"{config.name}-items.parquet", parquet(shop.item_motives()))
    truth.write_bytes(f"{config.name}-purchases.parquet", parquet(shop.purchase_motives()))
    yield Chunk(interactions=shop.interactions(), items=shop.items())


def deduplicate(stage: StageRun, domain: int, partition: int) -> Counts:
    """Keeps the first or last interaction of each user and item, and counts items for the filter."""
    prepare, pieces = stage.config.prepare, Pieces(stage, domain)
    raw = pieces.get("reviews-rows", partition).with_columns(pl.len().over("user_id").alias("raw_count"))
    ordered = raw.sort("user_id", "timestamp", "order")
    unique = ordered.unique(["user_id", "item_id"], keep=prepare.duplicates, maintain_order=True)
    pieces.put("unique", partition, unique)
    pairs = unique.select("user_id", "item_id", "raw_count")
    pieces.put("pairs", partition, pairs)
    pieces.put("counts", partition, _item_counts(raw if prepare.filter == "single_pass" else pairs))
    return {"raw": raw.height, "rows": pairs.height, "users": pairs["user_id"].n_unique()}


def weigh(stage: StageRun, domain: int) -> Counts:
    """Adds the partitions' counts of items up and names the items that are too rare."""
    pieces = Pieces(stage, domain)
    totals = pieces.total("counts")
    rare = totals.filter(pl.col("count") < stage.config.prepare.min_item_interactions)
    pieces.put("rare", 0, rare.select("item_id"))
    return {"items": totals.height, "rare": rare.height}


def thin(stage: StageRun, domain: int, partition: int) -> Counts:
    """Drops the rare items' rows, then the rows of users with too few left (single pass: with too few raw ones)."""
    prepare, pieces = stage.config.prepare, Pieces(stage, domain)
    pairs = pieces.get("pairs", partition)
    pairs = pairs.join(pieces.get("rare", 0), on="item_id", how="anti")
    count = pl.col("raw_count") if prepare.filter == "single_pass" else pl.len().over("user_id")
    pairs = pairs.filter(count >= prepare.min_user_interactions)
    pieces.put("pairs", partition, pairs)
    pieces.put("counts", partition, _item_counts(pairs))
    return {"rows": pairs.height, "users": pairs["user_id"].n_unique()}


def rank(stage: StageRun, domain: int, partition: int) -> Counts:
    """Offers the partition's users with the smallest hashes."""
    pieces = Pieces(stage, domain)
    users = pieces.get("pairs", partition)["user_id"].unique()
    hashes = sorted(stable_hash(user) for user in users)[: stage.config.prepare.max_users]
    pieces.put("ranked", partition, pl.DataFrame({"hash": hashes}, schema={"hash": pl.Int64}))
    return {}


def limit(stage: StageRun, domain: int) -> Counts:
    """The hash of the last user to be kept."""
    pieces = Pieces(stage, domain)
    ranked = pl.concat([pieces.get("ranked", partition) for partition in range(pieces.partitions)])["hash"].sort()
    last = min(len(ranked), stage.config.prepare.max_users or len(ranked)) - 1
    return {"limit": int(ranked[last])}


def split(stage: StageRun, domain: int, partition: int, largest_hash: int) -> Counts:
    """Writes the partition's interactions, ordered by user and time, and its examples."""
    name, pieces = stage.config.prepare.domains[domain].name, Pieces(stage, domain)
    pairs = pieces.get("pairs", partition)
    users = pl.Series(
        [user for user in pairs["user_id"].unique() if stable_hash(user) <= largest_hash], dtype=pl.String
    )
    rows = pieces.get("unique", partition)
    rows = rows.filter(pl.col("user_id").is_in(users.implode()))
    rows = rows.join(pairs, on=["user_id", "item_id"], how="semi").sort("user_id", "timestamp", "order")
    steps = _steps(rows)
    lengths = rows.group_by("user_id", maintain_order=True).len()
    _write_interactions(stage, _number(stage, domain, partition), name, rows["user_id"], steps)

    targets: dict[Split, list[_Target]] = {part: [] for part in SPLITS}
    held_out = np.zeros(rows.height, dtype=bool)
    start = 0
    for user_id, length in lengths.iter_rows():
        for part, positions in leave_two_out(length, stage.config.prepare.positions_per_user).items():
            targets[part] += [(user_id, start, position) for position in positions]
            if part != "train":
                held_out[[start + position for position in positions]] = True
        start += length
    for part, chosen in targets.items():
        _write_examples(stage, f"{part}-{_number(stage, domain, partition):04d}", name, steps, chosen)

    seen = rows.select("item_id", trained=~pl.Series(held_out)).group_by("item_id").agg(pl.col("trained").sum())
    places = [pieces.place(item) for item in seen["item_id"]]
    counts = seen.select("item_id", count=pl.col("trained").cast(pl.Int64), place=pl.Series(places, dtype=pl.Int64))
    pieces.put("training", partition, counts)
    return {"rows": rows.height, "users": lengths.height} | {part: len(chosen) for part, chosen in targets.items()}


def leave_two_out(length: int, positions_per_user: int) -> dict[Split, list[int]]:
    """Positions of the targets in a sequence. The last is for test, the one before for validation, earlier ones, newest
    first, for training; a sequence of two only trains. The first position has no history and is never a target.

    >>> leave_two_out(6, 2)
    {'train': [3, 2], 'validation': [4], 'test': [5]}
    >>> leave_two_out(3, 2), leave_two_out(2, 2)
    ({'train': [], 'validation': [1], 'test': [2]}, {'train': [1], 'validation': [], 'test': []})
    """
    held_out = length >= 3
    last = length - 3 if held_out else length - 1
    return {
        "train": list(range(last, 0, -1))[:positions_per_user],
        "validation": [length - 2] if held_out else [],
        "test": [length - 1] if held_out else [],
    }


_Target = tuple[str, int, int]
"""User, first row of the user's sequence, position of the target in it."""


def _steps(rows: pl.DataFrame) -> pa.StructArray:
    reviews = [clean(review) or None for review in rows["review"]]
    columns = [
        pa.array(rows["item_id"].to_list(), pa.string()),
        pa.array(rows["timestamp"].to_numpy(), pa.int64()),
        pa.array(rows["rating"].to_list(), pa.float32()),
        pa.array(reviews, pa.string()),
    ]
    return pa.StructArray.from_arrays(columns, fields=list(INTERACTION))


def _write_interactions(stage: StageRun, number: int, name: str, users: pl.Series, steps: pa.StructArray) -> None:
    if len(users):
        columns = [pa.array([name] * len(users)), pa.array(users.to_list(), pa.string()), *steps.flatten()]
        table = pa.Table.from_arrays(columns, schema=TABLES["interactions"])
        stage.output("interactions").write(f"part-{number:04d}", table)


def _write_examples(stage: StageRun, prefix: str, name: str, steps: pa.StructArray, targets: list[_Target]) -> None:
    prepare = stage.config.prepare
    for chunk, first in enumerate(range(0, len(targets), prepare.shard_examples)):
        chosen = targets[first : first + prepare.shard_examples]
        spans = [(start + max(0, at - prepare.max_sequence), start + at) for _, start, at in chosen]
        offsets = np.cumsum([0, *(end - begin for begin, end in spans)]).astype(np.int32)
        within: npt.NDArray[np.int64] = np.concatenate([np.arange(begin, end) for begin, end in spans])
        histories = pa.ListArray.from_arrays(offsets, steps.take(pa.array(within)), type=pa.list_(INTERACTION))
        columns = [
            pa.array([example_id(name, user, at) for user, _, at in chosen]),
            pa.array([name] * len(chosen)),
            pa.array([user for user, _, _ in chosen]),
            pa.array([prefix.partition("-")[0]] * len(chosen)),
            histories,
            steps.field("item_id").take(pa.array([start + at for _, start, at in chosen])),
        ]
        table = pa.Table.from_arrays(columns, schema=TABLES["examples"])
        stage.output("examples").write(f"{prefix}-{chunk:04d}", table)


def describe(stage: StageRun, domain: int, partition: int) -> Counts:
    """Writes the partition's items that have interactions left, by id, with what the sources say of them."""
    pieces = Pieces(stage, domain)
    counts = pieces.total("training", place=partition)
    fields: dict[str, Row] = {item: {} for item in counts["item_id"]}
    for file in sorted(files(stage, domain), reverse=True):  # Metadata first: it knows more than a review's title.
        rows = pieces.get(f"{FILES[file]}-items", partition).join(counts, on="item_id", how="semi").sort("order")
        for row in rows.iter_rows(named=True):
            about = tidy_item(row["title"], row["description"], row["brand"], row["categories"] or [])
            known = fields[row["item_id"]]
            known |= {key: known.get(key) or value for key, value in about.items()}
    items = [
        _item(stage.config.prepare.domains[domain].name, item_id, count, fields[item_id])
        for item_id, count in counts.iter_rows()
    ]
    if items:
        table = pa.Table.from_pylist(items, schema=TABLES["items"])
        stage.output("items").write(f"part-{_number(stage, domain, partition):04d}", table)
    made = sum(not fields[item["item_id"]].get("title") for item in items)
    unknown = sum(item["text"] == item["item_id"] for item in items)
    return dict(zip(ITEM_COUNTS, (len(items), made, unknown), strict=True))


def _item(domain: str, item_id: str, popularity: int, about: Row) -> Row:
    description, brand = about.get("description", ""), about.get("brand", "")
    categories = about.get("categories", [])
    title, text = item_text(about.get("title", ""), description, brand, categories)
    return {
        "domain": domain,
        "item_id": item_id,
        "title": title or item_id,
        "description": description,
        "brand": brand,
        "categories": categories,
        "text": text or item_id,
        "popularity": popularity,
    }


def files(stage: StageRun, domain: int) -> list[int]:
    """Numbers of the files (in `FILES`) that the domain has; a synthetic shop counts as a file of reviews."""
    given = addresses(stage.config.prepare.domains[domain])
    return [number for number, kind in enumerate(FILES) if kind in given or (kind == "reviews" and not given)]


def _item_counts(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.group_by("item_id").agg(pl.len().cast(pl.Int64).alias("count"))


def _number(stage: StageRun, domain: int, partition: int) -> int:
    return domain * stage.config.prepare.partitions + partition
