"""What workers tell the driver of a training run, and each other when they are started again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pulse_ray.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class News:
    """What happened at a step: figures to plot, by name."""

    step: int
    total: int
    figures: dict[str, float] = field(default_factory=dict)


class Board:
    """Outlives the workers, as it lives in an actor beside the driver."""

    def __init__(self) -> None:
        self._news: list[News] = []
        self._notices: list[str] = []
        self._limit: int | None = None
        self._stop: TrainingError | None = None

    def put(self, news: News) -> None:
        """Adds news."""
        self._news.append(news)

    def say(self, notice: str) -> None:
        """Adds a line for people."""
        self._notices.append(notice)

    def take(self) -> tuple[list[News], list[str]]:
        """What came since the last call."""
        taken = self._news, self._notices
        self._news, self._notices = [], []
        return taken

    def does_not_fit(self, examples: int) -> None:
        """Notes that a pass of so many examples does not fit into memory: the next try halves it."""
        if self._limit is None:
            self.say(
                f"{examples} examples do not fit into memory at once: they are split, and gradients accumulated, from "
                f"the last checkpoint on (training.micro_batch_size={max(1, examples // 2)} would begin like that)"
            )
        self._limit = min(max(1, examples // 2), self._limit or examples)

    def limit(self) -> int | None:
        """Examples that a pass may have."""
        return self._limit

    def stop(self, error: TrainingError) -> None:
        """Notes why training must end, which no other try would change."""
        self._stop = error

    def stopped(self) -> TrainingError | None:
        """Why training had to end."""
        return self._stop


def hang_up() -> Any:
    """A new board on this node, so that no other node's loss takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Board).options(num_cpus=0, scheduling_strategy=here).remote()
