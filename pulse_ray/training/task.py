"""What a model brings to training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn


@dataclass(kw_only=True, slots=True)
class Read:
    """Tokens that went through a model, and the places that they took, of which padding takes some."""

    tokens: int = 0
    places: int = 0


class Task(Protocol):
    """What a model brings to training. Built anew in every worker."""

    monitor: str
    """Name of the metric of `validate` that picks the best checkpoint."""
    higher_is_better: bool
    """Direction of `monitor`."""
    validate_first: bool
    """Whether to validate before the first step as well, for a curve that shows what training changed."""
    divisible: bool
    """Whether losses of some examples are the same without the others of their batch, so that passes may be smaller."""
    read: Read
    """What `losses` has read so far."""

    def module(self) -> nn.Module:
        """The module to train, in the precision that it is trained in. Frozen parameters require no gradient."""
        ...

    def __len__(self) -> int:
        """Number of training examples."""
        ...

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        """The loss of each of the training examples `indices`: [len(indices)], from one pass through `engine`."""
        ...

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        """Sum and count of each metric over this worker's share of the validation examples.

        All workers make as many passes through `engine`: where weights are sharded, each waits for the others.
        """
        ...

    def save(self, module: nn.Module, folder: Path) -> None:
        """Writes what inference needs, as safetensors and JSON."""
        ...

    def names(self, indices: Sequence[int]) -> list[str]:
        """Ids of training examples, for error messages."""
        ...
