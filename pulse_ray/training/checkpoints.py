"""Checkpoints of a training run: what is in them, whether it is what was written, and which one to go on from.

A checkpoint has `state.json` and `monitor.json`, the module's trainable weights (`trainable.safetensors`), DeepSpeed's
own files (`deepspeed/`), what inference needs (`weights/`), and of each worker a list of what it wrote, with digests.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ray.train
from ray.train import Checkpoint, CheckpointConsistencyMode
from ray.train.collective import broadcast_from_rank_zero

from pulse_ray.errors import TrainingError

STATE, MONITOR, TRAINABLE, WEIGHTS, DEEPSPEED = (
    "state.json",
    "monitor.json",
    "trainable.safetensors",
    "weights",
    "deepspeed",
)


@dataclass(kw_only=True)
class State:
    """Where a run is. Stored in every checkpoint as JSON."""

    step: int = 0
    world: int = 1
    best: float | None = None
    best_step: int = 0
    since_best: int = 0
    done: bool = False
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> State:
        """The state in a checkpoint's folder."""
        return cls(**json.loads((folder / STATE).read_text()))

    def write(self, folder: Path) -> None:
        """Puts it into a checkpoint's folder."""
        (folder / STATE).write_text(json.dumps(asdict(self)))


def seal(folder: Path, rank: int) -> None:
    """Lists what a worker wrote into a checkpoint's folder, with digests."""
    found = {str(file.relative_to(folder)): _digest(file) for file in sorted(folder.rglob("*")) if file.is_file()}
    (folder / f"digests-{rank}.json").write_text(json.dumps(found))


def check(folder: Path) -> None:
    """Whether every worker's files are there, and are what it wrote.

    Raises:
        TrainingError: they are not; it names the file.
    """
    try:
        world = State.read(folder).world
        for rank in range(world):
            for name, digest in json.loads((folder / f"digests-{rank}.json").read_text()).items():
                if _digest(folder / name) != digest:
                    raise _damaged(folder, f"{name} is not what was written")
    except (OSError, ValueError, TypeError) as error:
        raise _damaged(folder, str(error)) from error


def _damaged(folder: Path, cause: str) -> TrainingError:
    return TrainingError(
        f"checkpoint {folder} is damaged: {cause}", remedy="Run the same command again: the one before is taken"
    )


@contextlib.contextmanager
def opened(checkpoint: Checkpoint) -> Iterator[Path]:
    """A checkpoint's folder here, once it is known to be whole.

    Raises:
        TrainingError: it is damaged.
    """
    with checkpoint.as_directory() as local:
        check(Path(local))
        yield Path(local)


@contextlib.contextmanager
def newest(refused: list[str]) -> Iterator[Path | None]:
    """The folder of the newest checkpoint that is whole; None where there is none. To be used in all workers at once.

    The first worker chooses for all.

    Args:
        refused: gets a line for each newer one that is damaged.

    Raises:
        TrainingError: there are some, and all are damaged.
    """
    reported = ray.train.get_all_reported_checkpoints(consistency_mode=CheckpointConsistencyMode.COMMITTED)
    by_age = sorted(reported, key=lambda one: int(one.metrics["step"]), reverse=True)
    with contextlib.ExitStack() as stack:
        folder: Path | None = None
        chosen: str | None = None
        first = ray.train.get_context().get_world_rank() == 0
        for one in by_age if first else ():
            try:
                folder, chosen = stack.enter_context(opened(one.checkpoint)), one.checkpoint.path
            except TrainingError as error:
                refused.append(error.message)
                continue
            break
        if first and by_age and chosen is None:
            raise TrainingError("; ".join(refused), remedy="Delete the model's folder to train it from the start")
        chosen = broadcast_from_rank_zero(chosen)
        if chosen is not None and folder is None:
            known = {one.checkpoint.path: one.checkpoint for one in reported}
            folder = stack.enter_context(opened(known[chosen]))
        yield folder


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "blake2b").hexdigest()
