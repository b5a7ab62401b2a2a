"""The `tree` stage: a tree of thoughts for every history of every split, each tree inside one engine."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pulse_ray import catalogue, templates
from pulse_ray.catalogue import Catalogue
from pulse_ray.generation import names
from pulse_ray.generation.engine import Engine
from pulse_ray.generation.gates import Flaw
from pulse_ray.generation.pool import generate
from pulse_ray.generation.together import together
from pulse_ray.runtime import ShardOutput
from pulse_ray.schema import History, Reject, histories, table
from pulse_ray.thought_space.agreement import Agreement
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.tree import prompts
from pulse_ray.tree.growing import grow_tree
from pulse_ray.tree.search import Node
from pulse_ray.workspace import Part, StageRun


def run(stage: StageRun) -> dict[str, dict[str, float]]:
    """Reads items, histories and neighbours, for a beam also encoders; writes thoughts.

    Returns:
        By output, what the engines did for the parts made in this call (`generation.pool.generate`).
    """
    figures = generate(
        stage,
        _parts(stage),
        TreeWorker,
        stage,
        title="tree: thoughts",
        max_reject_fraction=stage.config.tree.max_reject_fraction,
    )
    return {"thoughts": figures}


def _parts(stage: StageRun) -> list[Part]:
    """All parts, but of the validation split only as many as hold the examples that are asked for."""
    found = stage.input("examples")
    left = stage.config.tree.validation_examples
    validation: list[Part] = []
    for part in found.parts("validation"):
        if left is None or left > 0:
            validation.append(part)
        left = left and max(0, left - found.num_rows(part))
    return [*found.parts("train"), *validation, *found.parts("test")]


class TreeWorker:
    """Grows the trees of a part, all at the same time."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.config = stage.config.tree
        self.engine = Engine(stage.config.engine)
        self.items = catalogue.load(stage.input("items"))
        self.agreement = _agreement(stage, self.items) if self.config.beam_width is not None else None
        self.names = names.of_catalogue(self.items, self.config.sampling)

    async def __call__(self, part: Part) -> ShardOutput:
        columns = ["example_id", "domain", "user_id", "history"]
        given = list(histories(self.stage.input("examples").read(part, columns)))
        near = self.stage.input("neighbours").read(part, ["example_id", "items"]).to_pylist()
        items_near = {row["example_id"]: row["items"] for row in near}
        trees = await together(self._tree(one, items_near.get(one.example_id, [])) for one in given)
        prompt_sha = templates.sha(prompts.STAGE, self.config.template)
        rows: list[dict[str, Any]] = []
        rejects: list[Reject] = []
        for history, tree in zip(given, trees, strict=True):
            if isinstance(tree, Flaw):
                rejects.append(Reject(key=history.example_id, reason=tree.reason, detail=tree.detail))
            else:
                rows.extend(_row(history.example_id, node, prompt_sha) for node in tree)
        return ShardOutput(
            tables={"thoughts": table("thoughts", rows)},
            examples=len(given),
            rejects=rejects,
            figures={"tokens": sum(row["num_tokens"] for row in rows)},
        )

    async def _tree(self, history: History, near: Sequence[str]) -> list[Node] | Flaw:
        items, seed = self.items[history.domain], self.stage.config.seed
        known = self.names.get(history.domain)
        agree = self.agreement.of(history) if self.agreement else None
        return await grow_tree(self.engine, self.config, history, items, near, names=known, seed=seed, agree=agree)


def _agreement(stage: StageRun, items: Catalogue) -> Agreement:
    """What a beam compares by, whatever select.protocol says: no tree sees a label."""
    with tempfile.TemporaryDirectory() as local:
        encoders = Encoders.load(stage.input("encoders").download(Path(local)))
    return Agreement(encoders, items, stage.config.thought_space.text)


def _row(example_id: str, node: Node, prompt_sha: str) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "node_id": node.node_id,
        "depth": node.depth,
        "leaf": node.leaf,
        "text": node.thought.text,
        "mean_logprob": node.thought.mean_logprob,
        "agreement": node.agreement,
        "num_tokens": node.thought.num_tokens,
        "seed": node.thought.seed,
        "finish_reason": node.thought.finish_reason,
        "prompt_sha": prompt_sha,
    }
