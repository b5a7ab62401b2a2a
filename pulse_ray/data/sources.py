"""Formats of reviews and metadata → raw rows in chunks; no file is ever held whole.

Amazon 2018: JSON lines, plain or gzip. Reviews carry `reviewerID, asin, overall, reviewText, unixReviewTime` and, in
some collections, the item's `title`; metadata carries `asin, title, description[], brand, category[]`.
Rows are passed on as they stand in the file; `tidy_item` and `text.clean` make them readable later, in parallel.
"""

from __future__ import annotations

import gzip
import io
import re
import textwrap
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import orjson
import pyarrow as pa
import pyarrow.fs as pafs

from pulse_ray.config import Amazon2018Source, DomainConfig, PrepareConfig
from pulse_ray.data.download import fetch
from pulse_ray.errors import DataError
from pulse_ray.schema import Reject
from pulse_ray.text import clean

FileKind = Literal["reviews", "metadata"]
Row = dict[str, Any]

RAW_INTERACTIONS = pa.schema(
    {
        "user_id": pa.string(),
        "item_id": pa.string(),
        "timestamp": pa.int64(),
        "rating": pa.float32(),
        "review": pa.string(),
        "order": pa.int64(),  # line of the file: breaks ties of time
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

CHUNK_LINES = 50_000
LATEST_TIMESTAMP = 4_102_444_800  # the year 2100: a larger number is not in seconds
RAW_DESCRIPTION_CHARS, DESCRIPTION_CHARS, TITLE_CHARS = 6000, 600, 250

# What scraping leaves in text fields besides tags: the page's scripts, and place holders.
_SCRIPT = re.compile(r"getTime\(\)|function ?\(|^\s*var \w+ ?=")
_PLACEHOLDER = re.compile(r"(SPID )?SHORT DESCRIPTION NOT AVAILABLE\W*", re.IGNORECASE)
_BRAND_BY = re.compile(r"\s*by\s*\n\s*")
_BRAND_PAGE = re.compile(r"Visit Amazon's (.*) Page")


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some lines of a file: usable rows (`RAW_INTERACTIONS`, `RAW_ITEMS`) and the lines that were set aside."""

    interactions: pa.Table
    items: pa.Table
    rejects: tuple[Reject, ...] = ()


class _LineError(Exception):
    """A row that must be set aside: a short reason and the detail."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason)
        self.reject = (reason, str(detail)[:200])


def addresses(domain: DomainConfig) -> dict[FileKind, str]:
    """The domain's outside files; local paths are made absolute."""
    source = domain.source
    if not isinstance(source, Amazon2018Source):
        return {}
    given: dict[FileKind, str] = {"reviews": source.reviews}
    if source.metadata is not None:
        given["metadata"] = source.metadata
    return {kind: one if "://" in one else str(Path(one).expanduser().absolute()) for kind, one in given.items()}


def identity(domain: DomainConfig) -> str:
    """What a fingerprint should know of the domain's outside files; nothing is opened or downloaded.

    Local files are named by path, size and time of change, or `missing`; remote ones by address.
    """
    return ";".join(_file_identity(address) for address in addresses(domain).values())


def _file_identity(address: str) -> str:
    if "://" in address:
        return address
    try:
        status = Path(address).stat()
    except OSError:
        return "missing"
    return f"{address}:{status.st_size}:{status.st_mtime_ns}"


def read(address: str, kind: FileKind, config: PrepareConfig) -> Iterator[Chunk]:
    """The rows of one file, chunk by chunk.

    Raises:
        DataError: the file is missing, empty, damaged or cut off, or more than `max_reject_fraction` of its lines
            cannot be used. Raised after the chunks before that place were given out.
    """
    parse: Callable[[Row, int], tuple[Row | None, Row | None]] = _review if kind == "reviews" else _metadata
    interactions: list[Row] = []
    items: dict[str | int, Row] = {}
    rejects: list[Reject] = []
    first: Reject | None = None
    lines = rejected = 0
    for number, line in _lines(address, config.downloads):
        lines += 1
        try:
            interaction, item = parse(_parse_json(line), number)
        except _LineError as error:
            reason, detail = error.reject
            rejects.append(Reject(key=f"{address}:{number}", reason=reason, detail=detail))
            first, rejected = first or rejects[0], rejected + 1
        else:
            if interaction is not None:
                interactions.append(interaction)
            if item is not None:
                # Reviews repeat one title over and over; lines of metadata may complete each other.
                items.setdefault(item["item_id"] if kind == "reviews" else number, item)
        if lines % CHUNK_LINES == 0:
            yield _chunk(interactions, items, rejects)
            interactions, items, rejects = [], {}, []
    yield _chunk(interactions, items, rejects)
    if not lines:
        raise DataError(f"{address} is empty", remedy="Give a file of JSON lines, one review or item a line")
    if first and rejected > config.max_reject_fraction * lines:
        more = f" (and {rejected - 1:,} more of {lines:,} lines)" if rejected > 1 else f" (1 of {lines:,} lines)"
        raise DataError(
            f"{first.key}: {first.reason}{more}",
            remedy="Mend the file (one JSON object a line), or raise prepare.max_reject_fraction",
        )


def _chunk(interactions: list[Row], items: dict[str | int, Row], rejects: list[Reject]) -> Chunk:
    return Chunk(
        interactions=pa.Table.from_pylist(interactions, schema=RAW_INTERACTIONS),
        items=pa.Table.from_pylist(list(items.values()), schema=RAW_ITEMS),
        rejects=tuple(rejects),
    )


def _parse_json(line: bytes) -> Row:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise _LineError("malformed JSON", error) from None
    if not isinstance(row, dict):
        raise _LineError("not a JSON object", line[:80])
    return row


def _review(row: Row, number: int) -> tuple[Row, Row | None]:
    """A line of a review file as an interaction and, where it names the item's title, an item."""
    item_id = _identifier(row.get("asin"), "review without item")
    rating, time = row.get("overall"), row.get("unixReviewTime")
    interaction = {
        "user_id": _identifier(row.get("reviewerID"), "review without user"),
        "item_id": item_id,
        "timestamp": _timestamp(time),
        "rating": None if rating is None else _rating(rating),
        "review": _text(row.get("reviewText")),
        "order": number,
    }
    title = _text(row.get("title"))
    item = {"item_id": item_id, "title": title, "order": number, "categories": []} if title else None
    return interaction, item


def _metadata(row: Row, number: int) -> tuple[None, Row]:
    """A line of a metadata file as an item."""
    return None, {
        "item_id": _identifier(row.get("asin"), "metadata without item"),
        "title": _text(row.get("title")),
        "description": " ".join(_texts(row.get("description")))[:RAW_DESCRIPTION_CHARS],
        "brand": _text(row.get("brand")),
        "categories": _texts(row.get("category")),
        "order": number,
    }


def _identifier(value: object, reason: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _LineError(reason, repr(value))
    return value.strip()


def _timestamp(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _LineError("review without time", repr(value))
    if not 0 <= value < LATEST_TIMESTAMP:
        raise _LineError("time not in seconds since 1970", repr(value))
    return int(value)


def _rating(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1 <= value <= 5:
        raise _LineError("rating not from 1 to 5", repr(value))
    return float(value)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None


def _texts(value: object) -> list[str]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, str) and entry]


def tidy_item(title: str | None, description: str | None, brand: str | None, categories: list[str]) -> Row:
    """An item's raw fields without markup, debris and place holders; what is unreadable becomes empty.

    >>> tidy_item('<span class="a-size', "var aPageStart = (new Date()).getTime();", "by\\n   Fernleaf", ["Tea", "Tea"])
    {'title': '', 'description': '', 'brand': 'Fernleaf', 'categories': ['Tea']}
    """
    brand = clean(_BRAND_BY.sub("", brand)) if brand and not _SCRIPT.search(brand) else ""
    page = _BRAND_PAGE.fullmatch(brand)
    kinds = (clean(category) for category in categories)
    return {
        "title": _readable(title, TITLE_CHARS),
        "description": _readable(description, DESCRIPTION_CHARS),
        "brand": page.group(1) if page else brand,
        "categories": list(dict.fromkeys(kind for kind in kinds if kind)),
    }


def _readable(raw: str | None, chars: int) -> str:
    if not raw or _SCRIPT.search(raw):
        return ""
    return textwrap.shorten(_PLACEHOLDER.sub("", clean(raw)), chars, placeholder=" …")


def _lines(address: str, downloads: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1."""
    number = 0
    again = "Copy or download the file again"
    try:
        with _open(address, downloads) as raw:
            zipped = address.partition("?")[0].endswith(".gz")
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw), 2**20) if zipped else raw  # type: ignore[arg-type]
            for number, line in enumerate(stream, start=1):
                if not line.isspace():
                    yield number, line
    except FileNotFoundError as error:
        raise DataError(
            f"no file {address}",
            remedy="Check the paths in prepare.domains; relative ones start where the command runs",
        ) from error
    except EOFError as error:
        raise DataError(f"{address}:{number + 1} is cut off: the gzip stream ends early", remedy=again) from error
    except gzip.BadGzipFile as error:
        what = f"{address}:{number + 1} is damaged: {error}" if number else f"{address} is not gzip"
        raise DataError(what, remedy=f"{again}; a plain file's name must not end in .gz") from error
    except (zlib.error, OSError, pa.ArrowInvalid) as error:
        raise DataError(f"{address}:{number + 1} cannot be read: {error}", remedy=again) from error


@contextmanager
def _open(address: str, downloads: str) -> Iterator[BinaryIO]:
    if address.startswith(("http://", "https://")):
        address = str(fetch(address, Path(downloads)))
    filesystem: pafs.FileSystem
    if "://" in address:
        filesystem, address = pafs.FileSystem.from_uri(address)
    else:
        filesystem = pafs.LocalFileSystem()
    with (
        filesystem.open_input_stream(address, compression=None) as stream,
        io.BufferedReader(stream, 2**20) as buffered,
    ):
        yield buffered
