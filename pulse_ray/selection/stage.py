"""The `select` stage: one row per example and selector, the base reason among them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from pulse_ray import catalogue, models
from pulse_ray.config import BY_BEHAVIOUR
from pulse_ray.runtime import ShardOutput, run_shards
from pulse_ray.schema import History, examples, histories, table
from pulse_ray.selection import selectors
from pulse_ray.selection.selectors import WITHOUT_ENCODERS, Choice, Thought
from pulse_ray.thought_space.agreement import behaviour
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.workspace import Part, StageRun


def run(stage: StageRun) -> None:
    """Reads items, examples, thoughts and, for the Thought Space, encoders; writes reasons."""
    for selector in stage.config.select.selectors:
        if model := stage.config.model_of(selector):
            models.resolve(model)  # Here first, so that a wrong name is one clear error before any actor starts.
    parts = stage.input("thoughts").parts()
    run_shards(stage, parts, SelectWorker, stage, pool=stage.config.select.pool, title="select: reasons")


class SelectWorker:
    """Chooses reasons for the trees of a part, with one pass of encoding for each encoder."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.config = stage.config.select
        self.items = catalogue.load(stage.input("items"))
        self.encoders: dict[str, Encoders] = {
            name: selectors.load_encoders(name, stage.config, lambda: stage.input("encoders"))
            for name in self.config.selectors
            if name in BY_BEHAVIOUR
        }

    def __call__(self, part: Part) -> ShardOutput:
        trees: dict[str, list[Thought]] = defaultdict(list)
        columns = ["example_id", "node_id", "depth", "leaf", "text", "mean_logprob"]
        for row in self.stage.input("thoughts").read(part, columns).to_pylist():
            trees[row.pop("example_id")].append(Thought(**row))
        seen = self._seen(part) if self.encoders else {}
        order = sorted(trees)
        rows = [
            _row(example_id, name, choice)
            for name in ("base", *self.config.selectors)
            for example_id, choice in zip(order, self._choices(name, order, trees, seen), strict=True)
        ]
        return ShardOutput(tables={"reasons": table("reasons", rows)}, examples=len(order))

    def _choices(
        self, name: str, order: list[str], trees: dict[str, list[Thought]], seen: dict[str, tuple[History, str | None]]
    ) -> list[Choice]:
        """A selector's choice for each example, in order."""
        if name in WITHOUT_ENCODERS:
            seed = self.stage.config.seed
            return [WITHOUT_ENCODERS[name](trees[one], selectors.draw_seed(seed, one)) for one in order]
        encoders = self.encoders[name]
        behaviours = [self._behaviour(encoders, *seen[example_id]) for example_id in order]
        return selectors.nearest([trees[example_id] for example_id in order], behaviours, encoders)

    def _seen(self, part: Part) -> dict[str, tuple[History, str | None]]:
        """What selectors may see of each example: its history, and under the oracle protocol also the label."""
        data = self.stage.input("examples").read(part)
        if self.config.protocol == "oracle":
            return {row.history.example_id: (row.history, row.target_item) for row in examples(data)}
        return {history.example_id: (history, None) for history in histories(data)}

    def _behaviour(self, encoders: Encoders, history: History, target_item: str | None) -> str:
        return behaviour(encoders, self.items, self.stage.config.thought_space.text, history, target_item)


def _row(example_id: str, selector: str, choice: Choice) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "selector": selector,
        "node_id": choice.thought.node_id,
        "text": choice.thought.text,
        "agreement": choice.agreement,
    }
