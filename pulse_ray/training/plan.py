"""Sizes and order of a training run, as pure functions of its configuration, seed and step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from pulse_ray.config import TrainingConfig
from pulse_ray.seeding import derive


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes that follow from the number of examples, the workers and the configuration.

    `pass_limit`: examples of which a pass is known to fit into memory, where one was found that does not.
    """

    examples: int
    world: int
    config: TrainingConfig
    pass_limit: int | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch; the last batch may be smaller."""
        return math.ceil(self.examples / self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run, were it not stopped early."""
        return self.steps_per_epoch * self.config.epochs

    @property
    def accumulation(self) -> int:
        """Forward passes of a worker in one optimizer step."""
        share = math.ceil(self.config.batch_size / self.world)
        sizes = (share, self.config.micro_batch_size, self.pass_limit)
        return math.ceil(share / min(size for size in sizes if size is not None))

    @property
    def evaluation_interval(self) -> int:
        """Optimizer steps between validations."""
        return max(1, round(self.steps_per_epoch / self.config.evaluations_per_epoch))

    def batch(self, seed: int, step: int) -> np.ndarray:
        """Indices of the examples in optimizer step `step`: [at most batch_size]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        order = _order(derive(seed, "order", epoch), self.examples)
        size = self.config.batch_size
        return order[place * size : (place + 1) * size]

    def micro_batches(self, batch: np.ndarray, rank: int) -> list[np.ndarray]:
        """A worker's share of a batch, in as many pieces for every worker; pieces may be empty."""
        return np.array_split(batch[rank :: self.world], self.accumulation)

    def lr_factor(self, step: int) -> float:
        """Linear warm-up, then cosine decay to zero."""
        warmup = max(1, round(self.config.warmup_fraction * self.total_steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1, self.total_steps - warmup))))


@lru_cache(maxsize=1)
def _order(seed: int, examples: int) -> np.ndarray:
    """Random order of the examples in an epoch. Kept for the epoch's steps: ten million take 0.4 s to shuffle."""
    order = np.random.default_rng(seed).permutation(examples)
    order.flags.writeable = False
    return order
