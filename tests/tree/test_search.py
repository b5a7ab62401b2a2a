"""Trees grow to any depth, in full or along a beam, survive the loss of branches, and do not depend on delays."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from math import prod
from zlib import crc32

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pulse_ray.errors import GenerationError
from pulse_ray.generation.engine import Completion
from pulse_ray.generation.gates import Flaw
from pulse_ray.tree.search import Beam, Node, grow

BREADTHS = st.lists(st.integers(1, 3), min_size=1, max_size=4)


def child_ids(parent: Node | None, n: int) -> list[str]:
    return [""] if parent is None else [f"{parent.node_id}.{place}".lstrip(".") for place in range(1, n + 1)]


def _thought(text: str) -> Completion:
    return Completion(text=text, mean_logprob=-1.0, num_tokens=1, finish_reason="stop", seed=0)


@dataclass(frozen=True)
class World:
    """What is written, what it is worth and how long it takes follows from a number; texts are the nodes' ids.

    Of `flaws` in 10 thoughts, none is kept; scores are few, so that many tie.
    """

    number: int
    flaws: int = 0
    patience: int = 0

    def flawed(self, node_id: str) -> bool:
        return bool(node_id) and self._draw("flaw", node_id) % 10 < self.flaws

    def score(self, text: str) -> float:
        return (self._draw("score", text) % 4) / 4

    def _draw(self, what: str, name: str) -> int:
        return crc32(f"{self.number} {what} {name}".encode())

    async def _wait(self, name: str) -> None:
        for _ in range(crc32(f"{self.patience} {name}".encode()) % 7 if self.patience else 0):
            await asyncio.sleep(0)

    async def think(self, parent: Node | None, n: int) -> list[Completion | Flaw]:
        await self._wait(parent.node_id if parent else "base")
        flaw = Flaw(reason="empty", detail="")
        return [flaw if self.flawed(one) else _thought(one) for one in child_ids(parent, n)]

    async def agree(self, texts: Sequence[str]) -> list[float]:
        await self._wait(str(texts))
        return [self.score(text) for text in texts]

    def grow(self, breadths: Sequence[int], beam_width: int | None) -> list[Node]:
        beam = None if beam_width is None else Beam(width=beam_width, agree=self.agree)
        nodes = asyncio.run(grow(breadths, self.think, beam))
        assert isinstance(nodes, list)
        return nodes


def reference(world: World, breadths: Sequence[int], beam_width: int | None) -> dict[str, tuple[bool, float | None]]:
    """The tree as a loop over levels: leaf and agreement of each node by its id."""
    tree: dict[str, tuple[bool, float | None]] = {}
    level = [""]
    for depth in range(len(breadths) + 1):
        tree |= dict.fromkeys(level, (depth == len(breadths), None))
        if depth == len(breadths):
            break
        if beam_width is not None and len(level) > beam_width:
            tree |= {node: (False, world.score(node)) for node in level}
            best = sorted((-world.score(node), place) for place, node in enumerate(level))[:beam_width]
            level = [level[place] for place in sorted(place for _, place in best)]
        below: list[str] = []
        for node in level:
            children = [f"{node}.{place}".lstrip(".") for place in range(1, breadths[depth] + 1)]
            kept = [child for child in children if not world.flawed(child)]
            tree[node] = (not kept, tree[node][1])
            below += kept
        level = below
    return tree


@given(number=st.integers(0, 10**6), breadths=BREADTHS, width=st.none() | st.integers(1, 4), flaws=st.integers(0, 6))
def test_a_tree_is_what_a_loop_over_levels_makes(
    number: int, breadths: list[int], width: int | None, flaws: int
) -> None:
    world = World(number, flaws)
    found = {node.node_id: (node.leaf, node.agreement) for node in world.grow(breadths, width)}
    assert found == reference(world, breadths, width)


@given(number=st.integers(0, 10**6), breadths=BREADTHS, width=st.integers(1, 4), flaws=st.integers(0, 6))
def test_a_beam_refines_the_best_of_each_level_and_keeps_the_others(
    number: int, breadths: list[int], width: int, flaws: int
) -> None:
    world = World(number, flaws)
    nodes = {node.node_id: node for node in world.grow(breadths, width)}
    assert all(node.thought.text == node_id for node_id, node in nodes.items())
    assert all(node_id.rpartition(".")[0] in nodes for node_id in nodes if node_id), "a node without its parent"
    parents = {node_id.rpartition(".")[0] for node_id in nodes if node_id}
    for depth in range(len(breadths)):
        level = [node for node in nodes.values() if node.depth == depth]
        refined = [node for node in level if node.node_id in parents or node.leaf]
        assert len(refined) == min(width, len(level))
        behind = [world.score(node.node_id) for node in level if node not in refined]
        assert all(world.score(node.node_id) >= max(behind, default=0) for node in refined)
        assert {node.agreement is not None for node in level} <= {len(level) > width}
    for node in nodes.values():
        assert not (node.leaf and node.node_id in parents)
        assert node.leaf or node.depth < len(breadths)
    assert any(node.leaf for node in nodes.values())


@given(
    number=st.integers(0, 10**6),
    breadths=BREADTHS,
    width=st.none() | st.integers(1, 4),
    flaws=st.integers(0, 4),
    patience=st.integers(1, 10**6),
)
def test_delays_do_not_change_a_tree(
    number: int, breadths: list[int], width: int | None, flaws: int, patience: int
) -> None:
    assert World(number, flaws, patience).grow(breadths, width) == World(number, flaws).grow(breadths, width)


def test_the_authors_search_writes_three_levels_of_which_two_nodes_each_are_refined() -> None:
    nodes = World(7).grow([3, 3, 3], 2)
    assert Counter(node.depth for node in nodes) == {0: 1, 1: 3, 2: 6, 3: 6}
    assert sum(node.leaf for node in nodes) == 6


def test_of_equals_the_earlier_is_refined() -> None:
    async def agree(texts: Sequence[str]) -> list[float]:
        return [0.5] * len(texts)

    nodes = asyncio.run(grow([11, 1], World(0).think, Beam(width=2, agree=agree)))
    assert isinstance(nodes, list)
    assert [node.node_id for node in nodes if node.depth == 2] == ["1.1", "2.1"]


@given(BREADTHS)
def test_without_a_beam_every_level_has_its_breadth(breadths: list[int]) -> None:
    nodes = World(0).grow(breadths, None)
    for depth in range(len(breadths) + 1):
        assert sum(node.depth == depth for node in nodes) == prod(breadths[:depth])


def test_nodes_come_parents_first_in_the_order_of_numbers() -> None:
    for width in (None, 99):
        ids = [node.node_id for node in World(0).grow([11, 1], width)]
        assert ids[:5] == ["", "1", "1.1", "2", "2.1"]
        assert ids[-1] == "11.1"


@pytest.mark.parametrize(("failing", "width"), product([{"1"}, {"1.1", "2.2"}, {"1.1", "1.2"}, {"1", "2"}], [None, 2]))
def test_a_node_that_keeps_no_refinement_is_a_leaf(failing: set[str], width: int | None) -> None:
    class Failing(World):
        def flawed(self, node_id: str) -> bool:
            return node_id in failing

    leaves = {node.node_id for node in Failing(0).grow([2, 2], width) if node.leaf}
    assert (
        leaves
        == {
            frozenset({"1"}): {"2.1", "2.2"},
            frozenset({"1.1", "2.2"}): {"1.2", "2.1"},
            frozenset({"1.1", "1.2"}): {"1", "2.1", "2.2"},
            frozenset({"1", "2"}): {""},
        }[frozenset(failing)]
    )


def test_a_tree_is_rejected_for_its_base_reason() -> None:
    flaw = Flaw(reason="repeats itself", detail="so so so")

    async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
        return [flaw]

    assert asyncio.run(grow([2, 2], think)) == flaw


def test_siblings_and_subtrees_are_thought_at_the_same_time() -> None:
    async def run() -> list[Node] | Flaw:
        leaves = asyncio.Barrier(3)  # Opens only when the leaves of all subtrees are asked for at once.

        async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
            if parent and parent.depth == 1:
                await leaves.wait()
            return [_thought(node_id) for node_id in child_ids(parent, n)]

        return await asyncio.wait_for(grow([3, 2], think), timeout=10)

    nodes = asyncio.run(run())
    assert isinstance(nodes, list)
    assert len(nodes) == 1 + 3 + 6


def test_without_a_beam_no_level_waits_for_its_slowest_node() -> None:
    async def run() -> list[Node] | Flaw:
        deeper = asyncio.Event()

        async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
            if parent and parent.node_id == "1.1":
                deeper.set()
            if parent and parent.node_id == "2":
                await deeper.wait()
            return [_thought(node_id) for node_id in child_ids(parent, n)]

        return await asyncio.wait_for(grow([2, 1, 1], think), timeout=10)

    assert isinstance(asyncio.run(run()), list)


def test_nothing_goes_on_once_a_thought_has_failed() -> None:
    asked: list[str] = []

    async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
        asked.append("base" if parent is None else parent.node_id)
        if parent and parent.node_id == "1":
            raise GenerationError("the engine died", remedy="Run again")
        if parent and parent.node_id == "2":
            await asyncio.sleep(0.05)
        return [_thought(f"{place}") for place in range(n)]

    async def run() -> None:
        with pytest.raises(GenerationError):
            await grow([2, 1, 1], think)
        await asyncio.sleep(0.2)

    asyncio.run(run())
    assert asked == ["base", "", "1", "2"], "what hangs below the slow sibling was asked for"
