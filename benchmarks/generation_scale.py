"""Whether trees cost the same for the thousandth user as for the first: seconds and the driver's memory, by users.

    python -m benchmarks.generation_scale            # 400, 1,600 and 6,400 users: about 20 minutes on two cores
    python -m benchmarks.generation_scale --quick    # 400 and 1,600: with fewer, the few parts that count end in pairs
    python -m benchmarks.generation_scale --smoke    # 8: the paths, not the figures

The real command grows trees of 3 × 3 with a tiny random model, so that all but the model weighs as much as it can. Time
runs from the first part that is committed to the last, over all parts but the first ones that were in flight together;
the exponent is the slope of log seconds per log users. Memory is the driver's own resident set, which must not follow
the users: its last sample is compared with the one when a tenth of the parts was committed.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks._report import Size, parser, report, size
from pulse_ray.config import load
from tests import tiny
from tests.histories import configure, tree_run

IN_FLIGHT = 2
SEED = 13
MAX_EXPONENT = 1.05
MAX_GROWTH = 1.1
SETTLED = 0.1

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many users to grow trees for, and in shards of how many."""

    users: tuple[int, ...]
    """Of each run of the command."""
    shard_users: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the command's process."""


FULL = Sizes(users=(400, 1600, 6400), shard_users=32)
QUICK = replace(FULL, users=FULL.users[:2])
# The command's start takes most of a minute, and compiling a part of the sampler longer than the generation itself.
SMOKE = Sizes(users=(8,), shard_users=2, environment={"TORCH_COMPILE_DISABLE": "1"})
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def main() -> int:
    """Measure every number of users and print the report."""
    chosen = size(parser("generation_scale", __doc__, quick="400 and 1,600 users").parse_args())
    sizes = SIZES[chosen]
    with tempfile.TemporaryDirectory() as folder:
        model = str(tiny.make(Path(folder) / "tiny"))
        runs = []
        for users in sizes.users:
            runs.append(_run(Path(folder) / str(users), users, model, sizes))
            print(runs[-1], file=sys.stderr, flush=True)
    return report("generation_scale", chosen, {"runs": runs}, _bars(runs))


def _bars(runs: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    slope = float(np.polyfit(np.log([run["users"] for run in runs]), np.log([run["seconds"] for run in runs]), 1)[0])
    growth = max(run["driver_end_mib"] / run["driver_settled_mib"] for run in runs)
    across = runs[-1]["driver_end_mib"] / runs[0]["driver_end_mib"]
    return {
        "exponent": {"value": round(slope, 3), "bar": MAX_EXPONENT, "holds": slope <= MAX_EXPONENT},
        "driver_growth": {"value": round(growth, 3), "bar": MAX_GROWTH, "holds": growth <= MAX_GROWTH},
        "driver_growth_across": {"value": round(across, 3), "bar": MAX_GROWTH, "holds": across <= MAX_GROWTH},
    }


def _run(folder: Path, users: int, model: str, sizes: Sizes) -> Figures:
    """The command over so many users: seconds for all of them at the rate of its steady part."""
    folder.mkdir()
    config = folder / "experiment.yaml"
    config.write_text(yaml.safe_dump(configure(folder, users, _settings(model))))
    stage = tree_run(load(config), sizes.shard_users)
    parts = math.ceil(users / sizes.shard_users)
    thoughts = Path(stage.output("thoughts").path)
    samples: list[tuple[int, float]] = []
    started = time.monotonic()
    with (folder / "log").open("w") as log:
        command = [sys.executable, "-m", "pulse_ray.cli", "tree", str(config)]
        driver = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **sizes.environment})
        process = psutil.Process(driver.pid)
        while driver.poll() is None:
            samples.append((len(list(thoughts.glob("*.parquet"))), process.memory_info().rss / 2**20))
            time.sleep(0.5)
    wall_s = time.monotonic() - started
    if driver.returncode:
        raise RuntimeError((folder / "log").read_text())
    times = sorted(part.stat().st_mtime for part in thoughts.glob("*.parquet"))
    steady = (times[-1] - times[IN_FLIGHT - 1]) * parts / (parts - IN_FLIGHT)
    live = [memory for done, memory in samples if SETTLED * parts <= done and memory > 1]
    return {
        "users": users,
        "seconds": round(steady, 2),
        "users_per_s": round(users / steady, 1),
        "wall_s": round(wall_s, 1),
        "driver_settled_mib": round(live[0], 1),
        "driver_end_mib": round(float(np.median(live[-6:-1] or live)), 1),
    }


def _settings(model: str) -> Figures:
    engine = {"model": model, "dtype": "float32", "max_model_len": 768, "max_num_seqs": 128, "kv_cache_gb": 1.0}
    sampling = {"max_tokens": 8, "gates": []}
    return {
        "seed": SEED,
        "engine": {**engine, "shards_in_flight": IN_FLIGHT},
        "tree": {"breadths": [3, 3], "sampling": sampling, "text": {"history_tokens": 120}},
    }


if __name__ == "__main__":
    sys.exit(main())
