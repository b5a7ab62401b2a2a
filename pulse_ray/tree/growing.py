"""A whole tree for one history, prompts, draws and gates together: for the `tree` stage and the online reasoner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from pulse_ray.config import SamplingConfig, TreeConfig
from pulse_ray.generation import gates
from pulse_ray.generation.engine import Completion, Message
from pulse_ray.generation.gates import Flaw
from pulse_ray.generation.names import ItemNames
from pulse_ray.schema import History, Item
from pulse_ray.seeding import derive
from pulse_ray.tree import prompts
from pulse_ray.tree.search import Agree, Beam, Node, grow


class TreeWriter(gates.Writer, Protocol):
    """The part of `generation.engine.Engine` that a tree needs."""

    @property
    def special_tokens(self) -> tuple[str, ...]: ...

    def count(self, text: str) -> int: ...

    def turn(self) -> int: ...

    def render(self, messages: Sequence[Message]) -> str: ...


async def grow_tree(
    writer: TreeWriter,
    config: TreeConfig,
    history: History,
    items: Mapping[str, Item],
    near: Sequence[str],
    *,
    names: ItemNames | None = None,
    seed: int,
    agree: Agree | None = None,
) -> list[Node] | Flaw:
    """The tree of a history, its nodes in depth-first order, or why there is none.

    Args:
        items: the items of the history's domain.
        near: items of similar users, nearest first; those that the history holds are left out.
        names: what the domain's items are called; None where no gate asks for it.
        seed: of the run. The draws derive from it, the example's id and the node.
        agree: how well texts agree with the history; a beam needs it.
    """
    version, near = config.template, prompts.unseen(history, near, config.neighbour_items)
    context = prompts.context(
        history,
        items,
        near,
        version=version,
        count=writer.count,
        max_tokens=config.text.history_tokens,
        review_words=config.text.review_words,
        special_tokens=writer.special_tokens,
    )
    known = gates.Request(
        prompt=writer.render(prompts.messages(version, context, prompts.base_task(version))),
        task=prompts.base_task(version),
        opening=prompts.opening(version),
        reviews=gates.reviews(history, config.text.review_words),
        titles=gates.titles(history, items, near),
        names=names,
        priority=writer.turn(),
    )

    def asked(thought: str) -> gates.Request:
        task = prompts.refine_task(version, thought, writer.special_tokens)
        prompt = writer.render(prompts.messages(version, context, task))
        return replace(known, prompt=prompt, task=prompts.refine_task(version, ""), thought=thought)

    async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
        request, place = (known, "base") if parent is None else (asked(parent.thought.text), parent.node_id)

        def draw_seed(attempt: int) -> int:
            return derive(seed, "tree", history.example_id, place, attempt)

        sampling = _sampling(config, 0 if parent is None else parent.depth + 1)
        return await gates.draw(writer, request, sampling, draw_seed, n)

    return await grow(config.breadths, think, _beam(config, agree))


def _sampling(config: TreeConfig, depth: int) -> SamplingConfig:
    """How thoughts of a depth are drawn."""
    if config.temperatures is None:
        return config.sampling
    return config.sampling.model_copy(update={"temperature": config.temperatures[depth]})


def _beam(config: TreeConfig, agree: Agree | None) -> Beam | None:
    if config.beam_width is None:
        return None
    assert agree is not None, "a beam compares by agreement"
    return Beam(width=config.beam_width, agree=agree)
