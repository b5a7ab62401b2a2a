"""A whole tree for one history, prompts, draws and gates together: for the `tree` stage and the online reasoner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from pulse_ray.config import TreeConfig
from pulse_ray.generation import gates
from pulse_ray.generation.engine import Completion, Message
from pulse_ray.generation.gates import Flaw
from pulse_ray.schema import History, Item
from pulse_ray.seeding import derive
from pulse_ray.tree import prompts
from pulse_ray.tree.search import Node, grow


class TreeWriter(gates.Writer, Protocol):
    """The part of `generation.engine.Engine` that a tree needs."""

    @property
    def special_tokens(self) -> tuple[str, ...]: ...

    def count(self, text: str) -> int: ...

    def render(self, messages: Sequence[Message]) -> str: ...


async def grow_tree(
    writer: TreeWriter,
    config: TreeConfig,
    history: History,
    items: Mapping[str, Item],
    near: Sequence[str],
    *,
    seed: int,
) -> list[Node] | Flaw:
    """The tree of a history, its nodes in depth-first order, or why there is none.

    Args:
        items: the items of the history's domain.
        near: items of similar users, nearest first; those that the history holds are left out.
        seed: of the run. The draws derive from it, the example's id and the node.
    """
    context = prompts.context(
        history,
        items,
        prompts.unseen(history, near, config.neighbour_items),
        version=config.template,
        count=writer.count,
        max_tokens=config.text.history_tokens,
        review_words=config.text.review_words,
        special_tokens=writer.special_tokens,
    )

    async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
        if parent is None:
            task, place = prompts.base_task(config.template), "base"
        else:
            task = prompts.refine_task(config.template, parent.thought.text, writer.special_tokens)
            place = parent.node_id
        prompt = writer.render(prompts.messages(config.template, context, task))

        def draw_seed(attempt: int) -> int:
            return derive(seed, "tree", history.example_id, place, attempt)

        return await gates.draw(
            writer,
            prompt,
            prompts.base_task(config.template),
            config.sampling,
            draw_seed,
            prompts.opening(config.template),
            n,
        )

    return await grow(config.breadths, think)
