"""SASRec against RecBole's on Video Games: NDCG@10 over the whole catalogue, HR@1 among ten, seconds per epoch.

    python -m benchmarks.sasrec            # ours, then RecBole for 25 minutes (--minutes)
    python -m benchmarks.sasrec --quick    # some users and two epochs: the path, not the figures
    python -m benchmarks.sasrec --smoke    # a few hundred users and two epochs, one of RecBole's: the same, faster

Sequences are Amazon Video Games' (2018, 5-core) from ../shared/data where that is there, else drawn. Of each user the
newest item is the test target and the one before it the validation target; the rest trains. Ours goes through
`fitting.fit` as in a run. RecBole 1.2.1 runs in a process and a virtual environment of its own (`.bench/recbole`, made
on the first run) with as many dimensions, layers and heads, and nearly its own defaults for the rest. RecBole trains as
many epochs as fit into the given minutes, validation not counted; ours a fixed number. Both keep the epoch that was
best on validation. The same code ranks for both: items of the history are left out, ties rank against the target, and
the nine random items beside it, which the user never touched, are the same.

Seconds per epoch are medians over the epochs, without validation.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ray import cloudpickle

from benchmarks._report import Size, parser, report, size
from benchmarks.score import sequences
from pulse_ray import runtime
from pulse_ray.candidates.sasrec import Sasrec, SasrecTask, catalogue_ranks
from pulse_ray.config import ClusterConfig, SasrecConfig, TrainingConfig
from pulse_ray.metrics import hit_ratio, ndcg, ranks
from pulse_ray.schema import example_id, table
from pulse_ray.training import fitting
from pulse_ray.workspace import Workspace

ROOT = Path(__file__).parents[1]
PEER = ROOT / ".bench" / "recbole"
# Of what RecBole asks for, only what SASRec imports; numpy 2 and pandas 3 lack names that it uses.
PEER_TORCH = "torch==2.13.0"
PEER_PACKAGES = [
    *("numpy==1.26.4", "pandas==2.2.3", "scipy==1.13.1", "scikit-learn", "tensorboard", "thop"),
    *("colorlog", "colorama", "pyyaml", "tqdm", "tabulate", "texttable", "plotly", "psutil"),
]
PEER_RECBOLE = "recbole==1.2.1"
CONFIG = SasrecConfig(
    dim=64,
    layers=2,
    heads=2,
    dropout=0.5,
    loss="sampled_softmax",
    negatives=1024,
    training=TrainingConfig(
        epochs=40, batch_size=256, lr=2e-3, zero_stage=0, patience=10, warmup_fraction=0.05, validation_examples=5_000
    ),
)
"""What configs/video_games.yaml recommends."""
DOMAIN = "games"
MAX_LENGTH = 50
NEGATIVES = 9
RANK_BATCH = 512
SEED = 17
HR_BAR, SPEED_BAR, MINUTES_BAR = 0.67, 3.0, 30.0

User = tuple[str, list[str]]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How many users to train and test on, and for how long."""

    users: int | None
    """None stands for all."""
    shard_users: int
    """Users in each file of examples."""
    epochs: int
    peer_minutes: float | None
    """RecBole's training, one epoch at least; None stands for what the command line says."""


FULL = Sizes(users=None, shard_users=5_000, epochs=CONFIG.training.epochs, peer_minutes=None)
QUICK = Sizes(users=2_000, shard_users=5_000, epochs=2, peer_minutes=0.2)
SMOKE = Sizes(users=300, shard_users=100, epochs=2, peer_minutes=0.0)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}

# Ray's workers cannot import the benchmarks.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass(frozen=True, kw_only=True)
class Case:
    """A test user by item indices: history, target, and items that the user never touched."""

    user: str
    history: list[int]
    target: int
    negatives: list[int]


class Timed(SasrecTask):
    """Notes in a file, line by line, when training began and when each validation began and ended."""

    def __init__(self, clock: Path, *args: Any) -> None:
        super().__init__(*args)
        self.clock, self.started = clock, False

    def losses(self, engine: Any, indices: Sequence[int]) -> Any:
        if not self.started:
            self.started = True
            self._note()
        return super().losses(engine, indices)

    def validate(self, engine: Any, rank: int, world: int) -> dict[str, tuple[float, int]]:
        self._note()
        found = super().validate(engine, rank, world)
        self._note()
        return found

    def _note(self) -> None:
        with self.clock.open("a") as file:
            file.write(f"{time.monotonic()}\n")


def write_tables(
    workspace: Workspace, items: Sequence[tuple[str, str]], users: Sequence[User], shard_users: int
) -> None:
    """Write the tables that SASRec reads, as `prepare` writes them."""
    rows = [
        {"domain": DOMAIN, "item_id": item, "title": title, "text": title, "popularity": 0, "categories": []}
        | {"description": "", "brand": ""}
        for item, title in items
    ]
    workspace.artefact("items").write("part-0000", table("items", rows))
    for split, held in (("train", 3), ("validation", 2), ("test", 1)):
        for number, start in enumerate(range(0, len(users), shard_users)):
            shard = users[start : start + shard_users]
            found = [_example(user, steps, len(steps) - held, split) for user, steps in shard]
            name = f"{split}-{number:04}-0000"
            workspace.artefact("examples").write(name, table("examples", found))


def _example(user: str, steps: Sequence[str], place: int, split: str) -> dict[str, Any]:
    """The example whose target is the item at `place`; the sequences carry no times, so places stand for them."""
    history = [
        {"item_id": item, "timestamp": when, "rating": None, "review": None} for when, item in enumerate(steps[:place])
    ]
    return {
        "example_id": example_id(DOMAIN, user, place),
        "domain": DOMAIN,
        "user_id": user,
        "split": split,
        "history": history,
        "target_item": steps[place],
    }


def make_cases(users: Sequence[User], index: dict[str, int], rng: np.random.Generator) -> list[Case]:
    """The test case of each user, with the negatives that both sides are given."""
    found = []
    for user, steps in users:
        places = [index[item] for item in steps]
        drawn = dict.fromkeys(rng.integers(1, len(index) + 1, len(steps) + 4 * NEGATIVES).tolist())
        negatives = [item for item in drawn if item not in places][:NEGATIVES]
        assert len(negatives) == NEGATIVES, "the catalogue is too small"
        history = places[:-1][-MAX_LENGTH:]
        found.append(Case(user=user, history=history, target=places[-1], negatives=negatives))
    return found


def quality(states: np.ndarray, items: np.ndarray, cases: Sequence[Case]) -> dict[str, float]:
    """Metrics over the test users.

    Args:
        states: [users, D].
        items: [1 + V, D]; row 0 is padding.
    """
    among_all, among_ten = [], []
    for start in range(0, len(cases), RANK_BATCH):
        part = cases[start : start + RANK_BATCH]
        logits = states[start : start + RANK_BATCH] @ items.T
        logits[:, 0] = -np.inf
        ten = np.array([[case.target, *case.negatives] for case in part])
        among_ten.append(ranks(np.take_along_axis(logits, ten, axis=1), np.zeros(len(part), dtype=np.int64)))
        targets = [case.target for case in part]
        among_all.append(catalogue_ranks(logits, [case.history for case in part], targets))
    full, sampled = np.concatenate(among_all), np.concatenate(among_ten)
    return {
        "ndcg@10": round(ndcg(full, 10), 5),
        "hr@10": round(hit_ratio(full, 10), 5),
        "hr@1_of_10": round(hit_ratio(sampled, 1), 5),
    }


def ours(config: SasrecConfig, workspace: Workspace, folder: Path, cases: Sequence[Case]) -> dict[str, Any]:
    """Trains SASRec as a run does, and measures it."""
    clock, output = folder / "clock.txt", workspace.artefact("sasrec")
    started = time.monotonic()
    with runtime.cluster(ClusterConfig()):
        record = fitting.fit(
            Timed,
            *(clock, config, workspace.artefact("items"), workspace.artefact("examples"), MAX_LENGTH),
            config=config.training,
            seed=SEED,
            output=output,
            folder="",
            title="SASRec",
        )
    wall_s = time.monotonic() - started
    times = [float(line) for line in clock.read_text().split()]
    epochs_s = [round(end - begin, 2) for begin, end in zip(times[::2], times[1::2], strict=False)]
    model = Sasrec.load(Path(output.path))
    return {
        **quality(model.states([case.history for case in cases]), model.items.weight.detach().numpy(), cases),
        "epochs": len(epochs_s),
        "best_epoch": round(fitting.best_metrics(record)["epoch"]),
        "seconds_per_epoch": round(float(np.median(epochs_s)), 2),
        "epochs_s": epochs_s,
        "minutes": round(wall_s / 60, 1),
        "validation_ndcg@10": [round(entry["ndcg@10"], 4) for entry in record["evaluations"]],
        "config": config.model_dump(mode="json", exclude={"training": {"workers"}}),
    }


def peer_python() -> Path:
    """The interpreter of RecBole's environment, which is made where there is none yet."""
    python, ready = PEER / "bin" / "python", PEER / ".ready"
    if not ready.exists():
        print(f"Installing RecBole into {PEER}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(PEER)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-compile"]
        if subprocess.run([*install, f"{PEER_TORCH}+cpu"], capture_output=True).returncode:
            subprocess.run([*install, PEER_TORCH], check=True)
        subprocess.run([*install, *PEER_PACKAGES], check=True)
        subprocess.run([*install, "--no-deps", PEER_RECBOLE], check=True)
        ready.touch()
    return python


def peer(folder: Path, users: Sequence[User], index: dict[str, int], cases: Sequence[Case], minutes: float) -> Any:
    """Trains RecBole's SASRec, and measures it."""
    python = peer_python()
    (folder / "games").mkdir()
    with (folder / "games" / "games.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        file.writelines(_lines(users))
    started = time.monotonic()
    program = Path(__file__).with_name("_recbole.py")
    arguments = [str(minutes), str(CONFIG.dim), str(MAX_LENGTH)]
    subprocess.run([python, "-W", "ignore", program, folder, *arguments], cwd=folder, check=True, stdout=sys.stderr)
    wall_s = time.monotonic() - started
    found, described = np.load(folder / "peer.npz"), json.loads((folder / "peer.json").read_text())
    items = np.zeros((len(index) + 1, CONFIG.dim), dtype=np.float32)
    items[[index[item] for item in found["item_ids"].tolist()]] = found["items"]
    rows = {user: row for row, user in enumerate(found["users"].tolist())}
    states = found["states"][[rows[case.user] for case in cases]]
    epochs = described["epochs"]
    curve = [epoch.get("validation_ndcg@10", 0.0) for epoch in epochs]
    return {
        **quality(states, items, cases),
        "epochs": len(epochs),
        "best_epoch": int(np.argmax(curve)) + 1,
        "seconds_per_epoch": round(float(np.median([epoch["seconds"] for epoch in epochs])), 2),
        "epochs_s": [epoch["seconds"] for epoch in epochs],
        "minutes": round(wall_s / 60, 1),
        "minutes_of_training": minutes,
        "stopped_early": described["stopped_early"],
        "examples_per_epoch": described["examples"],
        "validation_ndcg@10": curve,
        "version": PEER_RECBOLE,
    }


def _lines(users: Sequence[User]) -> Iterator[str]:
    for user, steps in users:
        yield from (f"{user}\t{item}\t{place}\n" for place, item in enumerate(steps))


def bars(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What SASRec is held to."""
    speed = round(other["seconds_per_epoch"] / mine["seconds_per_epoch"], 2)
    hits, gain, minutes = mine["hr@1_of_10"], mine["ndcg@10"], mine["minutes"]
    return {
        "hr@1_of_10": {"value": hits, "bar": f"at least {HR_BAR}", "holds": hits >= HR_BAR},
        "minutes": {"value": minutes, "bar": f"at most {MINUTES_BAR}", "holds": minutes <= MINUTES_BAR},
        "ndcg@10": {"value": gain, "bar": f"at least RecBole's {other['ndcg@10']}", "holds": gain >= other["ndcg@10"]},
        "times_faster_per_epoch": {"value": speed, "bar": f"at least {SPEED_BAR}", "holds": speed >= SPEED_BAR},
    }


def main() -> int:
    """Run the benchmark and print its report."""
    command_line = parser("sasrec", __doc__, quick="some users, two epochs; the figures mean nothing")
    command_line.add_argument(
        "--minutes", type=float, default=25.0, help="RecBole's training in the full size (default: %(default)s)"
    )
    options = command_line.parse_args()
    chosen = size(options)
    sizes = SIZES[chosen]
    minutes = options.minutes if sizes.peer_minutes is None else sizes.peer_minutes
    config = CONFIG.model_copy(update={"training": CONFIG.training.model_copy(update={"epochs": sizes.epochs})})
    rng = np.random.default_rng(SEED)
    source, items, everyone = sequences(rng)
    users = everyone[: sizes.users]
    index = {item: place for place, (item, _) in enumerate(items, start=1)}
    cases = make_cases(users, index, rng)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        workspace = Workspace(str(folder), "run")
        write_tables(workspace, items, users, sizes.shard_users)
        mine = ours(config, workspace, folder, cases)
        print(f"ours: {mine}", file=sys.stderr, flush=True)
        other = peer(folder, users, index, cases, minutes)
    figures = {"source": source, "users": len(users), "items": len(items), "seed": SEED, "ours": mine, "recbole": other}
    return report("sasrec", chosen, figures, bars(mine, other))


if __name__ == "__main__":
    sys.exit(main())
