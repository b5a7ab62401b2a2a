"""The `select` stage: one row per example and selector, the base reason among them."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from pulse_ray import catalogue
from pulse_ray.runtime import ShardOutput, run_shards
from pulse_ray.schema import History, examples, histories, table
from pulse_ray.selection import selectors
from pulse_ray.selection.selectors import Choice, Thought
from pulse_ray.text import behaviour_text
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.workspace import Part, StageRun


def run(stage: StageRun) -> None:
    """Reads items, examples, encoders and thoughts; writes reasons."""
    parts = stage.input("thoughts").parts()
    run_shards(stage, parts, SelectWorker, stage, pool=stage.config.select.pool, title="select: reasons")


class SelectWorker:
    """Chooses reasons for the trees of a part, with one pass of encoding."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.config = stage.config.select
        self.items = catalogue.load(stage.input("items"))
        with tempfile.TemporaryDirectory() as local:
            self.encoders = Encoders.load(stage.input("encoders").download(Path(local)))

    def __call__(self, part: Part) -> ShardOutput:
        trees: dict[str, list[Thought]] = defaultdict(list)
        columns = ["example_id", "node_id", "depth", "text", "mean_logprob"]
        for row in self.stage.input("thoughts").read(part, columns).to_pylist():
            trees[row.pop("example_id")].append(Thought(**row))
        behaviours = self._behaviours(part, set(trees))
        order = sorted(trees)
        grown = [trees[example_id] for example_id in order]
        chosen: dict[str, list[Choice]] = {"base": selectors.base(grown)}
        if "log_likelihood" in self.config.selectors:
            chosen["log_likelihood"] = selectors.log_likelihood(grown)
        if "thought_space" in self.config.selectors:
            texts = [behaviours[example_id] for example_id in order]
            chosen["thought_space"] = selectors.thought_space(grown, texts, self.encoders)
        rows = [_row(order[place], name, choice) for name in chosen for place, choice in enumerate(chosen[name])]
        return ShardOutput(tables={"reasons": table("reasons", rows)}, examples=len(order))

    def _behaviours(self, part: Part, wanted: set[str]) -> dict[str, str]:
        """Behaviour texts: histories alone, or with the target under the oracle protocol, which sees the label."""
        data = self.stage.input("examples").read(part)
        if self.config.protocol == "oracle":
            seen: list[tuple[History, str | None]] = [(row.history, row.target_item) for row in examples(data)]
        else:
            seen = [(history, None) for history in histories(data)]
        settings = self.stage.config.thought_space.text
        return {
            history.example_id: behaviour_text(
                history,
                self.items[history.domain],
                target,
                count=self.encoders.counter("history"),
                max_tokens=settings.history_tokens,
                review_words=settings.review_words,
            )
            for history, target in seen
            if history.example_id in wanted
        }


def _row(example_id: str, selector: str, choice: Choice) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "selector": selector,
        "node_id": choice.thought.node_id,
        "text": choice.thought.text,
        "agreement": choice.agreement,
    }
