"""`pulse-ray prepare` on the same reviews in each format and from each place: time, memory, progress, counts.

    python -m benchmarks.prepare_formats            # 12 million reviews, seven times: most of an hour on two cores
    python -m benchmarks.prepare_formats --quick    # 400,000 reviews: five minutes
    python -m benchmarks.prepare_formats --smoke    # 3,000 reviews: the paths, not the figures

Makes one raw file of Amazon's JSON lines in gzip (`_reviews.py`), and from it, in bounded memory, plain and zstd JSON
lines, CSV and Parquet. Each file is deleted after its run, so that the disk holds one beside the first. The gzip file
is also read from a local S3 (moto) and downloaded from a local HTTP server, both in a process that is not measured.
The items' metadata is the same local gzip file in all runs. CSV and Parquet hold the five columns that are read of a
review; JSON lines hold those that Amazon publishes.

The real command runs in a process of its own, while the memory of all processes that it starts is sampled. `work_s` and
`reviews_per_s` count the time of the stage, which begins when Ray runs; `wall_s` is the whole command's.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.json as pa_json
import pyarrow.parquet as pq
from isal import igzip

from benchmarks import _hosts, _reviews
from benchmarks._memory import watch
from benchmarks._report import Size, parser, report, size
from benchmarks.prepare import SETTINGS

REVIEW = pa.schema(
    {
        "reviewerID": pa.string(),
        "asin": pa.string(),
        "unixReviewTime": pa.int64(),
        "overall": pa.float64(),
        "reviewText": pa.string(),
    }
)
COLUMNS = ("user_id", "item_id", "timestamp", "rating", "review")
"""What the columns of `REVIEW` are called in a table."""
BLOCK_BYTES = 2**26
"""JSON lines that are converted at once: some 100,000 reviews, which become a row group in Parquet."""
LEAST_LINES = 2
"""A log shows progress within a file when so many different lines tell a share between none and all of it."""
NOTES_CODE = 'code="$1"; shift; "$@"; echo $? > "$code"'
"""Shell that runs a command and writes its exit code to a file. `watch` raises an error when a command fails, but the
memory of that run and the runs of the other formats are of interest too."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many reviews to prepare, and what to expect of a run."""

    reviews: int
    formats: int
    """Formats that one run of the command prepares, each as a domain. With one, the figures are that format's."""
    shows_progress: bool
    """Whether a file is read for long enough that the log must show progress."""


FULL = Sizes(reviews=12_000_000, formats=1, shows_progress=True)
QUICK = Sizes(reviews=400_000, formats=1, shows_progress=False)
# The start of Ray takes longer than the work.
SMOKE = Sizes(reviews=3_000, formats=4, shows_progress=False)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def decompress(source: Path, target: Path) -> None:
    """Write a gzip file's content as it is."""
    with igzip.open(source, "rb") as read, target.open("wb") as write:
        shutil.copyfileobj(read, write, 2**20)


def zstd(source: Path, target: Path) -> None:
    """Write a gzip file's content in zstd."""
    with igzip.open(source, "rb") as read, pa.output_stream(str(target), compression="zstd") as write:
        shutil.copyfileobj(read, write, 2**20)


def tabulate(writer: Callable[[Path, pa.Schema], Any], source: Path, target: Path) -> None:
    """Write the columns that are read of a review, block by block, with pyarrow's writer of a format."""
    lines = pa_json.open_json(
        source,
        pa_json.ReadOptions(block_size=BLOCK_BYTES),
        pa_json.ParseOptions(explicit_schema=REVIEW, unexpected_field_behavior="ignore"),
    )
    schema = pa.schema([field.with_name(name) for field, name in zip(REVIEW, COLUMNS, strict=True)])
    with writer(target, schema) as file:
        for batch in lines:
            file.write_batch(batch.select(REVIEW.names).rename_columns(list(COLUMNS)))


CONVERSIONS: Mapping[str, Callable[[Path, Path], None]] = {
    "json": decompress,
    "json.zst": zstd,
    "csv": partial(tabulate, pa_csv.CSVWriter),
    "parquet": partial(tabulate, pq.ParquetWriter),
}
"""How the gzip file is converted, by the ending of the new file's name."""

Layout = Callable[[], AbstractContextManager[str]]
"""A context in which a file is in some format and place; its value is the file's address."""


@contextmanager
def converted(source: Path, folder: Path, ending: str) -> Iterator[str]:
    """The address of the same reviews in another format, which are deleted in the end."""
    target = folder / f"reviews.{ending}"
    _say(f"{ending}: converting")
    try:
        CONVERSIONS[ending](source, target)
        yield str(target)
    finally:
        target.unlink(missing_ok=True)


def prepare(layouts: Mapping[str, Layout], metadata: Path, reviews: int) -> dict[str, dict[str, Any]]:
    """Run the command on the reviews in some formats, each as a domain. Returns what was measured, by format."""
    with tempfile.TemporaryDirectory(prefix="pulse-ray-formats-") as temporary, ExitStack() as stack:
        folder = Path(temporary)
        addresses = {name: stack.enter_context(layout()) for name, layout in layouts.items()}
        domains = [
            {"name": name, "source": {"interactions": address, "items": str(metadata)}}
            for name, address in addresses.items()
        ]
        config = {
            "name": "run",
            "storage": temporary,
            "prepare": {"domains": domains, "downloads": str(folder / "downloads"), **SETTINGS},
        }
        (folder / "config.yaml").write_text(json.dumps(config))
        command = [sys.executable, "-m", "pulse_ray.cli", "prepare", str(folder / "config.yaml")]
        started = time.monotonic()
        peak = watch(["sh", "-c", NOTES_CODE, "sh", str(folder / "code"), *command], folder / "log")
        wall_s = time.monotonic() - started
        log = (folder / "log").read_text(errors="replace")
        figures: dict[str, Any] = {
            "exit_code": int((folder / "code").read_text()),
            "wall_s": round(wall_s, 1),
            "peak_gib": round(peak.bytes / 2**30, 2),
            "shows_progress": shows_progress(log),
        }
        names = ", ".join(layouts)
        if figures["exit_code"]:
            _say(f"{names}: the command failed:\n{log[-4000:]}")
            return dict.fromkeys(layouts, figures)
        work_s = manifest(folder / "run" / "interactions")["seconds"]
        rate = len(layouts) * reviews / work_s
        _say(f"{names}: {rate:,.0f} reviews/s ({work_s:.1f} s), {figures['peak_gib']:.2f} GiB")
        figures |= {"work_s": round(work_s, 1), "reviews_per_s": round(rate)}
        return {name: {**figures, "counts": counts(folder / "run", name)} for name in layouts}


def shows_progress(log: str) -> bool:
    """Whether several lines of a log tell how far a file was read while it was.

    >>> shows_progress("reading: 1/2 files  50% read\\nreading: 1/2 files  75% read\\nreading: 2/2 files  100% read")
    True
    """
    shares = {line: re.search(r"(\d+)% read", line) for line in log.splitlines()}
    return sum(share is not None and 0 < int(share[1]) < 100 for share in shares.values()) >= LEAST_LINES


def counts(run: Path, domain: str) -> dict[str, int]:
    """Sizes of what the command wrote of a domain."""
    steps = manifest(run / "interactions")["metrics"]["steps"]
    [kept] = [step for step in steps if step["domain"] == domain and step["step"] == "kept"]
    tables = {name: rows(run / name) for name in ("interactions", "items", "examples")}
    for name, found in tables.items():
        total = manifest(run / name)["rows"]
        assert sum(found.values()) == total, f"{name}: {found} in the files, {total} in the manifest"
    return {"users": kept["users"]} | {name: found[domain] for name, found in tables.items()}


def rows(table: Path) -> dict[str, int]:
    """Rows of a table by domain."""
    counted = pl.scan_parquet(table / "*.parquet").group_by("domain").len().collect()
    return dict(counted.iter_rows())


def manifest(table: Path) -> dict[str, Any]:
    """What is said of a table that the command wrote."""
    return dict(json.loads((table / "manifest.json").read_text()))


def measure(data: Path, sizes: Sizes) -> dict[str, dict[str, Any]]:
    """Figures of each format and place."""
    _say(f"{sizes.reviews:,} reviews: making them, or finding them made")
    files = _reviews.make(data, sizes.reviews)
    with (
        tempfile.TemporaryDirectory(prefix="pulse-ray-formats-") as folder,
        _hosts.serving(files.reviews) as addresses,
    ):
        layouts: dict[str, Layout] = {
            ending: partial(converted, files.reviews, Path(folder), ending) for ending in CONVERSIONS
        }
        layouts["json.gz"] = partial(nullcontext, str(files.reviews))
        layouts |= {f"{scheme}.json.gz": partial(nullcontext, address) for scheme, address in addresses.items()}
        found: dict[str, dict[str, Any]] = {}
        while len(found) < len(layouts):
            some = dict(islice(layouts.items(), len(found), len(found) + sizes.formats))
            found |= prepare(some, files.metadata, sizes.reviews)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its report."""
    command_line = parser("prepare_formats", __doc__, quick="400,000 reviews: five minutes; the figures are rough")
    command_line.add_argument("--data", type=Path, help="folder that the raw files are kept in; unset: a temporary one")
    options = command_line.parse_args(arguments)
    chosen = size(options)
    sizes = SIZES[chosen]
    data = options.data or Path(tempfile.mkdtemp(prefix="pulse-ray-reviews-"))
    try:
        runs = measure(data, sizes)
    finally:
        if options.data is None:
            shutil.rmtree(data)
    failed = [name for name, run in runs.items() if run["exit_code"]]
    silent = [name for name, run in runs.items() if not run["shows_progress"]]
    different = {tuple(run.get("counts", {}).items()) for run in runs.values()}
    figures = {"settings": SETTINGS, "seed": _reviews.SEED, "reviews": sizes.reviews, "formats": runs}
    bars = {
        "failed": {"value": len(failed), "bar": "0", "holds": not failed},
        "different_counts": {"value": len(different), "bar": "1", "holds": len(different) == 1},
    }
    if sizes.shows_progress:
        bars["without_progress"] = {"value": len(silent), "bar": "0", "holds": not silent}
    # A smoke run has no bars, but a command that fails must not pass unnoticed.
    return max(report("prepare_formats", chosen, figures, bars), int(bool(failed)))


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
