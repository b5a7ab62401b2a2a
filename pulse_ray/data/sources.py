"""A file's usable rows in chunks, whatever its format; rows that cannot be used are set aside with a reason.

Rows are passed on as they stand in the file; `tidy` and `text.clean` make them readable later, in parallel, and only
where they are kept.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import polars as pl
import pyarrow as pa

from pulse_ray.config import FileSource, PrepareConfig
from pulse_ray.data import files, tabular
from pulse_ray.data.files import FileKind
from pulse_ray.data.formats import COLUMNS, IDS, Format, tell
from pulse_ray.data.jsonlines import Columns, Parsed, parse
from pulse_ray.data.read_progress import ReadProgress
from pulse_ray.data.tidy import RAW_DESCRIPTION_CHARS
from pulse_ray.errors import DataError, first_line
from pulse_ray.schema import Reject

Row = dict[str, Any]

RAW_INTERACTIONS = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "timestamp": pa.int64(),
        "rating": pa.float32(),
        "order": pa.int64(),  # line of the file: breaks ties of time
        "review": pa.string(),
    }
)
RAW_ITEMS = pa.schema(
    {
        "item_id": pa.string(),
        "title": pa.string(),
        "description": pa.string(),
        "brand": pa.string(),
        "categories": pa.list_(pa.string()),
        "order": pa.int64(),
    }
)

MILLISECONDS = 10**11
"""A time from here on is in milliseconds: in seconds it would lie beyond the year 5000."""
DAY_S = 86_400
ABOUT = {
    "interaction without item": "item_id",
    "interaction without user": "user_id",
    "rating not from 1 to 5": "rating",
    "item without id": "item_id",
}
"""The column that a reason to set a row aside is about; the others are about the time."""
TIMES, CUT = "times in milliseconds", "reviews cut"
"""What is put right in a row, and counted."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some rows of a file: usable ones (`RAW_INTERACTIONS`, `RAW_ITEMS`), those set aside, what was mended."""

    interactions: pa.Table
    items: pa.Table
    rejects: tuple[Reject, ...] = ()
    mended: Counter[str] = field(default_factory=Counter)
    in_order: bool = False
    """Whether the rows are those of ready sequences."""


def read(
    address: str, role: FileKind, source: FileSource, config: PrepareConfig, progress: ReadProgress | None = None
) -> Iterator[Chunk]:
    """The rows of one file, chunk by chunk.

    Args:
        progress: counts what is read, and is asked to report after each chunk.

    Raises:
        DataError: the file is missing, empty, damaged, cut off or of no known format, or more than
            `max_reject_fraction` of its rows cannot be used. Raised after the chunks before that place were given out.
    """
    progress = progress or ReadProgress()
    form = tell(address, role, source, config.downloads, progress)
    make = _interactions if role == "interactions" else _items
    first: Reject | None = None
    usable = 0
    reasons: Counter[str] = Counter()
    # While arrow parses blocks in threads of its own, the file is decompressed and rows are checked in this one.
    for parsed in _parsed(address, form, config, progress):
        progress.report()
        chunk = make(parsed, form, address, config)
        usable += chunk.interactions.num_rows if role == "interactions" else chunk.items.num_rows
        reasons.update(reject.reason for reject in chunk.rejects)
        first = first or next(iter(chunk.rejects), None)
        yield chunk
    rejected = reasons.total()
    if not usable + rejected:
        raise DataError(
            f"{files.shown(address)} is empty", remedy="Give a file of JSON lines, parquet or csv with rows in it"
        )
    if first and rejected > config.max_reject_fraction * (usable + rejected):
        counts = ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common())
        raise DataError(
            f"{first.key}: {first.reason} ({rejected:,} of {usable + rejected:,} rows cannot be used: {counts})",
            remedy="Mend the file, or raise prepare.max_reject_fraction",
        )


def _parsed(address: str, form: Format, config: PrepareConfig, progress: ReadProgress) -> Iterator[Parsed]:
    block_bytes = config.read_block_kib * 2**10
    if form.container == "parquet":
        return tabular.parquet(address, form, config.downloads, progress, config.read_batch_rows)
    if form.container == "csv":
        return tabular.separated(address, form, config.downloads, progress, block_bytes)
    columns = _json_columns(form)

    def work(block: tuple[int, bytes]) -> Parsed:
        return parse(block[1], block[0], columns)

    return _ahead(work, files.blocks(address, config.downloads, progress, block_bytes), pa.cpu_count())


def _json_columns(form: Format) -> Columns:
    kinds: dict[str, pa.DataType] = {"timestamp": pa.float64(), "rating": pa.float64()}
    schema = pa.schema(
        {
            theirs: pa.list_(pa.string()) if theirs in form.lists else kinds.get(ours, pa.string())
            for ours, group in form.names.items()
            for theirs in group
        }
    )
    ids = {theirs for ours in IDS for theirs in form.names.get(ours, ())}
    return Columns(schema=schema, integers=ids & set(form.integers), ids=ids & set(form.lists), literals=form.literals)


def _ahead(
    work: Callable[[tuple[int, bytes]], Parsed], blocks: Iterable[tuple[int, bytes]], threads: int
) -> Iterator[Parsed]:
    """Results in order, with as many blocks in work as there are threads."""
    waiting: deque[Future[Parsed]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for block in blocks:
            waiting.append(pool.submit(work, block))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _interactions(parsed: Parsed, form: Format, address: str, config: PrepareConfig) -> Chunk:
    frame = _frame(parsed, form, "interactions")
    if form.kind == "sequences":
        frame = _unrolled(frame)
    raw_time = _number("timestamp")
    in_ms = raw_time.abs() >= MILLISECONDS
    frame = frame.with_columns(
        user_id=pl.col("user_id").str.strip_chars(),
        item_id=pl.col("item_id").str.strip_chars(),
        seconds=pl.when(in_ms).then(raw_time / 1000).otherwise(raw_time).floor(),
        in_ms=in_ms,
        score=_number("rating"),
        long=pl.col("review").str.len_chars() > config.max_review_chars,
    )
    seconds, score = pl.col("seconds"), pl.col("score")
    latest = time.time() + DAY_S  # Clocks and zones differ.
    frame = frame.with_columns(
        reason=pl.when(_empty("item_id"))
        .then(pl.lit("interaction without item"))
        .when(_empty("user_id"))
        .then(pl.lit("interaction without user"))
        .when(seconds.is_null() | ~seconds.is_finite())
        .then(pl.lit("interaction without time"))
        .when(seconds < 0)
        .then(pl.lit("time before 1970"))
        .when(seconds > latest)
        .then(pl.lit("time in the future"))
        .when(pl.col("rating").is_not_null() & ~score.is_between(1, 5).fill_null(False))
        .then(pl.lit("rating not from 1 to 5"))
    )
    good = frame.filter(pl.col("reason").is_null())
    cut = pl.col("review").str.head(config.max_review_chars)
    rows = good.select(
        "user_id",
        "item_id",
        timestamp=pl.col("seconds").cast(pl.Int64),
        rating=pl.col("score").cast(pl.Float32),
        order=pl.col("number"),
        review=pl.when(pl.col("review") != "").then(pl.when(pl.col("long")).then(cut).otherwise(pl.col("review"))),
    )
    found = {TIMES: good["in_ms"].sum() * (not form.milliseconds), CUT: good["long"].sum()}
    return Chunk(
        interactions=rows.to_arrow().cast(RAW_INTERACTIONS),
        items=_told_items(good),
        rejects=_rejects(parsed, frame, address),
        mended=Counter({what: int(count) for what, count in found.items() if count}),
        in_order=form.kind == "sequences",
    )


def _items(parsed: Parsed, form: Format, address: str, config: PrepareConfig) -> Chunk:
    frame = _frame(parsed, form, "items").with_columns(item_id=pl.col("item_id").str.strip_chars())
    frame = frame.with_columns(reason=pl.when(_empty("item_id")).then(pl.lit("item without id")))
    good = frame.filter(pl.col("reason").is_null())
    kept = good.select(
        "item_id",
        "title",
        pl.col("description").str.head(RAW_DESCRIPTION_CHARS),
        "brand",
        "categories",
        order=pl.col("number"),
    )
    return Chunk(
        interactions=RAW_INTERACTIONS.empty_table(),
        items=kept.to_arrow().cast(RAW_ITEMS),
        rejects=_rejects(parsed, frame, address),
    )


def _frame(parsed: Parsed, form: Format, role: FileKind) -> pl.DataFrame:
    """The parsed columns under our names and as texts, numbers or, for categories, lists; with the rows' numbers."""
    theirs = pl.from_arrow(parsed.table)
    assert isinstance(theirs, pl.DataFrame)
    columns = [pl.Series("number", parsed.numbers, dtype=pl.Int64)]
    for ours in COLUMNS[role]:
        parts = [theirs[name] for name in form.names.get(ours, ())]
        columns.append(_column(ours, parts, theirs.height, keep_lists=form.kind == "sequences").alias(ours))
    return pl.DataFrame(columns)


def _column(ours: str, parts: list[pl.Series], height: int, *, keep_lists: bool) -> pl.Series:
    if not parts:
        kind = pl.List(pl.String) if ours == "categories" else pl.String
        return pl.Series(ours, [None] * height, dtype=kind)
    if ours == "categories":
        one = parts[0]
        if isinstance(one.dtype, pl.List):
            return one.cast(pl.List(pl.String))
        return one.cast(pl.String).to_frame("x").select(pl.concat_list("x").list.drop_nulls()).to_series()
    if keep_lists and ours == "item_id":
        return parts[0].cast(pl.List(pl.String))
    flat = [_flat(ours, part) for part in parts]
    if len(flat) == 1:
        return flat[0]
    return pl.DataFrame(flat).select(pl.concat_str(pl.all(), separator=" ", ignore_nulls=True)).to_series()


def _flat(ours: str, part: pl.Series) -> pl.Series:
    """A column's values as numbers where it holds numbers, else as texts.

    Raises:
        DataError: they are neither.
    """
    try:
        if isinstance(part.dtype, pl.Struct):  # Polars would print its fields, and ids would be made of that.
            raise pl.exceptions.InvalidOperationError("a struct has no text of its own")
        if isinstance(part.dtype, pl.List):
            return part.cast(pl.List(pl.String)).list.join(" ", ignore_nulls=True)
        if isinstance(part.dtype, pl.Datetime | pl.Date):
            return part.dt.epoch("s")
        if ours in ("timestamp", "rating") and part.dtype.is_numeric():
            return part.cast(pl.Float64).fill_nan(None)
        # Numbers with gaps become fractions on their way through other libraries: 1.0 is the id 1.
        whole = part.dtype.is_float() and bool((part.drop_nans() == part.drop_nans().floor()).all())
        return (part.fill_nan(None).cast(pl.Int64) if whole else part).cast(pl.String)
    except pl.exceptions.PolarsError as error:
        raise DataError(
            f"column '{part.name}' holds values of type {part.dtype}: {first_line(error)}",
            remedy="Store it as text or numbers",
        ) from error


def _unrolled(frame: pl.DataFrame) -> pl.DataFrame:
    """A row for each item of a sequence; its place stands for the time."""
    rows = frame.explode("item_id", empty_as_null=True)
    place = pl.int_range(pl.len()).over("number").cast(pl.Float64)
    return rows.with_columns(timestamp=place)


def _number(name: str) -> pl.Expr:
    """A column as numbers; what is none becomes null."""
    return pl.col(name).cast(pl.Float64, strict=False)


def _empty(name: str) -> pl.Expr:
    return pl.col(name).is_null() | (pl.col(name) == "")


def _told_items(good: pl.DataFrame) -> pa.Table:
    """Items that the rows name by title; reviews repeat one title over and over."""
    named = good.filter(~_empty("title")).unique("item_id", keep="first", maintain_order=True)
    bare = {"description": pl.lit(None, pl.String), "brand": pl.lit(None, pl.String)}
    kept = named.select("item_id", "title", **bare, categories=pl.lit(None, pl.List(pl.String)), order="number")
    return kept.to_arrow().cast(RAW_ITEMS)


def _rejects(parsed: Parsed, frame: pl.DataFrame, address: str) -> tuple[Reject, ...]:
    lines = [
        Reject(key=f"{files.shown(address)}:{number}", reason=why, detail=detail)
        for number, why, detail in parsed.faults
    ]
    for row in frame.filter(pl.col("reason").is_not_null()).iter_rows(named=True):
        detail = _detail(row)
        lines.append(Reject(key=f"{files.shown(address)}:{row['number']}", reason=row["reason"], detail=detail))
    return tuple(sorted(lines, key=lambda reject: int(reject.key.rpartition(":")[2])))


def _detail(row: Row) -> str:
    """The value that a reason is about."""
    return repr(row.get(ABOUT.get(row["reason"], "timestamp")))[:200]
