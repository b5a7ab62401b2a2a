"""Raw rows → interactions, items, examples, in steps that each hold one hash partition of users (or of items).

    read_file    a file's rows are dealt out to partitions: interactions by user, items by item
    deduplicate  one interaction a user and item; users and items become numbers
    choose       which interactions stay (`choosing`), on two numbers for each
    split        order by time, hold targets out, write `interactions` and `examples`
    tally        training interactions of each item, added up over partitions
    describe     join what the sources say of the remaining items, write `items`

A step is a function of a stage and some numbers: domain, partition. It reads and writes `pieces` in a scratch folder of
the workspace and returns counts. So steps run anywhere, may be tried again, and the driver never sees a row. Reviews
are read twice only: when they are dealt out, and, those that stay, when they are written.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pulse_ray.config import FileSource
from pulse_ray.data import files
from pulse_ray.data.files import FileKind
from pulse_ray.data.pieces import SCRATCH, Counts, Pieces
from pulse_ray.data.read_progress import Phase, ReadProgress
from pulse_ray.data.sources import RAW_INTERACTIONS, RAW_ITEMS, Chunk, Row, read
from pulse_ray.data.splitting import Rows, leave_two_out, temporal
from pulse_ray.data.synthetic import Shop
from pulse_ray.data.tidy import tidy_item
from pulse_ray.errors import DataError
from pulse_ray.progress import ReportGuard
from pulse_ray.schema import INTERACTION, TABLES, Reject, Split
from pulse_ray.seeding import derive
from pulse_ray.text import clean, item_text
from pulse_ray.workspace import Artefact, Part, StageRun

ITEM_COUNTS = ("items", "made_titles", "without_text")
"""What `describe` counts: items, those whose title had to be made, those of which nothing is known but the id."""

IN_ORDER = "in-order"
"""A note that a domain's rows come in the order of their users' sequences."""

TEXT_BYTES = 2**31 - 1
"""Bytes of text that one arrow array of strings can address."""

_FILE = 2**40
"""More than any file has lines: an order among the lines of several files."""

_UNCLEAN = r"[^\x20-\x7E]|[<&]|  |^ | $"
"""What a text holds if `text.clean` can change it."""


def list_files(stage: StageRun, domain: int) -> int:
    """Notes which files the domain has, once for all steps: what lies in a folder may change. Returns how many.

    Raises:
        DataError: as `files.found`.
    """
    config = stage.config.prepare.domains[domain]
    found = files.found(config) if isinstance(config.source, FileSource) else [("interactions", "")]
    stage.workspace.artefact(SCRATCH).write_bytes(f"files-{domain}.json", json.dumps(found).encode())
    return len(found)


def _files(stage: StageRun, domain: int) -> list[tuple[FileKind, str]]:
    """Role and address of each of the domain's files; a synthetic shop is one without an address."""
    listed = stage.workspace.artefact(SCRATCH).read_bytes(f"files-{domain}.json") or b"[]"
    return [(role, address) for role, address in json.loads(listed)]


def read_file(stage: StageRun, domain: int, file: int) -> Counts:
    """Deals the rows of one of the domain's files out to partitions; rows that cannot be used go to the rejects."""
    name, pieces = stage.config.prepare.domains[domain].name, Pieces(stage, domain)
    role, address = _files(stage, domain)[file]
    counts: Counter[str] = Counter()

    def publish(phase: Phase, fraction: float) -> None:
        pieces.note(f"{phase}-{file:04d}", fraction)

    progress = ReadProgress(publish, stage.config.cluster.report_interval_s)
    with (
        pieces.dealer(f"rows-{file:04d}", RAW_INTERACTIONS, key="user_id") as interactions,
        pieces.dealer(f"about-{file:04d}", RAW_ITEMS, key="item_id") as items,
    ):
        for number, chunk in enumerate(_chunks(stage, domain, role, address, progress)):
            _set_aside(stage, f"{name}-{file:04d}-{number:05d}", chunk.rejects)
            interactions.deal(_ordered(chunk.interactions, file))
            items.deal(_ordered(chunk.items, file))
            counts.update(rows=chunk.interactions.num_rows, **{f"mended {what}": n for what, n in chunk.mended.items()})
            if role == "interactions":
                counts.update(rejects=len(chunk.rejects))
            if chunk.in_order:
                pieces.note(IN_ORDER, 1)
                counts["in_order"] = 1
    ReportGuard(address).run(lambda: publish("read", 1.0))
    return dict(counts)


def published(stage: StageRun, phase: Phase, numbers: Sequence[tuple[int, ...]]) -> float:
    """Mean fraction of some files that is downloaded or read, from 0 to 1.

    Args:
        numbers: of each file, the numbers of its domain and of the file.
    """
    return sum(Pieces(stage, domain).noted(f"{phase}-{file:04d}") for domain, file in numbers) / len(numbers)


def rejects(stage: StageRun) -> Artefact:
    """Rows that could not be used, kept with the pieces until the stage knows that the rest can be."""
    return Artefact(stage.workspace.filesystem, f"{stage.workspace.artefact(SCRATCH).path}/rejects", "rejects")


def _set_aside(stage: StageRun, part: Part, found: Sequence[Reject]) -> None:
    if found:
        rows = [{"stage": stage.spec.name, **asdict(one)} for one in found]
        rejects(stage).write(part, pa.Table.from_pylist(rows, schema=TABLES["rejects"]))


def _chunks(stage: StageRun, domain: int, role: FileKind, address: str, progress: ReadProgress) -> Iterator[Chunk]:
    config = stage.config.prepare.domains[domain]
    if isinstance(config.source, FileSource):
        yield from read(address, role, config.source, stage.config.prepare, progress)
        return
    shop = Shop(config.source, derive(stage.config.seed, "synthetic", config.name))
    # For tests alone: what drove each purchase. No stage reads it.
    truth = stage.workspace.artefact("truth")
    for name, table in (("items", shop.item_motives()), ("purchases", shop.purchase_motives())):
        buffer = io.BytesIO()
        pq.write_table(table, buffer, compression="zstd")
        truth.write_bytes(f"{config.name}-{name}.parquet", buffer.getvalue())
    yield Chunk(interactions=shop.interactions(), items=shop.items())


def _ordered(rows: pa.Table, file: int) -> pa.Table:
    """Rows whose order counts among those of all files."""
    place = rows.schema.get_field_index("order")
    return rows.set_column(place, rows.schema.field(place), pc.add(rows.column(place), file * _FILE))


def deduplicate(stage: StageRun, domain: int, partition: int) -> Counts:
    """Keeps the first or last interaction of each user and item, and numbers the partition's users and items."""
    prepare, pieces = stage.config.prepare, Pieces(stage, domain)
    rows = _rows(stage, pieces, partition, ["user_id", "item_id", "timestamp", "rating", "order"])
    users, items = (rows.column(name).combine_chunks().dictionary_encode() for name in ("user_id", "item_id"))
    frame = pl.DataFrame(
        {
            "row": np.arange(rows.num_rows, dtype=np.uint32),
            "user": users.indices.to_numpy(),
            "item": items.indices.to_numpy(),
            "timestamp": rows.column("timestamp").to_numpy(),
            "order": rows.column("order").to_numpy(),
        }
    )
    if prepare.min_rating is not None:
        low = pc.fill_null(pc.less(rows.column("rating"), pa.scalar(prepare.min_rating, pa.float32())), False)
        frame = frame.filter(~pl.Series(low.to_numpy()))
    # Ready sequences are in order as they stand, also where a user has several.
    by = ("order", "timestamp") if pieces.noted(IN_ORDER) else ("timestamp", "order")
    ordered = frame.sort("user", *by)
    unique = ordered.unique(["user", "item"], keep=prepare.duplicates, maintain_order=True)
    pieces.put("pairs", partition, unique.select("row", "user", "item", "timestamp"))
    for name, coded in (("user", users), ("item", items)):
        raw = np.bincount(frame[name], minlength=len(coded.dictionary))
        named = pl.DataFrame({f"{name}_id": pl.from_arrow(coded.dictionary), "raw": raw})
        pieces.put(f"{name}s", partition, named)
    return {
        "users": len(users.dictionary),
        "rated": frame.height,
        "rated_users": frame["user"].n_unique(),
        "unique": unique.height,
    }


def split(stage: StageRun, domain: int, partition: int, validation_from: int, test_from: int) -> Counts:
    """Writes the partition's interactions, ordered by user and time, and its examples."""
    prepare, pieces = stage.config.prepare, Pieces(stage, domain)
    kept = pieces.get("kept", partition)
    rows = _gather(stage, pieces, partition, kept["row"].to_numpy())
    by_user = pl.from_arrow(rows.column("user_id")).to_frame("user").with_row_index().sort("user", maintain_order=True)  # type: ignore[union-attr]
    order = by_user["index"].to_numpy()
    rows, items = rows.take(pa.array(order)), kept["item"].to_numpy()[order]
    starts = np.flatnonzero((by_user["user"] != by_user["user"].shift()).fill_null(True).to_numpy())
    steps = _steps(rows)
    _write_interactions(stage, domain, partition, rows.column("user_id"), steps)
    if prepare.split == "temporal":
        times = rows.column("timestamp").to_numpy()
        targets = temporal(starts, times, validation_from, test_from, prepare.positions_per_user)
    else:
        targets = leave_two_out(starts, len(items), prepare.positions_per_user)
    for name, found in targets.rows.items():
        _write_examples(stage, domain, partition, name, found, starts, rows.column("user_id"), steps)
    trained = np.unique(items[targets.trained], return_counts=True)
    pieces.put("training", partition, pl.DataFrame(dict(zip(("item", "count"), trained, strict=True))))
    return {"rows": rows.num_rows, "users": len(starts)} | {name: len(found) for name, found in targets.rows.items()}


def _rows(stage: StageRun, pieces: Pieces, partition: int, columns: Sequence[str]) -> pa.Table:
    """A partition's raw rows, of all files; of their columns only some."""
    found = [pieces.get(f"rows-{file:04d}", partition, columns) for file in range(len(_files(stage, pieces.domain)))]
    return pl.concat(found).to_arrow(compat_level=pl.CompatLevel.oldest())


def _gather(stage: StageRun, pieces: Pieces, partition: int, wanted: npt.NDArray[np.uint32]) -> pa.Table:
    """The raw rows with some numbers, in their order; what is not wanted is dropped batch by batch."""
    ordered = np.sort(wanted)
    kept, start, text_bytes = [RAW_INTERACTIONS.empty_table()], 0, 0
    for file in range(len(_files(stage, pieces.domain))):
        for batch in pieces.batches(f"rows-{file:04d}", partition):
            first, last = np.searchsorted(ordered, [start, start + batch.num_rows])
            if last > first:
                rows = batch.take(pa.array(ordered[first:last] - np.uint32(start)))
                kept.append(pa.Table.from_batches([rows]))
                text_bytes += pc.sum(pc.binary_length(rows.column("review"))).as_py() or 0
            start += batch.num_rows
    if text_bytes > TEXT_BYTES:
        needed = 2 ** (pieces.partitions * text_bytes // TEXT_BYTES).bit_length()
        raise DataError(
            f"domain '{stage.config.prepare.domains[pieces.domain].name}': the reviews of partition {partition} have "
            f"{text_bytes:,} bytes, and a partition can hold {TEXT_BYTES:,}",
            remedy=f"Set prepare.partitions={needed}, or lower prepare.max_review_chars",
        )
    return pa.concat_tables(kept).combine_chunks().take(pa.array(np.searchsorted(ordered, wanted)))


def _steps(rows: pa.Table) -> pa.StructArray:
    columns = [rows.column(name).combine_chunks() for name in ("item_id", "timestamp", "rating")]
    reviews = pl.from_arrow(rows.column("review"))
    assert isinstance(reviews, pl.Series)
    unclean = reviews.str.contains(_UNCLEAN).fill_null(False).arg_true()
    mended = [clean(review) or None for review in reviews.gather(unclean)]
    reviews = reviews.scatter(unclean, pl.Series(mended, dtype=pl.String))
    columns.append(reviews.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string()))
    return pa.StructArray.from_arrays(columns, fields=list(INTERACTION))


def _write_interactions(stage: StageRun, domain: int, partition: int, users: pa.Array, steps: pa.StructArray) -> None:
    if len(users):
        name = pa.repeat(stage.config.prepare.domains[domain].name, len(users))
        table = pa.Table.from_arrays([name, users, *steps.flatten()], schema=TABLES["interactions"])
        stage.output("interactions").write(f"part-{_number(stage, domain, partition):04d}", table)


def _write_examples(
    stage: StageRun,
    domain: int,
    partition: int,
    part: Split,
    targets: Rows,
    starts: Rows,
    users: pa.ChunkedArray,
    steps: pa.StructArray,
) -> None:
    """The examples of one split, in shards of `shard_examples`, or fewer where their reviews exceed `TEXT_BYTES`.

    Args:
        targets: rows of `steps` that are targets.
        starts: first rows of the users.
    """
    prepare = stage.config.prepare
    name = prepare.domains[domain].name
    all_places = targets - starts[np.searchsorted(starts, targets, side="right") - 1]
    all_lengths = np.minimum(all_places, prepare.max_sequence)
    review_lengths = pc.fill_null(pc.binary_length(steps.field("review")), 0).to_numpy()
    review_ends = np.concatenate([[0], np.cumsum(review_lengths, dtype=np.int64)])
    review_bytes = review_ends[targets] - review_ends[targets - all_lengths]
    for chunk, (first, last) in enumerate(_shards(review_bytes, prepare.shard_examples)):
        at, places, lengths = targets[first:last], all_places[first:last], all_lengths[first:last]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        within = np.arange(offsets[-1]) + np.repeat(at - lengths - offsets[:-1], lengths)
        histories = pa.ListArray.from_arrays(
            offsets.astype(np.int32), steps.take(pa.array(within)), type=pa.list_(INTERACTION)
        )
        own = users.take(pa.array(at)).combine_chunks()
        domains = pa.repeat(name, len(at))
        columns = [
            pc.binary_join_element_wise(domains, own, pa.array(places).cast(pa.string()), "/"),
            domains,
            own,
            pa.repeat(part, len(at)),
            histories,
            steps.field("item_id").take(pa.array(at)),
        ]
        table = pa.Table.from_arrays(columns, schema=TABLES["examples"])
        stage.output("examples").write(f"{part}-{_number(stage, domain, partition):04d}-{chunk:04d}", table)


def _shards(review_bytes: Rows, most: int) -> Iterator[tuple[int, int]]:
    """Bounds of consecutive shards of at most `most` examples and `TEXT_BYTES` of reviews, but of one at least."""
    ends, first = np.cumsum(review_bytes), 0
    while first < len(ends):
        before = ends[first - 1] if first else 0
        fitting = int(np.searchsorted(ends, before + TEXT_BYTES, side="right"))
        last = max(first + 1, min(first + most, fitting))
        yield first, last
        first = last


def tally(stage: StageRun, domain: int) -> Counts:
    """Adds up how often each item stands in training, and leaves that by the items' partition."""
    pieces = Pieces(stage, domain)
    sold = [pieces.get("sold", partition) for partition in range(pieces.partitions)]
    totals = np.zeros(1 + max((int(one["item"].max() or 0) for one in sold if one.height), default=0), dtype=np.int64)  # type: ignore[arg-type]
    for partition in range(pieces.partitions):
        training = pieces.get("training", partition)
        totals[training["item"].to_numpy()] += training["count"].to_numpy()
    for partition, one in enumerate(sold):
        counts = one.select("item_id", count=pl.Series(totals[one["item"].to_numpy()])).sort("item_id")
        pieces.put("popularity", partition, counts)
    return {}


def describe(stage: StageRun, domain: int, partition: int) -> Counts:
    """Writes the partition's items that have interactions left, by id, with what the sources say of them."""
    pieces = Pieces(stage, domain)
    counts = pieces.get("popularity", partition)
    fields: dict[str, Row] = {item: {} for item in counts["item_id"]}
    twice = 0
    # Metadata first: it knows more than a review's title.
    roles = [role for role, _ in _files(stage, domain)]
    for file, role in sorted(enumerate(roles), key=lambda one: one[1] != "items"):
        rows = pieces.get(f"about-{file:04d}", partition).join(counts, on="item_id", how="semi").sort("order")
        twice += (rows.height - rows["item_id"].n_unique()) * (role == "items")
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
    found = dict(zip(ITEM_COUNTS, (len(items), made, unknown), strict=True))
    return found | ({"mended items named twice": twice} if twice else {})


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


def written(stage: StageRun, domain: int) -> int:
    """Rows of the domain in `interactions`, as its files say."""
    interactions, partitions = stage.output("interactions"), range(stage.config.prepare.partitions)
    own = {f"part-{_number(stage, domain, partition):04d}" for partition in partitions}
    return sum(interactions.num_rows(part) for part in interactions.parts() if part in own)


def _number(stage: StageRun, domain: int, partition: int) -> int:
    return domain * stage.config.prepare.partitions + partition
