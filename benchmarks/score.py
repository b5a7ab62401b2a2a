"""`pulse-ray score` on 50,546 users with a tiny ranker: users per second, the driver's memory, and a `kill -9`.

    python -m benchmarks.score            # all users: about 20 minutes on two cores
    python -m benchmarks.score --quick    # a few thousand: some minutes
    python -m benchmarks.score --smoke    # a few hundred: the paths, not the figures

The users are Amazon Video Games' (2018, 5-core) from ../shared/data where that is there, else drawn: as many, with
histories as long. The newest item of each is held out and ranked among nine others that the user never touched. The
real command runs in a process of its own: over all users with one actor, which shows the driver's memory; again with
two actors and a `kill -9` at a random moment, after which the same command finishes; over some of the users with one
actor and with two in turn, for their rates; and over users without candidates, which SASRec retrieves.

Rates count the time from the first part that is committed to the last; `wall_s` is the whole command with Ray's start.
"""

from __future__ import annotations

import gzip
import json
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import _at_once
from benchmarks._report import Size, parser, report, size
from pulse_ray.config import Config
from tests import tiny
from tests.scoring import audit, fake_shop
from tests.serving import shop

DATA = Path(__file__).parents[2] / "shared" / "data" / "sequences"
USERS, ITEMS = 50_546, 16_859
SHORTEST, LONGEST, MEAN_LENGTH = 5, 50, 8.71
CANDIDATES, RETRIEVED = 10, 20
SEED = 17
SETTLED = 0.1
"""The driver's memory is compared with what it was when this share of the parts was committed."""
GROWTH = 1.1
TOLERANCE = 1e-4


Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many users to score, in shards of how many, and how often."""

    users: int | None
    """None stands for all."""
    shard_users: int
    retrieved_users: int
    """Users without candidates."""
    retrieves_apart: bool
    """Whether a command of its own scores the users without candidates; they are among the others if not."""
    turns: int
    turn_users: int
    """Users whose rates with one actor and with two are compared, `turns` times."""
    interval_s: float
    """Time between two looks at the driver's memory."""
    at_once: int
    """Commands that run at the same time. Two disturb each other's figures."""


FULL = Sizes(
    users=None,
    shard_users=128,
    retrieved_users=5_000,
    retrieves_apart=True,
    turns=3,
    turn_users=10_000,
    interval_s=0.5,
    at_once=1,
)
QUICK = replace(FULL, users=5_000, retrieved_users=500, turns=1)
# A command takes many seconds to start, so that there are only three: undisturbed, killed, and once more.
SMOKE = Sizes(
    users=160,
    shard_users=8,
    retrieved_users=24,
    retrieves_apart=False,
    turns=0,
    turn_users=0,
    interval_s=0.05,
    at_once=2,
)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The driver at one moment: parts that are committed, and its memory in bytes, all and what it shares with none."""

    parts: int
    rss: int
    uss: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One undisturbed run of the command."""

    wall_s: float
    users_per_s: float
    samples: Sequence[Sample]


def sequences(rng: np.random.Generator) -> tuple[str, list[tuple[str, str]], list[tuple[str, list[str]]]]:
    """Where they come from, items with their titles, and users with their items, oldest first."""
    if DATA.is_dir():
        items = [(row["item_id"], row["title"]) for row in _lines("video_games.items.jsonl.gz")]
        return (
            "Video Games",
            items,
            [(row["user_id"], row["items"]) for row in _lines("video_games.sequences.jsonl.gz")],
        )
    print("No ../shared/data here: users are drawn at random", file=sys.stderr)
    words = [f"{front}{back}" for front in ("Star", "Moon", "Iron", "Zel", "Ko") for back in ("craft", "ring", "dor")]
    items = [(str(item), f"{' '.join(rng.choice(words, 4))} {item}") for item in range(ITEMS)]
    lengths = np.minimum(SHORTEST - 1 + rng.geometric(1 / (MEAN_LENGTH - SHORTEST + 1), USERS), LONGEST)
    return "synthetic", items, [(str(user), _draw(rng, n)) for user, n in enumerate(lengths)]


def _draw(rng: np.random.Generator, count: int, without: Sequence[str] = ()) -> list[str]:
    """Ids of so many distinct items."""
    found = dict.fromkeys(str(item) for item in rng.integers(ITEMS, size=3 * count))
    return [item for item in found if item not in without][:count]


def _lines(name: str) -> list[dict[str, Any]]:
    with gzip.open(DATA / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def input_rows(users: Sequence[tuple[str, list[str]]], rng: np.random.Generator | None) -> list[dict[str, Any]]:
    """Rows of the input; with a generator, each user's newest item goes among random ones that are ranked."""
    rows: list[dict[str, Any]] = [{"user_id": user, "history": items[:-1]} for user, items in users]
    if rng is not None:
        for row, (_, items) in zip(rows, users, strict=True):
            candidates = [items[-1], *_draw(rng, CANDIDATES - 1, without=items)]
            row["candidates"] = [str(item) for item in rng.permutation(candidates)]
    return rows


def write_users(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    """Write the input of the command."""
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def finished_run(folder: Path, items: Sequence[tuple[str, str]], shard_users: int) -> Path:
    """The configuration of a run with this catalogue; its ranker and its SASRec are tiny and untrained."""
    config = Config.model_validate(
        {
            "name": "run",
            "storage": str(folder / "runs"),
            "prepare": {"domains": [{"name": "games", "source": {"kind": "synthetic"}}]},
            "candidates": {"sasrec": {"dim": 64, "layers": 1}},
            "ranker": {
                "model": str(tiny.make(folder / "tiny")),
                "variants": ["thought_space"],
                "training": {"precision": "fp32"},
            },
            "score": {"shard_users": shard_users, "retrieve_k": RETRIEVED},
        }
    )
    catalogue = [("games", item, title) for item, title in items]
    fake_shop.make(config, catalogue, (), lambda path, settings: shop.make_adapter(path, settings, seed=0))
    (folder / "run.json").write_text(config.to_json())
    return folder / "run.json"


def command(config: Path, users: Path, name: str, actors: int) -> audit.Command:
    """The command with so many actors, its output beside the input."""
    pool = json.dumps({"min": actors, "max": actors})
    return audit.Command(config=config, users=users, output=users.parent / name, settings=[f"score.pool={pool}"])


def measure(job: audit.Command, interval_s: float) -> Measured:
    """Run the command to its end, and look at its driver's memory now and then."""
    samples: list[Sample] = []

    def sample(driver: psutil.Process) -> bool:
        try:
            memory = driver.memory_full_info()
        except psutil.Error:  # It has just ended.
            return False
        samples.append(Sample(parts=len(job.parts()), rss=memory.rss, uss=memory.uss))
        return False

    started = time.monotonic()
    assert job.until(sample, interval_s).wait() == 0, job.log.read_text()
    wall_s = time.monotonic() - started
    files = sorted((job.output / "recommendations").glob("*.parquet"), key=lambda file: file.stat().st_mtime_ns)
    rows = sum(pq.ParquetFile(file).metadata.num_rows for file in files[1:])
    seconds = (files[-1].stat().st_mtime_ns - files[0].stat().st_mtime_ns) / 1e9
    rate = rows / seconds
    print(f"{job.output.name}: {rate:.1f} users/s, {wall_s:.0f} s in all", file=sys.stderr, flush=True)
    return Measured(wall_s=round(wall_s, 1), users_per_s=round(rate, 1), samples=samples)


def memory(samples: Sequence[Sample], parts: int, shard_users: int) -> dict[str, float]:
    """How the driver's memory went, in MiB, from when a tenth of the parts was there; of several samples the median."""
    settled = [sample for sample in samples if SETTLED * parts <= sample.parts < parts]
    assert len(settled) > 1, "scoring ended before the driver's memory was looked at twice"
    users = [sample.parts * shard_users for sample in settled]
    found: dict[str, float] = {}
    for kind in ("rss", "uss"):
        values = np.array([getattr(sample, kind) / 2**20 for sample in settled])
        found |= {
            f"{kind}_begin_mib": float(np.median(values[:5])),
            f"{kind}_end_mib": float(np.median(values[-5:])),
            f"{kind}_peak_mib": float(values.max()),
            f"{kind}_mib_per_10000_users": float(np.polyfit(users, values, 1)[0]) * 10_000,
        }
    return {name: round(value, 2) for name, value in found.items()}


def interrupt(job: audit.Command, parts: int, rng: np.random.Generator) -> audit.Killed:
    """Kill the command at a random moment, and run it again to its end.

    Args:
        parts: of the whole output.
    """
    killed = audit.kill(job, int(rng.integers(int(0.2 * parts), int(0.8 * parts))))
    print(f"killed: {len(killed.committed)} of {parts} parts were committed", file=sys.stderr, flush=True)
    job.finish()
    return killed


def compare(job: audit.Command, undisturbed: audit.Command, killed: audit.Killed) -> tuple[Figures, Figures]:
    """What happened when the command was killed, and the bars that its output is held to.

    Args:
        job: was killed and has finished since.
        undisturbed: the same command's, which has finished.
    """
    changed = sum(audit.marks(job, part) != found for part, found in killed.committed.items())
    once = all(map(audit.each_once, (undisturbed, job)))
    difference = audit.difference(job, undisturbed)
    figures = {
        "parts_committed": len(killed.committed),
        "seconds_waited_for_ray": killed.seconds_to_follow,
        "processes_that_stayed": killed.survivors,
    }
    return figures, {
        "each_user_once": {"value": int(once), "bar": "1", "holds": once},
        "committed_parts_changed": {"value": changed, "bar": "0", "holds": changed == 0},
        "logit_difference": {"value": difference, "bar": f"at most {TOLERANCE}", "holds": difference <= TOLERANCE},
    }


def main() -> int:
    """Run the benchmark and print its report."""
    chosen = size(parser("score", __doc__, quick="fewer users; the figures are rough").parse_args())
    sizes = SIZES[chosen]
    rng = np.random.default_rng(SEED)
    source, items, everyone = sequences(rng)
    everyone = everyone[: sizes.users]
    without = everyone[: sizes.retrieved_users]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        config = finished_run(folder, items, sizes.shard_users)
        rows, bare_rows = input_rows(everyone, rng), input_rows(without, None)
        if not sizes.retrieves_apart:
            rows += bare_rows
        users = write_users(folder / "users.parquet", rows)
        bare = write_users(folder / "bare.parquet", bare_rows)
        some = folder / "some.parquet"
        pq.write_table(pq.read_table(users).slice(0, sizes.turn_users), some)
        undisturbed, disturbed = command(config, users, "undisturbed", 1), command(config, users, "killed", 2)
        turns = [
            (actors, command(config, some, f"turn-{turn}-{actors}", actors))
            for turn in range(sizes.turns)
            for actors in (1, 2)
        ]
        parts = math.ceil(len(rows) / sizes.shard_users)
        apart = [command(config, bare, "retrieved", 1)] if sizes.retrieves_apart else []
        look = partial(measure, interval_s=sizes.interval_s)
        whole, killed, *others = _at_once.run(
            [
                partial(look, undisturbed),
                partial(interrupt, disturbed, parts, rng),
                *(partial(look, job) for _, job in turns),
                *(partial(look, job) for job in apart),
            ],
            sizes.at_once,
        )
        assert len(undisturbed.parts()) == parts
        kill, bars = compare(disturbed, undisturbed, killed)
    rates: dict[int, list[float]] = {1: [], 2: []}
    for (actors, _), measured in zip(turns, others, strict=False):
        rates[actors].append(measured.users_per_s)
    retrieved = others[-1] if sizes.retrieves_apart else whole
    held = memory(whole.samples, parts, sizes.shard_users)
    growth = held["rss_end_mib"] / held["rss_begin_mib"]
    figures = {
        "users": len(everyone),
        "source": source,
        "candidates": CANDIDATES,
        "parts": parts,
        "seed": SEED,
        "users_per_s": whole.users_per_s,
        "wall_s": whole.wall_s,
        "in_turn": {
            "users": min(sizes.turn_users, len(everyone)),
            "users_per_s_with_1_actor": rates[1],
            "users_per_s_with_2_actors": rates[2],
            "two_over_one": round(float(np.median(rates[2]) / np.median(rates[1])), 2) if turns else None,
        },
        "retrieval": {
            "users": len(without),
            "items": len(items),
            "candidates": RETRIEVED,
            "users_per_s": retrieved.users_per_s,
            "wall_s": retrieved.wall_s,
        },
        "driver_memory": held,
        "kill": kill,
    }
    flat = {"value": round(growth, 3), "bar": f"at most {GROWTH}", "holds": growth <= GROWTH}
    return report("score", chosen, figures, {"driver_memory_growth": flat, **bars})


if __name__ == "__main__":
    sys.exit(main())
