"""How a tree of thoughts grows: in full, or along a beam. Plain Python over two callables."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from pulse_ray.generation.engine import Completion
from pulse_ray.generation.gates import Flaw
from pulse_ray.generation.together import together


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """A thought and its place: `node_id` is "" for the base reason, "1" for its first child, "1.2" below that.

    `leaf` is whether it may become the reason: it has full depth, or was refined and no refinement was kept.
    `agreement` is what a beam compared it by, None where nothing was compared.
    """

    node_id: str
    depth: int
    thought: Completion
    leaf: bool = False
    agreement: float | None = None


Think = Callable[[Node | None, int], Awaitable[list[Completion | Flaw]]]
"""Writes so many thoughts below a node; below None, base reasons."""

Agree = Callable[[Sequence[str]], Awaitable[list[float]]]
"""How well each text agrees with the history that the tree grows for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beam:
    """Of the nodes of a level, the `width` that agree best are refined; of equals, those that come first."""

    width: int
    agree: Agree


async def grow(breadths: Sequence[int], think: Think, beam: Beam | None = None) -> list[Node] | Flaw:
    """A tree, its nodes in depth-first order, or what was wrong with its base reason.

    Every thought that was kept is in it, also those that a beam left behind. A node of which no refinement was kept is
    a leaf, be it the base reason itself.

    Args:
        breadths: children of the base reason, children of each of those, and so on; each at least 1.
        think: called once for all siblings; without a beam, for all subtrees at the same time.
        beam: called with the texts of a level, in order, where the level has more nodes than its width.
    """
    [base] = await think(None, 1)
    if isinstance(base, Flaw):
        return base
    root = Node(node_id="", depth=0, thought=base)
    growth = _Growth(breadths, think)
    growth.keep([root])
    await (growth.everywhere(root) if beam is None else growth.along(root, beam))
    return sorted(growth.nodes.values(), key=lambda node: [int(step) for step in node.node_id.split(".") if step])


class _Growth:
    """The nodes of a tree by id, as far as it has grown."""

    def __init__(self, breadths: Sequence[int], think: Think) -> None:
        self.breadths, self.think = breadths, think
        self.nodes: dict[str, Node] = {}

    def keep(self, nodes: Sequence[Node]) -> None:
        self.nodes |= {node.node_id: node for node in nodes}

    async def everywhere(self, node: Node) -> None:
        """Grows all that hangs below a node; no subtree waits for another."""
        await together(map(self.everywhere, await self.refine(node)))

    async def along(self, root: Node, beam: Beam) -> None:
        """Grows level by level, each below the best nodes of the one before."""
        level = [root]
        while level:
            if level[0].depth < len(self.breadths):
                level = await self.best(level, beam)
            children = await together(map(self.refine, level))
            level = [child for siblings in children for child in siblings]

    async def best(self, level: list[Node], beam: Beam) -> list[Node]:
        """The nodes of a level that the beam keeps, in the level's order."""
        if len(level) <= beam.width:
            return level
        scores = await beam.agree([node.thought.text for node in level])
        scored = [replace(node, agreement=score) for node, score in zip(level, scores, strict=True)]
        self.keep(scored)
        ranked = sorted(range(len(level)), key=lambda place: -scores[place])
        return [scored[place] for place in sorted(ranked[: beam.width])]

    async def refine(self, node: Node) -> list[Node]:
        """A node's children; one that has none when it was tried, or is not tried for its depth, is a leaf."""
        tried = node.depth < len(self.breadths)
        written = await self.think(node, self.breadths[node.depth]) if tried else []
        children = [
            Node(node_id=f"{node.node_id}.{place}".lstrip("."), depth=node.depth + 1, thought=thought)
            for place, thought in enumerate(written, 1)
            if not isinstance(thought, Flaw)
        ]
        self.keep([replace(node, leaf=not children), *children])
        return children
