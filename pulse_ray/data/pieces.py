"""Scratch pieces of one domain: parquet files in the workspace, one per partition, that steps hand to each other."""

from __future__ import annotations

import io
from types import TracebackType
from typing import Self

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from pulse_ray.seeding import derive
from pulse_ray.workspace import Artefact, StageRun

SCRATCH = "scratch"
"""The artefact that holds the pieces while the stage runs."""


def stable_hash(identifier: str) -> int:
    """A number below 2**63 that depends on the identifier alone."""
    return derive(0, identifier)


def parquet(table: pa.Table) -> bytes:
    """The content of a parquet file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


class Pieces:
    """The pieces of the domain with number `domain`, by name and partition."""

    def __init__(self, stage: StageRun, domain: int) -> None:
        self.domain = domain
        self.partitions = stage.config.prepare.partitions
        self._folder: Artefact = stage.workspace.artefact(SCRATCH)

    def get(self, name: str, partition: int) -> pl.DataFrame:
        """A piece that an earlier step put or dealt."""
        frame = pl.from_arrow(self._folder.read(self._file(name, partition)))
        assert isinstance(frame, pl.DataFrame)
        return frame

    def put(self, name: str, partition: int, frame: pl.DataFrame) -> None:
        """Writes a piece, whole or not at all."""
        self._folder.write_bytes(f"{self._file(name, partition)}.parquet", parquet(frame.to_arrow()))

    def total(self, name: str, place: int | None = None) -> pl.DataFrame:
        """Columns `item_id, count`, added up over all partitions, by item; of one `place`, where given."""
        rows = pl.concat([self.get(name, partition) for partition in range(self.partitions)])
        rows = rows if place is None else rows.filter(pl.col("place") == place)
        return rows.group_by("item_id").agg(pl.col("count").sum()).sort("item_id")

    def dealer(self, name: str, schema: pa.Schema, key: str) -> Dealer:
        """Writes the pieces of `name`, all at once; a row goes to the partition of its `key`."""
        self._folder.filesystem.create_dir(self._folder.path, recursive=True)
        paths = [f"{self._folder.path}/{self._file(name, partition)}.parquet" for partition in range(self.partitions)]
        return Dealer([self._folder.filesystem.open_output_stream(path) for path in paths], schema, key)

    def place(self, identifier: str) -> int:
        """The partition that a user or an item belongs to."""
        return stable_hash(identifier) % self.partitions

    def _file(self, name: str, partition: int) -> str:
        return f"{name}-{self.domain}-{partition:04d}"


class Dealer:
    """Deals tables out to one open parquet file per partition, so that a long input never gathers in memory."""

    def __init__(self, streams: list[pa.NativeFile], schema: pa.Schema, key: str) -> None:
        self._streams, self._key = streams, key
        self._writers = [pq.ParquetWriter(stream, schema, compression="zstd") for stream in streams]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (*self._writers, *self._streams):
            file.close()

    def deal(self, rows: pa.Table) -> None:
        """Appends each row to its partition's piece."""
        places = np.array([stable_hash(key) % len(self._writers) for key in rows.column(self._key).to_pylist()], int)
        for place in np.unique(places):
            self._writers[place].write_table(rows.filter(pa.array(places == place)))
