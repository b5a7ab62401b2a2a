"""Formats of outside files: how each is told, and under which names it keeps our columns.

amazon2014   JSON lines; metadata may be Python literals           reviewerID, asin, overall, reviewText
amazon2018   JSON lines; some reviews carry the item's title       the same; category[], description[]
amazon2023   JSON lines; times in milliseconds                     user_id, parent_asin, rating, text; store
recbole      atomic files: tabs, a header of `name:type`           user_id, item_id, rating, timestamp
table        parquet, csv, JSON lines                              as `source.columns` says
sequences    JSON lines of ordered items, without times            user_id, items[]
"""

from __future__ import annotations

import csv
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import pyarrow.parquet as pq

from pulse_ray.config import FileSource
from pulse_ray.data import files
from pulse_ray.data.files import FileKind
from pulse_ray.data.jsonlines import LineError, loads
from pulse_ray.data.read_progress import ReadProgress
from pulse_ray.errors import DataError

Container = Literal["json", "csv", "parquet"]
SNIFFED_LINES = 100
"""Lines that tell the format."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a file is, and where it keeps what.

    `names` gives, for each column of ours, the file's columns that make it; texts of several are joined. Columns that
    the file lacks are left out. `lists` are those of the file's columns whose values are lists of texts.
    """

    kind: str
    container: Container
    names: Mapping[str, tuple[str, ...]]
    lists: Collection[str] = ()
    integers: Collection[str] = ()
    """Those of a JSON file's columns that hold whole numbers."""
    delimiter: str = ","
    literals: bool = False
    milliseconds: bool = False
    header: Mapping[str, str] = field(default_factory=dict)
    """For csv: the file's name of a column by the name without its type."""


_REVIEW = {"user_id": "reviewerID", "item_id": "asin", "timestamp": "unixReviewTime", "rating": "overall"}
_REVIEW |= {"review": "reviewText", "title": "title"}
_REVIEW_2023 = {"user_id": "user_id", "item_id": "parent_asin", "timestamp": "timestamp", "rating": "rating"}
_REVIEW_2023 |= {"review": "text"}

NAMES: dict[tuple[str, FileKind], dict[str, tuple[str, ...]]] = {
    ("amazon2014", "interactions"): {ours: (theirs,) for ours, theirs in _REVIEW.items()},
    ("amazon2018", "interactions"): {ours: (theirs,) for ours, theirs in _REVIEW.items()},
    ("amazon2023", "interactions"): {ours: (theirs,) for ours, theirs in _REVIEW_2023.items()},
    ("sequences", "interactions"): {"user_id": ("user_id",), "item_id": ("items",)},
    ("amazon2014", "items"): {
        "item_id": ("asin",),
        "title": ("title",),
        "description": ("description",),
        "brand": ("brand",),
        "categories": ("categories",),
    },
    ("amazon2018", "items"): {
        "item_id": ("asin",),
        "title": ("title",),
        "description": ("description",),
        "brand": ("brand",),
        "categories": ("category",),
    },
    ("amazon2023", "items"): {
        "item_id": ("parent_asin",),
        "title": ("title",),
        "description": ("description", "features"),
        "brand": ("store",),
        "categories": ("categories",),
    },
}
LISTS = ("items", "category", "categories", "features")
"""Columns that hold lists where the first lines do not show it."""
COLUMNS: dict[FileKind, tuple[str, ...]] = {
    "interactions": ("user_id", "item_id", "timestamp", "rating", "review", "title"),
    "items": ("item_id", "title", "description", "brand", "categories"),
}
IDS = ("user_id", "item_id")
NEEDED: dict[FileKind, tuple[str, ...]] = {"interactions": (*IDS, "timestamp"), "items": ("item_id",)}
OTHERS_TITLE = "title"
"""In interactions it may be the review's own, so it is the item's only where the configuration says so."""


def tell(
    address: str, role: FileKind, source: FileSource, downloads: str, progress: ReadProgress | None = None
) -> Format:
    """The format of a file, from the configuration or else from its ending and its first lines.

    Args:
        progress: counts the bytes of a download, which is made here.

    Raises:
        DataError: it is of no known format, or lacks a column that is needed.
    """
    stem = files.stem(address)
    tabular = stem.endswith((".parquet", ".inter", ".item", ".csv", ".tsv"))
    if tabular and source.kind not in ("auto", "table", "recbole"):
        raise DataError(f"{files.shown(address)} is no file of '{source.kind}'", remedy="Set source.kind=table")
    if stem.endswith(".parquet"):
        with files.seekable(address, downloads, progress) as file:
            schema = pq.read_schema(file)
        lists = [one.name for one in schema if str(one.type).startswith(("list", "large_list"))]
        return _named(address, role, source, "parquet", dict.fromkeys(schema.names), lists)
    if tabular or source.kind == "recbole":
        return _separated(address, role, source, downloads, progress)
    example, literal = _example(address, downloads, progress)
    renamed = _renamed(role, source)
    kind = source.kind if source.kind not in ("auto", "sequences") else "table" if renamed else _kind(example, role)
    if renamed and kind != "table":
        raise DataError(f"{files.shown(address)}: '{kind}' has columns of its own", remedy="Remove source.columns")
    if kind == "auto":
        keys = ", ".join(list(example)[:8])
        raise DataError(
            f"{files.shown(address)}: no format has lines with the keys {keys or '(none: no line is a JSON object)'}",
            remedy="Name source.kind, or what its columns are called in source.columns with source.kind=table",
        )
    if kind == "table":
        lists = [key for key, value in example.items() if isinstance(value, list)]
        return _named(address, role, source, "json", example, lists, integers=_integers(example))
    names = NAMES[kind, role]
    theirs = [name for group in names.values() for name in group]
    return Format(
        kind=kind,
        container="json",
        names=names,
        lists=[name for name in theirs if isinstance(example.get(name, [] if name in LISTS else ""), list)],
        integers=_integers(example) if kind == "sequences" else (),
        literals=literal or kind == "amazon2014",
        milliseconds=kind == "amazon2023",
    )


def _kind(example: Mapping[str, Any], role: FileKind) -> str:
    if role == "interactions" and isinstance(example.get("items"), list) and "user_id" in example:
        return "sequences"
    if "parent_asin" in example:
        return "amazon2023"
    if role == "interactions":
        if "reviewerID" in example or "asin" in example:
            return "amazon2018"
        return "table" if {"user_id", "item_id"} <= example.keys() else "auto"
    if "asin" in example:
        return "amazon2014" if "categories" in example else "amazon2018"
    return "table" if "item_id" in example else "auto"


def _named(
    address: str,
    role: FileKind,
    source: FileSource,
    container: Container,
    present: Iterable[str],
    lists: Collection[str] = (),
    **more: Any,
) -> Format:
    """A table's format, by the names that the configuration gives to its columns."""
    present, section = list(present), "item_columns" if role == "items" and source.item_columns else "columns"
    names = {ours: getattr(getattr(source, section), ours) for ours in COLUMNS[role]}
    for ours in dict.fromkeys((*NEEDED[role], *_renamed(role, source))):
        if names[ours] not in present:
            raise DataError(
                f"{files.shown(address)} has no column '{names[ours]}'; it has {', '.join(present[:12]) or 'none'}",
                remedy=f"Say in source.{section}.{ours} what it is called",
            )
        if ours in IDS and names[ours] in lists:
            raise DataError(
                f"{files.shown(address)}: column '{names[ours]}' holds lists, not ids",
                remedy="Ready sequences are read from JSON lines of user_id and items",
            )
    if role == "interactions" and OTHERS_TITLE not in source.columns.model_fields_set:
        del names[OTHERS_TITLE]
    # Lines of JSON may have a key that the first ones lack.
    kept = {ours: (theirs,) for ours, theirs in names.items() if theirs in present or container == "json"}
    return Format(kind="table", container=container, names=kept, lists=lists, **more)


def _renamed(role: FileKind, source: FileSource) -> list[str]:
    """Columns that the configuration names for files of a role, which then must be there."""
    if role == "items":
        named = source.item_columns.model_fields_set if source.item_columns else set()
        return [ours for ours in COLUMNS[role] if ours in named]
    return [ours for ours in COLUMNS[role] if ours in source.columns.model_fields_set and ours != OTHERS_TITLE]


def _integers(example: Mapping[str, Any]) -> list[str]:
    def whole(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool)

    return [key for key, value in example.items() if whole(value[0] if isinstance(value, list) and value else value)]


def _separated(
    address: str, role: FileKind, source: FileSource, downloads: str, progress: ReadProgress | None
) -> Format:
    """Comma- or tab-separated values; names of atomic files end in their type."""
    _, block = next(files.blocks(address, downloads, progress), (0, b""))
    first = block.partition(b"\n")[0].decode("utf-8-sig", "replace").rstrip("\r")
    delimiter = "\t" if "\t" in first or files.stem(address).endswith((".inter", ".item", ".tsv")) else ","
    header = next(csv.reader([first], delimiter=delimiter), [])
    if not header:
        raise DataError(f"{files.shown(address)} is empty", remedy="Give a file with a header and rows")
    atomic = source.kind == "recbole" or files.stem(address).endswith((".inter", ".item"))
    plain = {name.rpartition(":")[0] if atomic and ":" in name else name: name for name in header}
    made = _named(address, role, source, "csv", plain, delimiter=delimiter, header=plain)
    return replace(made, kind="recbole") if atomic else made


def _example(address: str, downloads: str, progress: ReadProgress | None) -> tuple[dict[str, Any], bool]:
    """The keys of the first lines, each with its first value that says something; whether lines are Python literals."""
    _, block = next(files.blocks(address, downloads, progress), (0, b""))
    example: dict[str, Any] = {}
    literal = False
    for line in block.split(b"\n", SNIFFED_LINES)[:SNIFFED_LINES]:
        for literals in (False, True):
            try:
                row = loads(line, literals=literals)
            except LineError:
                continue
            example |= {key: value for key, value in row.items() if not example.get(key)}
            literal |= literals
            break
    return example, literal
