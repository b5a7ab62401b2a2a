"""Scratch pieces of one domain: arrow files in the workspace, by name and partition, that steps hand to each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.ipc as ipc

from pulse_ray.workspace import Artefact, StageRun

SCRATCH = "scratch"
"""The artefact that holds the pieces while the stage runs."""

Counts = dict[str, int]
"""What a step counted, by name."""

DEALT_BYTES = 2**25
"""Rows gather up to this size before they are dealt out, so that a piece is not made of crumbs."""

_WRITTEN = ipc.IpcWriteOptions(compression="lz4")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # Odd, so no power of it is 0 modulo 2**64.


def stable_hashes(identifiers: pa.ChunkedArray | pa.StringArray) -> npt.NDArray[np.uint64]:
    """A number for each identifier that depends on its bytes alone: on no library's version and on no machine.

    A polynomial over the bytes modulo 2**64, then the finaliser of SplitMix64 (Steele et al., 2014). Shape [n].

    >>> stable_hashes(pa.array(["a", "b", "a"])) % np.uint64(8)
    array([3, 4, 3], dtype=uint64)
    """
    column = identifiers.combine_chunks() if isinstance(identifiers, pa.ChunkedArray) else identifiers
    _, ends, content = column.buffers()
    offsets = np.frombuffer(ends, np.int32, count=len(column) + 1, offset=4 * column.offset).astype(np.int64)
    text = np.frombuffer(content, np.uint8)[offsets[0] : offsets[-1]] if offsets[-1] else np.zeros(0, np.uint8)
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    place = np.arange(len(text)) - np.repeat(starts, lengths)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _FACTOR))
        terms = np.append((text.astype(np.uint64) + np.uint64(1)) * powers[place], np.uint64(0))
        hashes = np.where(lengths > 0, np.add.reduceat(terms, starts), np.uint64(0)) if len(starts) else terms[:0]
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
        return np.asarray(hashes ^ (hashes >> np.uint64(31)), dtype=np.uint64)


class Pieces:
    """The pieces of the domain with number `domain`, by name and partition."""

    def __init__(self, stage: StageRun, domain: int) -> None:
        self.domain = domain
        self.partitions = stage.config.prepare.partitions
        self._folder: Artefact = stage.workspace.artefact(SCRATCH)

    def get(self, name: str, partition: int, columns: Sequence[str] | None = None) -> pl.DataFrame:
        """A piece that an earlier step put or dealt; of its columns only some, where given."""
        frame = pl.from_arrow(self._opened(name, partition, columns).read_all())
        assert isinstance(frame, pl.DataFrame)
        return frame

    def batches(self, name: str, partition: int) -> Iterator[pa.RecordBatch]:
        """A piece batch by batch, so that only one is in memory."""
        reader = self._opened(name, partition)
        yield from (reader.get_batch(number) for number in range(reader.num_record_batches))

    def put(self, name: str, partition: int, frame: pl.DataFrame) -> None:
        """Writes a piece, whole or not at all."""
        table = frame.to_arrow(compat_level=pl.CompatLevel.oldest())
        buffer = pa.BufferOutputStream()
        with ipc.new_file(buffer, table.schema, options=_WRITTEN) as writer:
            writer.write_table(table)
        self._folder.write_bytes(self._file(name, partition), buffer.getvalue())

    def note(self, name: str, value: float) -> None:
        """Leaves a number for whoever looks."""
        self._folder.write_bytes(f"{name}-{self.domain}", str(value).encode())

    def noted(self, name: str) -> float:
        """The number that was left last, 0 where there is none yet."""
        return float(self._folder.read_bytes(f"{name}-{self.domain}") or 0)

    def dealer(self, name: str, schema: pa.Schema, key: str, flush_bytes: int = DEALT_BYTES) -> Dealer:
        """Writes the pieces of `name`, all at once; a row goes to the partition of its `key`."""
        self._folder.filesystem.create_dir(self._folder.path, recursive=True)
        paths = [f"{self._folder.path}/{self._file(name, partition)}" for partition in range(self.partitions)]
        return Dealer([self._folder.filesystem.open_output_stream(path) for path in paths], schema, key, flush_bytes)

    def places(self, identifiers: pl.Series) -> npt.NDArray[np.int64]:
        """The partitions that users or items belong to: [n]."""
        return _places(identifiers.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string()), self.partitions)

    def _opened(self, name: str, partition: int, columns: Sequence[str] | None = None) -> ipc.RecordBatchFileReader:
        path = f"{self._folder.path}/{self._file(name, partition)}"
        file = self._folder.filesystem.open_input_file(path)
        if columns is None:
            return ipc.open_file(file)
        schema = ipc.open_file(file).schema
        wanted = [schema.get_field_index(column) for column in columns]
        return ipc.open_file(file, options=ipc.IpcReadOptions(included_fields=wanted))

    def _file(self, name: str, partition: int) -> str:
        return f"{name}-{self.domain}-{partition:04d}.arrow"


class Dealer:
    """Deals tables out to one open arrow file per partition, so that a long input never gathers in memory.

    Args:
        flush_bytes: rows gather up to this size in memory before they are written.
    """

    def __init__(
        self, streams: list[pa.NativeFile], schema: pa.Schema, key: str, flush_bytes: int = DEALT_BYTES
    ) -> None:
        self._streams, self._schema, self._key, self._flush_bytes = streams, schema, key, flush_bytes
        self._writers = [ipc.new_file(stream, schema, options=_WRITTEN) for stream in streams]
        self._gathered: list[pa.Table] = []
        self._gathered_bytes = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        for file in (*self._writers, *self._streams):
            file.close()

    def deal(self, rows: pa.Table) -> None:
        """Appends each row to its partition's piece, in order."""
        self._gathered.append(rows)
        self._gathered_bytes += rows.nbytes
        if self._gathered_bytes >= self._flush_bytes:
            self._flush()

    def _flush(self) -> None:
        rows = pa.concat_tables([self._schema.empty_table(), *self._gathered]).combine_chunks()
        self._gathered, self._gathered_bytes = [], 0
        places = _places(rows.column(self._key), len(self._writers))
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(len(self._writers) + 1))
        rows = rows.take(pa.array(order))
        for writer, start, end in zip(self._writers, bounds[:-1], bounds[1:], strict=True):
            if end > start:
                writer.write_table(rows.slice(start, end - start))


def _places(identifiers: pa.ChunkedArray | pa.StringArray, partitions: int) -> npt.NDArray[np.int64]:
    return np.asarray(stable_hashes(identifiers) % np.uint64(partitions), dtype=np.int64)
