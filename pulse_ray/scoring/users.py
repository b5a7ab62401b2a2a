"""The input of `pulse-ray score`: users in parquet files, cut into shards by row ranges that only footers decide.

Columns: `user_id`; `domain` (may be missing where there is one domain); `history`, oldest first, a list of item ids or
of `schema.INTERACTION`; and, if wanted, `candidates` (a list of item ids; null lets SASRec retrieve them) and `reason`.
Others are passed over.
"""

from __future__ import annotations

import posixpath
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pulse_ray.catalogue import Catalogue
from pulse_ray.errors import DataError, first_line
from pulse_ray.schema import INTERACTION, History, Interaction, Reject, example_id
from pulse_ray.text import clean
from pulse_ray.workspace import Part, locate

COLUMNS = ("user_id", "domain", "history", "candidates", "reason")
READ_ROWS = 1024
"""Rows decoded at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UserRow:
    """A user to be scored.

    `steps` are the interactions with known items, oldest first, `history` the newest of them. `candidates` are ids of
    known items; None asks for retrieval.
    """

    row_id: str
    history: History
    steps: tuple[Interaction, ...]
    candidates: tuple[str, ...] | None
    reason: str | None


@dataclass(frozen=True, kw_only=True)
class UserFile:
    """One parquet file: its path on the filesystem, and what its footer and its folder say of it."""

    path: str
    name: str
    """The path below the folder that was given; of a single file its last piece."""
    rows: int
    columns: tuple[str, ...]
    mark: str
    """Path, size in bytes and time of change: names the content for a fingerprint."""


@dataclass(frozen=True, kw_only=True)
class Users:
    """All rows of the input, none of them in memory. Picklable: it travels to the actors."""

    filesystem: pafs.FileSystem
    files: tuple[UserFile, ...]

    @property
    def rows(self) -> int:
        """Rows of all files."""
        return sum(file.rows for file in self.files)

    def shards(self, size: int) -> list[Part]:
        """Names of the row ranges, of at most `size` rows: the file's number, the first row, the row after the last."""
        return [
            f"rows-{number:05d}-{start:010d}-{min(start + size, file.rows):010d}"
            for number, file in enumerate(self.files)
            for start in range(0, file.rows, size)
        ]

    def ignored(self) -> list[str]:
        """Columns of the files that nothing reads."""
        return sorted({name for file in self.files for name in file.columns} - set(COLUMNS))


def open_users(address: str, domains: Sequence[str]) -> Users:
    """The parquet file at a path or URI, or all `.parquet` files in a folder; only their footers are read.

    Args:
        domains: the domains of the experiment.

    Raises:
        ArtifactError: the filesystem cannot be reached.
        DataError: there is no parquet file, one is damaged, or a column is missing or of the wrong type.
    """
    filesystem, path = locate(address)
    try:
        found = filesystem.get_file_info(path.rstrip("/"))
        infos, base = [found] if found.is_file else [], posixpath.dirname(found.path)
        if found.type == pafs.FileType.Directory:
            infos, base = filesystem.get_file_info(pafs.FileSelector(found.path, recursive=True)), found.path
            # Writers leave marks and half-written files under names that begin with _ or a dot.
            infos = [one for one in infos if one.extension == "parquet" and not one.base_name.startswith(("_", "."))]
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {address}: {first_line(error)}", remedy="Check path and permissions") from error
    files = [_footer(filesystem, one, base, domains) for one in sorted(infos, key=lambda one: str(one.path))]
    users = Users(filesystem=filesystem, files=tuple(files))
    if not users.rows:
        raise DataError(f"{address} holds no users", remedy="Give a parquet file with a row for each user")
    return users


def _footer(filesystem: pafs.FileSystem, info: pafs.FileInfo, base: str, domains: Sequence[str]) -> UserFile:
    try:
        file = pq.ParquetFile(info.path, filesystem=filesystem)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {info.path}: {first_line(error)}", remedy="Give whole parquet files") from error
    _check(info.path, file.schema_arrow, domains)
    return UserFile(
        path=info.path,
        name=posixpath.relpath(info.path, base),
        rows=file.metadata.num_rows,
        columns=tuple(file.schema_arrow.names),
        mark=f"{info.path}:{info.size}:{info.mtime_ns}",
    )


def _check(path: str, schema: pa.Schema, domains: Sequence[str]) -> None:
    """Raises a `DataError` unless the columns are there and of a type that can be read."""
    needed = ["user_id", "history", *(["domain"] if len(domains) > 1 else [])]
    if missing := [name for name in needed if name not in schema.names]:
        raise DataError(f"{path} has no column '{missing[0]}'", remedy=f"It has {', '.join(schema.names)}; add it")
    if repeated := sorted(name for name, times in Counter(schema.names).items() if times > 1 and name in COLUMNS):
        raise DataError(f"{path} has two columns '{repeated[0]}'", remedy="Rename one of them")
    # A column without a value in any row has no type.
    given = [name for name in COLUMNS if name in schema.names and not pa.types.is_null(schema.field(name).type)]
    for name in ("user_id", "domain", "reason"):
        if name in given and not _is_text(schema.field(name).type):
            raise _wrong_type(path, schema.field(name), "string")
    for name in ("history", "candidates"):
        if name not in given:
            continue
        kind = schema.field(name).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            raise _wrong_type(path, schema.field(name), "a list of item ids")
        inside = kind.value_type
        if name == "history" and pa.types.is_struct(inside):
            if "item_id" not in [field.name for field in inside] or not _is_text(inside.field("item_id").type):
                raise _wrong_type(path, schema.field(name), f"a list of {INTERACTION}")
        elif not (_is_text(inside) or pa.types.is_null(inside)):
            raise _wrong_type(path, schema.field(name), "a list of item ids (strings)")


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _wrong_type(path: str, field: pa.Field, expected: str) -> DataError:
    return DataError(f"{path}: column '{field.name}' is {field.type}", remedy=f"Make it {expected}")


class ShardReader:
    """Reads shards. Those asked for in ascending order are read in one pass over a file, so that a row group, which
    may hold a million rows, is not decoded anew for every shard."""

    def __init__(self, users: Users) -> None:
        self.users = users
        self._number = -1
        self._next = 0  # the row that comes next in the pass
        self._pass: Iterator[pa.RecordBatch] = iter(())
        self._rest = pa.table({})  # decoded and not yet given out

    def read(self, part: Part) -> tuple[UserFile, int, pa.Table]:
        """The file of a shard, the number of its first row, and its rows.

        Raises:
            DataError: the file is damaged, or has changed since it was opened.
        """
        number, start, stop = map(int, part.split("-")[1:])
        file = self.users.files[number]
        try:
            self._begin(number, start)
            self._take(start - self._next)
            rows = self._take(stop - start)
        except (OSError, pa.ArrowInvalid) as error:
            raise DataError(f"cannot read {file.path}: {error}", remedy="Give whole parquet files") from error
        if len(rows) < stop - start:
            raise DataError(f"{file.path} lost rows while it was read", remedy="Start again when it is whole")
        return file, start, rows

    def _begin(self, number: int, start: int) -> None:
        """Makes sure that the pass is in this file and not beyond row `start`, nor a whole row group before it."""
        file = pq.ParquetFile(self.users.files[number].path, filesystem=self.users.filesystem)
        groups = range(file.metadata.num_row_groups)
        begins = list(accumulate((file.metadata.row_group(group).num_rows for group in groups), initial=0))
        group = bisect_right(begins, start, hi=len(groups)) - 1
        if number == self._number and begins[group] <= self._next <= start:
            return
        names = [name for name in COLUMNS if name in file.schema_arrow.names]
        self._pass = file.iter_batches(batch_size=READ_ROWS, row_groups=list(groups)[group:], columns=names)
        self._number, self._next, self._rest = number, begins[group], file.schema_arrow.empty_table().select(names)

    def _take(self, count: int) -> pa.Table:
        """The next `count` rows of the pass; fewer where it ends."""
        pieces = [self._rest]
        while sum(map(len, pieces)) < count and (batch := next(self._pass, None)) is not None:
            pieces.append(pa.Table.from_batches([batch]))
        found = pa.concat_tables(pieces)
        self._next, self._rest = self._next + count, found.slice(count)
        return found.slice(0, count)


def understand(
    row: Mapping[str, Any], row_id: str, items: Catalogue, max_sequence: int, default_domain: str | None
) -> UserRow | Reject:
    """A row of the input as a user to be scored, or why it cannot be.

    Items that the catalogue does not know are left out, as a model could make nothing of their ids.

    Args:
        row: values of `COLUMNS`, as far as the file has them.
        max_sequence: newest interactions kept.
        default_domain: the domain of a file without that column.
    """

    def refuse(reason: str, detail: str = "") -> Reject:
        return Reject(key=row_id, reason=reason, detail=f"user {row['user_id']!r}: {detail}"[:200])

    domain = row.get("domain", default_domain)
    if not row["user_id"]:
        return refuse("no user")
    if not isinstance(domain, str) or domain not in items:
        return refuse("unknown domain", f"{domain!r}")
    known = items[domain]
    given = [step if isinstance(step, dict) else {"item_id": step} for step in row["history"] or ()]
    if not given:
        return refuse("empty history")
    steps = [_step(step, place) for place, step in enumerate(given) if step["item_id"] in known]
    if not steps:
        return refuse("unknown items only", f"{given[0]['item_id']!r}, …")
    candidates = row.get("candidates")
    if candidates is not None:
        chosen = tuple(dict.fromkeys(item for item in candidates if item in known))
        if not chosen:
            return refuse("no known candidates", f"{len(candidates)} given")
    history = History(
        example_id=example_id(domain, row["user_id"], len(given)),
        domain=domain,
        user_id=row["user_id"],
        interactions=tuple(steps[-max_sequence:]),
    )
    return UserRow(
        row_id=row_id,
        history=history,
        steps=tuple(steps),
        candidates=None if candidates is None else chosen,
        reason=clean(row.get("reason")) or None,
    )


def _step(step: Mapping[str, Any], place: int) -> Interaction:
    """One interaction. What is not of the type or range of `schema.INTERACTION` counts as not given."""
    timestamp, rating, review = step.get("timestamp"), step.get("rating"), step.get("review")
    if isinstance(timestamp, datetime):
        timestamp = int((timestamp if timestamp.tzinfo else timestamp.replace(tzinfo=UTC)).timestamp())
    return Interaction(
        item_id=step["item_id"],
        timestamp=timestamp if isinstance(timestamp, int) and 0 <= timestamp < 2**62 else place,
        rating=float(rating) if isinstance(rating, int | float | Decimal) and 1 <= rating <= 5 else None,
        review=(clean(review) or None) if isinstance(review, str) else None,
    )
