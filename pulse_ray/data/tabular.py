"""Parquet and separated values as batches of the wanted columns, under the file's own names."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pc_csv
import pyarrow.parquet as pq

from pulse_ray.data import files
from pulse_ray.data.formats import Format
from pulse_ray.data.jsonlines import Fault, Parsed
from pulse_ray.data.read_progress import ReadProgress
from pulse_ray.errors import DataError

BATCH_ROWS = 50_000


def parquet(
    address: str, form: Format, downloads: str, progress: ReadProgress, batch_rows: int = BATCH_ROWS
) -> Iterator[Parsed]:
    """The wanted columns, batch by batch; rows are numbered from 1.

    Args:
        progress: counts rows.
        batch_rows: most rows of a batch.
    """
    wanted = [name for group in form.names.values() for name in group]
    number = 1
    with files.seekable(address, downloads, progress) as file:
        rows = pq.ParquetFile(file)
        progress.begin("read", rows.metadata.num_rows)
        for batch in rows.iter_batches(batch_rows, columns=wanted):
            table = pa.Table.from_batches([batch])
            progress.advance(table.num_rows)
            yield Parsed(table=table, numbers=np.arange(number, number + table.num_rows))
            number += table.num_rows


def separated(
    address: str, form: Format, downloads: str, progress: ReadProgress, block_bytes: int = files.BLOCK_BYTES
) -> Iterator[Parsed]:
    """The wanted columns as strings, batch by batch; rows are numbered from 2: the header is the first.

    Args:
        progress: counts bytes.
        block_bytes: bytes parsed at once; a row must fit.

    Raises:
        DataError: a quoted value does not end.
    """
    wanted = [form.header[name] for group in form.names.values() for name in group]
    faults: list[Fault] = []
    broken: list[int] = []

    def aside(row: pc_csv.InvalidRow) -> str:
        detail = f"{row.actual_columns} values, not {row.expected_columns}: {row.text[:120]}"
        faults.append((row.number, "wrong number of values", detail))
        broken.append(row.number)
        return "skip"

    number = 2
    with files.told(address, lambda: number), files.opened(address, downloads, progress, block_bytes) as stream:
        try:
            reader = pc_csv.open_csv(
                pa.PythonFile(stream, mode="r"),
                read_options=pc_csv.ReadOptions(use_threads=False, block_size=block_bytes),
                parse_options=pc_csv.ParseOptions(
                    delimiter=form.delimiter,
                    quote_char=False if form.kind == "recbole" else '"',
                    newlines_in_values=form.kind != "recbole",
                    invalid_row_handler=aside,
                ),
                convert_options=pc_csv.ConvertOptions(
                    include_columns=wanted,
                    column_types=dict.fromkeys(wanted, pa.binary()),
                    strings_can_be_null=True,
                    null_values=[""],
                ),
            )
            for batch in reader:
                rows = np.setdiff1d(np.arange(number, number + batch.num_rows + len(broken)), broken)[: batch.num_rows]
                yield _decoded(pa.Table.from_batches([batch]), rows, faults, form)
                number = int(rows[-1]) + 1 if len(rows) else number
                faults.clear()
            if faults:
                yield _decoded(reader.schema.empty_table(), np.zeros(0, dtype=np.int64), faults, form)
        except pa.ArrowInvalid as error:
            raise DataError(
                f"{files.shown(address)}: from row {number} on it cannot be read: {error}",
                remedy="Correct the file: a quoted value does not end, or a row is larger than prepare.read_block_kib",
            ) from error


def _decoded(table: pa.Table, numbers: npt.NDArray[np.int64], faults: list[Fault], form: Format) -> Parsed:
    """Bytes as strings under the names without types; rows that are no UTF-8 become faults."""
    plain = {theirs: name for name, theirs in form.header.items()}
    try:
        columns = [column.cast(pa.string()) for column in table.columns]
    except pa.ArrowInvalid:
        sound = [all(_is_text(value) for value in row.values()) for row in table.to_pylist()]
        bad = [(int(number), "invalid UTF-8", "") for number, good in zip(numbers, sound, strict=True) if not good]
        faults = [*faults, *bad]
        table, numbers = table.filter(pa.array(sound)), numbers[np.array(sound, dtype=bool)]
        columns = [column.cast(pa.string()) for column in table.columns]
    # An empty value is none: a quoted one too.
    columns = [pc.if_else(pc.equal(column, ""), None, column) for column in columns]
    named = pa.table(dict(zip((plain[name] for name in table.column_names), columns, strict=True)))
    return Parsed(table=named, numbers=numbers, faults=tuple(faults))


def _is_text(value: bytes | None) -> bool:
    try:
        (value or b"").decode()
    except UnicodeDecodeError:
        return False
    return True
