"""The training loop under Ray Train and DeepSpeed, on a model small enough to run it many times."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray import cloudpickle
from safetensors.torch import load_file, save_file
from torch import nn

from pulse_ray import runtime
from pulse_ray.config import TrainingConfig, WorkersConfig
from pulse_ray.errors import ArtifactError, TrainingError
from pulse_ray.training import checkpoints, fitting
from pulse_ray.training.board import News
from pulse_ray.training.plan import Plan
from pulse_ray.training.task import Read
from pulse_ray.workspace import Artefact, Workspace

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Regression:
    """Learns y = x · (1, 2, 3, 4).

    Args:
        tripwire: a file; while it is not there, pass `trip_at` makes it and fails.
        poison: an example whose loss is not a number.
        fits: examples that fit into memory.
        dropout: draws that depend on how a batch is cut.
    """

    monitor = "loss"
    higher_is_better = False
    validate_first = True
    divisible = True

    def __init__(
        self,
        *,
        tripwire: Path | None = None,
        trip_at: int = 18,
        poison: int | None = None,
        fits: int = 50,
        dropout: float = 0.1,
    ) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.tensor(rng.normal(size=(50, 4)), dtype=torch.float32)
        self.y = self.x @ torch.tensor([1.0, 2.0, 3.0, 4.0])
        if poison is not None:
            self.y[poison] = torch.nan
        self.tripwire, self.trip_at, self.calls = tripwire, trip_at, 0
        self.fits, self.dropout, self.read = fits, dropout, Read()

    def module(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 16), nn.Dropout(self.dropout), nn.Linear(16, 1))

    def __len__(self) -> int:
        return 50

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        self.calls += 1
        if self.tripwire and self.calls == self.trip_at and not self.tripwire.exists():
            time.sleep(1.0)  # The last checkpoint is uploaded meanwhile.
            self.tripwire.touch()
            raise RuntimeError("the worker fails on purpose")
        if len(indices) > self.fits:
            raise torch.OutOfMemoryError("as a GPU would say")
        self.read.tokens += 3 * len(indices)
        self.read.places += 4 * len(indices)
        return (engine(self.x[list(indices)])[:, 0] - self.y[list(indices)]) ** 2

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        rows = torch.arange(50)[rank::world]
        return {"loss": (float(((engine(self.x[rows])[:, 0] - self.y[rows]) ** 2).sum()), len(rows))}

    def save(self, module: nn.Module, folder: Path) -> None:
        save_file({name: value.clone() for name, value in module.state_dict().items()}, folder / "model.safetensors")

    def names(self, indices: Sequence[int]) -> list[str]:
        return [f"row {index}" for index in indices]


ONCE = WorkersConfig(max_failures=0)
TWO = WorkersConfig(count=2, cpus=0.5, threads=1)
TWO_ONCE = TWO.model_copy(update={"max_failures": 0})
CONFIG = TrainingConfig(epochs=4, batch_size=8, micro_batch_size=3, lr=2e-2, workers=WorkersConfig(max_failures=1))


def fit(where: Path, folder: str, config: TrainingConfig = CONFIG, **task: Any) -> dict[str, Any]:
    output = Workspace(str(where), "run").artefact("model")
    return fitting.fit(
        partial(Regression, **task),
        config=config,
        seed=3,
        output=output,
        folder=folder,
        title=f"test: {folder}",
        upload_interval_s=0,
    )


@dataclass(frozen=True)
class Trained:
    """A model that was trained without a disturbance."""

    folder: Path
    record: dict[str, Any]

    def check_same(self, folder: Path) -> None:
        """Whether another model's weights are its own, to the last bit."""
        self.check_close(folder, 0.0)

    def check_close(self, folder: Path, apart: float) -> None:
        """Whether no weight of another model is further apart than that."""
        ours, theirs = (load_file(one / "model.safetensors") for one in (self.folder / "run/model/undisturbed", folder))
        for name, value in ours.items():
            torch.testing.assert_close(theirs[name], value, rtol=0, atol=apart)


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
    config = CONFIG.model_copy(update={"workers": TWO_ONCE, "batch_size": 50, "micro_batch_size": None})
    with pytest.raises(TrainingError, match=r"loss at step 0 is nan; its examples: row 13; there is no checkpoint yet"):
        fit(tmp_path, "poisoned", config, poison=13)


@pytest.fixture(scope="module")
def plain(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A single worker's, without draws that depend on how a batch is cut."""
    folder = tmp_path_factory.mktemp("plain")
    return Trained(folder, fit(folder, "undisturbed", dropout=0.0))


@pytest.mark.parametrize("stage", [2, 3])
def test_two_workers_give_the_losses_of_one(stage: int, plain: Trained, tmp_path: Path) -> None:
    found = fit(tmp_path, "two", CONFIG.model_copy(update={"workers": TWO, "zero_stage": stage}), dropout=0.0)
    for name in ("steps", "evaluations"):
        for one, other in zip(found[name], plain.record[name], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    plain.check_close(tmp_path / "run/model/two", 1e-4)


def test_another_number_of_workers_goes_on(ray_cluster: None, tmp_path: Path) -> None:
    """From one worker to two, and from two to one."""
    moved = [CONFIG.model_copy(update={"workers": workers}) for workers in (ONCE, TWO_ONCE)]
    # After the checkpoints of steps 7 and 14; one worker makes three passes in a step, two make two.
    for config, trip_at in zip(moved, (30, 20), strict=True):
        with pytest.raises(TrainingError, match="training workers failed"):
            fit(tmp_path, "moved", config, tripwire=tmp_path / f"tripped {trip_at}", trip_at=trip_at)
    found = fit(tmp_path, "moved", moved[0])
    assert [entry["step"] for entry in found["evaluations"]] == [0, 7, 14, 21, 28]
    assert [entry["step"] for entry in found["steps"]] == list(range(1, 29))
    assert found["evaluations"][-1]["loss"] < 0.5 * found["evaluations"][0]["loss"]


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    undisturbed: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = CONFIG.model_copy(update={"workers": ONCE})
    with pytest.raises(TrainingError, match="on purpose"):
        fit(tmp_path, "damaged", config, tripwire=tmp_path / "tripped", trip_at=54)
    states = {
        json.loads(state.read_text())["step"]: state.parent
        for state in (tmp_path / "run/model/damaged/checkpoints").rglob(checkpoints.STATE)
    }
    assert sorted(states) == [7, 14]
    weights = states[14] / checkpoints.TRAINABLE
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert fit(tmp_path, "damaged", config) == undisturbed.record
    undisturbed.check_same(tmp_path / "run/model/damaged")
    said = capfd.readouterr().err
    assert f"checkpoint {states[14]} is damaged" in said and "trainable.safetensors" in said


def test_what_does_not_fit_is_split(plain: Trained, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = fit(tmp_path, "split", CONFIG.model_copy(update={"micro_batch_size": None}), fits=4, dropout=0.0)
    for one, other in zip(found["steps"], plain.record["steps"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    plain.check_close(tmp_path / "run/model/split", 1e-5)
    assert capfd.readouterr().err.count("do not fit into memory") == 1


def test_what_may_not_be_split_ends_with_an_error(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Regression, "divisible", False)
    with pytest.raises(TrainingError, match="a pass of 3 examples needs more memory"):
        fit(tmp_path, "whole", CONFIG.model_copy(update={"workers": ONCE}), fits=2)


def test_curves_are_kept_for_tensorboard(undisturbed: Trained) -> None:
    (events,) = (undisturbed.folder / "run/model/undisturbed/tensorboard").iterdir()
    written = events.read_bytes()
    for name in (b"training/loss", b"training/grad", b"training/tokens/s", b"training/padding", b"validation/loss"):
        assert name in written


def test_curves_that_cannot_be_uploaded_do_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = Workspace(str(tmp_path), "run").artefact("model")
    upload, tries = Artefact.upload, list[int]()

    def fails_twice(artefact: Artefact, folder: Path) -> None:
        tries.append(len(tries))
        if len(tries) <= 2:
            raise ArtifactError("cannot copy the curves: the storage does not answer", remedy="Wait")
        upload(artefact, folder)

    monkeypatch.setattr(Artefact, "upload", fails_twice)
    with caplog.at_level(logging.WARNING), fitting._Curves(target, upload_interval_s=0) as curves:
        for step in (1, 2, 3, 2):  # A group of workers that is started again goes back to a checkpoint.
            curves.add(News(step=step, total=3, figures={"loss": 1 / step, "validation/loss": 2.0}))
    assert len(tries) == 5
    assert len([record for record in caplog.records if "cannot be reported" in record.message]) == 1
    assert any(b"training/loss" in file.read_bytes() for file in (tmp_path / "run/model/tensorboard").iterdir())


def test_every_example_is_seen_once_an_epoch_however_it_is_cut() -> None:
    for world, micro in ((1, None), (2, None), (3, 2)):
        config = TrainingConfig(epochs=2, batch_size=8, micro_batch_size=micro)
        plan = Plan(examples=50, world=world, config=config)
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


def test_workers_keep_what_a_job_says_of_their_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in fitting.MEMORY | fitting.THREADS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOMP_SPINCOUNT", runtime.WORKER_ENVIRONMENT["GOMP_SPINCOUNT"])
    alone = TrainingConfig()
    assert fitting.environment(alone) == fitting.MEMORY | fitting.THREADS
    assert fitting.environment(TrainingConfig(async_validation=True)) == fitting.MEMORY
    assert fitting.environment(TrainingConfig(workers=WorkersConfig(gpus=1))) == {}
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "4")
    assert set(fitting.environment(alone)) == set(fitting.MEMORY) - {"MALLOC_ARENA_MAX"}
