"""A batch that is cut among workers has the negatives of the whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from ray import cloudpickle
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from pulse_ray.config import TrainingConfig, WorkersConfig
from pulse_ray.thought_space import gathering
from pulse_ray.thought_space.loss import info_nce
from pulse_ray.training import fitting
from pulse_ray.training.task import Read
from pulse_ray.workspace import Workspace

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Pairs:
    """Learns to tell which of two views belong together."""

    monitor = "loss"
    higher_is_better = False
    validate_first = False

    def __init__(self) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.one = torch.randn(21, 6, generator=drawn)
        self.other = self.one @ torch.randn(6, 6, generator=drawn)
        self.read = Read()

    def module(self) -> nn.Module:
        return nn.Linear(6, 6)

    def __len__(self) -> int:
        return len(self.one)

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        vectors = F.normalize(engine(self.one[list(indices)]), dim=1)
        sizes = gathering.sizes(len(indices), vectors.device)
        columns = F.normalize(gathering.gathered(vectors, sizes), dim=1)
        places = sum(sizes[: gathering.workers()[0]]) + torch.arange(len(indices))
        anchors = F.normalize(self.other[list(indices)], dim=1)
        everything = torch.ones(len(indices), len(columns), dtype=torch.bool)
        return info_nce(anchors @ columns.T, places, everything, 0.1)

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        return {"loss": (float(engine(self.one).sum()), 1)}

    def save(self, module: nn.Module, folder: Path) -> None:
        save_file({name: value.clone() for name, value in module.state_dict().items()}, folder / "model.safetensors")

    def names(self, indices: Sequence[int]) -> list[str]:
        return [str(index) for index in indices]


def _losses(folder: Path, workers: int) -> list[dict[str, Any]]:
    config = TrainingConfig(
        epochs=2, batch_size=8, lr=1e-2, workers=WorkersConfig(count=workers, cpus=0.5, threads=1, max_failures=0)
    )
    output = Workspace(str(folder), f"run{workers}").artefact("model")
    record = fitting.fit(Pairs, config=config, seed=1, output=output, folder="", title=f"{workers} workers")
    return list(record["steps"])


def test_two_workers_have_the_negatives_of_one(ray_cluster: None, tmp_path: Path) -> None:
    alone, together = _losses(tmp_path, 1), _losses(tmp_path, 2)
    assert len(alone) == 6 and alone[-1]["loss"] < alone[0]["loss"]
    for one, other in zip(together, alone, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
