"""Trees grow to any depth, all branches at once, and survive the loss of some."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pulse_ray.generation.engine import Completion
from pulse_ray.generation.gates import Flaw
from pulse_ray.tree.search import Node, grow


def _thought(text: str) -> Completion:
    return Completion(text=text, mean_logprob=-1.0, num_tokens=1, finish_reason="stop", seed=0)


def child_ids(parent: Node | None, n: int) -> list[str]:
    return [""] if parent is None else [f"{parent.node_id}.{place}".lstrip(".") for place in range(1, n + 1)]


def _text(parent: Node | None) -> str | None:
    return parent and parent.thought.text


def _grow(breadths: Sequence[int], failing: frozenset[str] = frozenset()) -> list[Node] | Flaw:
    async def think(parent: Node | None, n: int) -> list[Completion | Flaw]:
        drawn: list[Completion | Flaw] = []
        for node_id in child_ids(parent, n):
            flawed = node_id in failing
            drawn.append(Flaw(reason="empty", detail=node_id) if flawed else _thought(f"{_text(parent)}>{node_id}"))
        return drawn

    return asyncio.run(grow(breadths, think))


@settings(max_examples=30)
@given(st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_every_level_has_its_breadth_and_every_child_its_parent(breadths: list[int]) -> None:
    nodes = _grow(breadths)
    assert isinstance(nodes, list)
    for depth in range(len(breadths) + 1):
        assert sum(node.depth == depth for node in nodes) == prod(breadths[:depth])
    texts = {node.node_id: node.thought.text for node in nodes}
    for node_id, text in texts.items():
        parent = texts[node_id.rpartition(".")[0]] if node_id else None
        assert text == f"{parent}>{node_id}"


def test_nodes_come_parents_first_in_the_order_of_numbers() -> None:
    nodes = _grow([11, 1])
    assert isinstance(nodes, list)
    assert [node.node_id for node in nodes][:5] == ["", "1", "1.1", "2", "2.1"]
    assert nodes[-1].node_id == "11.1"


@pytest.mark.parametrize(
    ("failing", "left"),
    [
        ({"1"}, ["", "2", "2.1", "2.2"]),
        ({"1.1", "2.2"}, ["", "1", "1.2", "2", "2.1"]),
        ({""}, None),
        ({"1", "2"}, None),
    ],
)
def test_a_tree_is_kept_while_a_leaf_is_left(failing: set[str], left: list[str] | None) -> None:
    tree = _grow([2, 2], frozenset(failing))
    if left is None:
        assert isinstance(tree, Flaw)
        assert tree.reason == "empty"
    else:
        assert isinstance(tree, list)
        assert [node.node_id for node in tree] == left


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
