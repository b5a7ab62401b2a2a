"""`pulse-ray prepare` on whole categories: time against size, memory, and a script that has all of it in memory.

    python -m benchmarks.prepare            # 1, 4 and 12 million reviews: 12 minutes on two cores
    python -m benchmarks.prepare --quick    # 100,000 and 400,000: two minutes
    python -m benchmarks.prepare --smoke    # 2,000, 5,000 and 10,000: the paths, not the figures

Makes raw files with the marginals of a real category (`_reviews.py`; 12 million take 3 GB) and runs the real command
on them in processes of its own, while the memory of all of them, Ray's among them, is sampled. The peer is a polars
script that does the same work in one process, with everything in memory (`_polars_prepare.py`), at the middle size, in
turn with ours; its tables must be the same, row for row.

Rates count raw reviews over the time of the stage, which begins when Ray runs; the peer's begins after its imports.
`wall_s` is the whole command's.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from benchmarks import _reviews
from benchmarks._memory import Peak, watch
from benchmarks._report import Size, parser, report, size
from benchmarks._tables import KEYS, differences

DOMAIN = "shop"
SETTINGS = {"partitions": 16, "shard_examples": 8192}
MOST_GIB = 6
LARGEST_EXPONENT = 1.1
LEAST_RATIO = 0.4


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What to prepare, and whether the peer's rate is comparable."""

    repeats: Mapping[int, int]
    """How often each number of reviews is prepared; the peer as often at the second one."""
    judges_rate: bool
    """Whether the work takes longer than the start of Ray's workers, so that its rate can be held to the peer's."""


FULL = Sizes(repeats={1_000_000: 3, 4_000_000: 2, 12_000_000: 1}, judges_rate=True)
QUICK = Sizes(repeats={100_000: 2, 400_000: 2}, judges_rate=False)
SMOKE = Sizes(repeats={2_000: 1, 5_000: 1, 10_000: 1}, judges_rate=True)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a command over a file: seconds of the work and of the whole command, and the most memory it held."""

    work_s: float
    wall_s: float
    peak: Peak


def ours(files: _reviews.Files, folder: Path) -> Run:
    """The real command, in a workspace in the folder."""
    source = {"interactions": str(files.reviews), "items": str(files.metadata)}
    config = {
        "name": "run",
        "storage": str(folder),
        "prepare": {"domains": [{"name": DOMAIN, "source": source}], **SETTINGS},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    run = _timed(["-m", "pulse_ray.cli", "prepare", str(folder / "config.yaml")], folder)
    manifest = json.loads((folder / "run" / "interactions" / "manifest.json").read_text())
    return Run(work_s=manifest["seconds"], wall_s=run.wall_s, peak=run.peak)


def peer(files: _reviews.Files, folder: Path) -> tuple[Run, dict[str, Any]]:
    """The polars script, which writes into the folder, and what it says of itself."""
    run = _timed(
        ["-m", "benchmarks._polars_prepare", str(files.reviews), str(files.metadata), DOMAIN, str(folder)], folder
    )
    says = json.loads((folder / "log").read_text().splitlines()[-1])
    return Run(work_s=says["work_s"], wall_s=run.wall_s, peak=run.peak), says


def _timed(arguments: Sequence[str], folder: Path) -> Run:
    started = time.monotonic()
    peak = watch([sys.executable, *arguments], folder / "log")
    wall_s = time.monotonic() - started
    return Run(work_s=wall_s, wall_s=wall_s, peak=peak)


def compare(run: Path, script: Path) -> dict[str, int]:
    """Rows by table that differ between the command's workspace and the peer's folder."""
    found = {}
    for table in KEYS:
        count, some = differences(table, sorted((run / table).glob("*.parquet")), [script / f"{table}.parquet"])
        if count:
            _say(f"{table}: {count:,} rows differ, e.g. {some}")
        found[table] = count
    return found


def exponent(seconds: Mapping[int, float]) -> float:
    """Of the power of the size that the time grows with: least squares of the logarithms."""
    return float(np.polyfit(np.log(list(seconds)), np.log(list(seconds.values())), 1)[0])


def measure(data: Path, repeats: Mapping[int, int]) -> tuple[dict[int, list[Run]], list[Run], dict[str, Any]]:
    """Runs of ours by size, runs of the peer at the second size, and what more there is to tell of the latter."""
    runs: dict[int, list[Run]] = {}
    peers: list[Run] = []
    more: dict[str, Any] = {}
    for number, (reviews, times) in enumerate(repeats.items()):
        _say(f"{reviews:,} reviews: making them, or finding them made")
        files = _reviews.make(data, reviews)
        for turn in range(times):
            with tempfile.TemporaryDirectory(prefix="pulse-ray-prepare-") as temporary:
                workspace, script = Path(temporary, "ours"), Path(temporary, "peer")
                workspace.mkdir()
                script.mkdir()
                run = ours(files, workspace)
                runs.setdefault(reviews, []).append(run)
                _tell("ours", reviews, run)
                if number == 1:
                    run, says = peer(files, script)
                    peers.append(run)
                    _tell("peer", reviews, run)
                    if turn == 0:
                        more = {**says, "rows_that_differ": compare(workspace / "run", script)}
    return runs, peers, more


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark and print its report."""
    command_line = parser(
        "prepare", __doc__, quick="the two smaller sizes at a tenth: two minutes; the figures are rough"
    )
    command_line.add_argument("--data", type=Path, help="folder that the raw files are kept in; unset: a temporary one")
    options = command_line.parse_args(arguments)
    chosen = size(options)
    sizes = SIZES[chosen]
    data = options.data or Path(tempfile.mkdtemp(prefix="pulse-ray-reviews-"))
    try:
        runs, peers, more = measure(data, sizes.repeats)
    finally:
        if options.data is None:
            shutil.rmtree(data)
    seconds = {reviews: _median([run.work_s for run in found]) for reviews, found in runs.items()}
    middle = list(runs)[1]
    figures = {
        "settings": SETTINGS,
        "seed": _reviews.SEED,
        "ours": {str(reviews): _figures(reviews, found) for reviews, found in runs.items()},
        "peer": {str(middle): _figures(middle, peers), "of_itself": more},
        "exponents_between_sizes": [
            round(exponent({one: seconds[one], two: seconds[two]}), 3) for one, two in pairwise(seconds)
        ],
        "reviews_per_s_over_peer_with_start_up": round(_ratio(peers, runs[middle], "wall_s"), 3),
    }
    slope, ratio = exponent(seconds), _ratio(peers, runs[middle], "work_s")
    peak = max(run.peak.bytes for found in runs.values() for run in found) / 2**30
    differ = sum(more["rows_that_differ"].values())
    bars = {
        "exponent": _bar(slope, f"<= {LARGEST_EXPONENT}", slope <= LARGEST_EXPONENT),
        "peak_gib": _bar(peak, f"< {MOST_GIB}", peak < MOST_GIB),
        "rows_that_differ_from_peer": _bar(differ, "0", differ == 0),
    }
    if sizes.judges_rate:
        bars["reviews_per_s_over_peer"] = _bar(ratio, f">= {LEAST_RATIO}", ratio >= LEAST_RATIO)
    else:
        figures["reviews_per_s_over_peer"] = round(ratio, 3)
    return report("prepare", chosen, figures, bars)


def _ratio(peers: Sequence[Run], runs: Sequence[Run], seconds: Literal["work_s", "wall_s"]) -> float:
    """Of the medians: how many times as long the peers took."""
    return _median([getattr(run, seconds) for run in peers]) / _median([getattr(run, seconds) for run in runs])


def _figures(reviews: int, runs: Sequence[Run]) -> dict[str, Any]:
    highest = max(runs, key=lambda run: run.peak.bytes).peak
    return {
        "reviews_per_s": round(reviews / _median([run.work_s for run in runs])),
        "work_s": [round(run.work_s, 1) for run in runs],
        "wall_s": [round(run.wall_s, 1) for run in runs],
        "peak_gib": round(highest.bytes / 2**30, 2),
        "peak_mib_by_program": {name: round(size / 2**20) for name, size in highest.by_program.items()},
    }


def _median(values: Sequence[float]) -> float:
    return float(np.median(values))


def _bar(value: float, bar: str, holds: bool) -> dict[str, Any]:
    return {"value": round(value, 3), "bar": bar, "holds": bool(holds)}


def _tell(who: str, reviews: int, run: Run) -> None:
    _say(
        f"{who}: {reviews / run.work_s:,.0f} reviews/s ({run.work_s:.1f} s, {run.wall_s:.1f} s in all), "
        f"{run.peak.bytes / 2**30:.2f} GiB"
    )


def _say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
