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


Think = Callable[[Node | None, int], Awaitable[list[Completion | Flaw]]]
"""Writes so many thoughts below a node; below None, base reasons."""


async def grow(breadths: Sequence[int], think: Think) -> list[Node] | Flaw:
    """A tree, its nodes in depth-first order, or why there is none.

    A node without a thought has no subtree; the tree is kept while at least one leaf of full depth is left.

    Args:
        breadths: children of the base reason, children of each of those, and so on; each at least 1.
        think: called once for all siblings, and for all subtrees at the same time.
    """
    nodes: list[Node] = []
    flaws: list[Flaw] = []

    async def subtree(parent: Node | None, n: int) -> None:
        children = []
        for place, thought in enumerate(await think(parent, n), 1):
            if isinstance(thought, Flaw):
                flaws.append(thought)
                continue
            node_id = "" if parent is None else f"{parent.node_id}.{place}".lstrip(".")
            children.append(Node(node_id=node_id, depth=0 if parent is None else parent.depth + 1, thought=thought))
        nodes.extend(children)
        await asyncio.gather(
            *(subtree(child, breadths[child.depth]) for child in children if child.depth < len(breadths))
        )

    await subtree(None, 1)
    if not any(node.depth == len(breadths) for node in nodes):
        return _most_common(flaws)
    return sorted(nodes, key=lambda node: [int(step) for step in node.node_id.split(".") if step])


def _most_common(flaws: Sequence[Flaw]) -> Flaw:
    ((reason, _),) = Counter(flaw.reason for flaw in flaws).most_common(1)
    return next(flaw for flaw in flaws if flaw.reason == reason)
