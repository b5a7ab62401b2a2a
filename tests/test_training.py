"""The training loop under Ray Train and DeepSpeed, on a model small enough to run it many times."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from torch import nn

from pulse_ray import training
from pulse_ray.config import TrainingConfig, WorkersConfig
from pulse_ray.errors import TrainingError
from pulse_ray.workspace import Workspace

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Regression:
    """Learns y = x · (1, 2, 3, 4). With a `tripwire`, fails once at a step that is not the first of its epoch."""

    monitor = "loss"
    higher_is_better = False
    validate_first = True

    def __init__(self, tripwire: Path | None = None, poison: int | None = None) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.tensor(rng.normal(size=(50, 4)), dtype=torch.float32)
        self.y = self.x @ torch.tensor([1.0, 2.0, 3.0, 4.0])
        if poison is not None:
            self.y[poison] = torch.nan
        self.tripwire, self.calls = tripwire, 0

    def module(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.1), nn.Linear(16, 1))

    def __len__(self) -> int:
        return 50

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        self.calls += 1
        if self.tripwire and self.calls == 18 and not self.tripwire.exists():
            self.tripwire.touch()
            raise RuntimeError("the worker fails on purpose")
        return (engine(self.x[list(indices)])[:, 0] - self.y[list(indices)]) ** 2

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        rows = torch.arange(50)[rank::world]
        return {"loss": (float(((engine(self.x[rows])[:, 0] - self.y[rows]) ** 2).sum()), len(rows))}

    def save(self, module: nn.Module, folder: Path) -> None:
        save_file({name: value.clone() for name, value in module.state_dict().items()}, folder / "model.safetensors")

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"row {index}" for index in indices]


CONFIG = TrainingConfig(epochs=4, batch_size=8, micro_batch_size=3, lr=2e-2, workers=WorkersConfig(max_failures=1))


def fit(where: Path, folder: str, config: TrainingConfig = CONFIG, **task: object) -> dict[str, Any]:
    output = Workspace(str(where), "run").artefact("model")
    return training.fit(
        Regression, *task.values(), config=config, seed=3, output=output, folder=folder, title=f"test: {folder}"
    )


@dataclass(frozen=True)
class Trained:
    """A model that was trained without a disturbance."""

    folder: Path
    record: dict[str, Any]

    def check_same(self, folder: Path) -> None:
        """Whether another model's weights are its own, to the last bit."""
        ours, theirs = (load_file(one / "model.safetensors") for one in (self.folder / "run/model/undisturbed", folder))
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=0)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("undisturbed")
    return Trained(folder, fit(folder, "undisturbed"))


def test_a_crash_changes_nothing(undisturbed: Trained, tmp_path: Path) -> None:
    disturbed = fit(tmp_path, "disturbed", tripwire=tmp_path / "tripped")
    assert (tmp_path / "tripped").exists()
    assert disturbed == undisturbed.record
    undisturbed.check_same(tmp_path / "run/model/disturbed")
    evaluations = undisturbed.record["evaluations"]
    assert [entry["step"] for entry in evaluations] == [0, 7, 14, 21, 28]
    assert evaluations[-1]["loss"] < 0.5 * evaluations[0]["loss"]
    assert not (undisturbed.folder / "run/model/undisturbed/checkpoints").exists()
    again = fit(undisturbed.folder, "undisturbed", poison=0)
    assert again == undisturbed.record, "a model that is there was trained again"


def test_validation_beside_training_gives_the_same_model(undisturbed: Trained, tmp_path: Path) -> None:
    beside = fit(
        tmp_path, "beside", CONFIG.model_copy(update={"async_validation": True}), tripwire=tmp_path / "tripped"
    )
    assert (tmp_path / "tripped").exists(), "the workers did not fail in between"
    for name in ("steps", "best_step"):
        assert beside[name] == undisturbed.record[name]
    for one, other in zip(beside["evaluations"], undisturbed.record["evaluations"], strict=True):
        assert one == pytest.approx(other)
    undisturbed.check_same(tmp_path / "run/model/beside")
    assert not (tmp_path / "run/model/beside/checkpoints").exists()


def test_a_loss_that_is_not_finite_stops_with_the_examples(ray_cluster: None, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"workers": WorkersConfig(max_failures=0)})
    with pytest.raises(TrainingError, match=r"loss at step 0 is nan.*row \d+"):
        fit(
            tmp_path,
            "poisoned",
            config.model_copy(update={"batch_size": 50, "micro_batch_size": None}),
            tripwire=None,
            poison=13,
        )


def test_every_example_is_seen_once_an_epoch_however_it_is_cut() -> None:
    for world, micro in ((1, None), (2, None), (3, 2)):
        config = TrainingConfig(epochs=2, batch_size=8, micro_batch_size=micro)
        plan = training.Plan(examples=50, world=world, config=config)
        for epoch in range(2):
            seen = [
                index
                for step in range(epoch * plan.steps_per_epoch, (epoch + 1) * plan.steps_per_epoch)
                for rank in range(world)
                for piece in plan.micro_batches(plan.batch(5, step), rank)
                for index in piece.tolist()
            ]
            assert sorted(seen) == list(range(50))
        factors = [plan.lr_factor(step) for step in range(plan.total_steps + 1)]
        assert max(factors) == 1.0 and factors[0] > 0 and factors[-1] == pytest.approx(0.0, abs=1e-9)
