"""How a tree of thoughts grows: every node begins as soon as its parent is there. Plain Python over one callable."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from pulse_ray.generation.engine import Completion
from pulse_ray.generation.gates import Flaw


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A thought and its place: `node_id` is "" for the base reason, "1" for its first child, "1.2" below that."""

    node_id: str
    depth: int
    thought: Completion


Think = Callable[[str, str | None], Awaitable[Completion | Flaw]]
"""Writes the thought of a node, given the node's id and the parent's text (None for the base reason)."""


async def grow(breadths: Sequence[int], think: Think) -> list[Node] | Flaw:
    """A tree, its nodes in depth-first order, or why there is none.

    A node without a thought has no subtree; the tree is kept while at least one leaf of full depth is left.

    Args:
        breadths: children of the base reason, children of each of those, and so on; each at least 1.
        think: called for all siblings, and for all subtrees, at the same time.
    """
    nodes: list[Node] = []
    flaws: list[Flaw] = []

    async def subtree(path: tuple[int, ...], parent: str | None) -> None:
        node_id = ".".join(map(str, path))
        thought = await think(node_id, parent)
        if isinstance(thought, Flaw):
            flaws.append(thought)
            return
        nodes.append(Node(node_id=node_id, depth=len(path), thought=thought))
        if len(path) < len(breadths):
            children = range(1, breadths[len(path)] + 1)
            await asyncio.gather(*(subtree((*path, child), thought.text) for child in children))

    await subtree((), None)
    if not any(node.depth == len(breadths) for node in nodes):
        return _most_common(flaws)
    return sorted(nodes, key=lambda node: [int(step) for step in node.node_id.split(".") if step])


def _most_common(flaws: Sequence[Flaw]) -> Flaw:
    ((reason, _),) = Counter(flaw.reason for flaw in flaws).most_common(1)
    return next(flaw for flaw in flaws if flaw.reason == reason)
