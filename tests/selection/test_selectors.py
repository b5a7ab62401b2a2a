"""Selectors choose among leaves, by the score that they are named after."""

from __future__ import annotations

from typing import cast

import numpy as np

from pulse_ray.selection import selectors
from pulse_ray.selection.selectors import Thought
from pulse_ray.thought_space.encoders import Encoders


def thought(node: str, text: str, logprob: float = -1.0) -> Thought:
    return Thought(node_id=node, depth=len(node.split(".")) if node else 0, text=text, mean_logprob=logprob)


TREE = [
    thought("", "east", -0.1),
    thought("1", "north", -0.2),
    thought("1.1", "south", -3.0),
    thought("1.2", "west", -2.0),
]


class Compass:
    """Encodes the names of directions as unit vectors: enough of `Encoders` for a selector."""

    def encode(self, tower: str, texts: list[str]) -> np.ndarray:
        where = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0), "south-south-west": (-0.3, -0.95)}
        return np.array([where[text] for text in texts], dtype=np.float32)


def test_leaves_are_the_deepest_nodes_and_a_bare_base_is_its_own_leaf() -> None:
    assert [leaf.node_id for leaf in selectors.leaves(TREE)] == ["1.1", "1.2"]
    assert [leaf.node_id for leaf in selectors.leaves(TREE[:1])] == [""]


def test_each_selector_chooses_by_its_score() -> None:
    trees = [TREE, TREE[:2]]
    assert [choice.thought.node_id for choice in selectors.base(trees)] == ["", ""]
    assert [choice.thought.node_id for choice in selectors.log_likelihood(trees)] == ["1.2", "1"]
    chosen = selectors.thought_space(trees, ["south-south-west", "north"], cast(Encoders, Compass()))
    assert [choice.thought.node_id for choice in chosen] == ["1.1", "1"]
    np.testing.assert_allclose([choice.agreement for choice in chosen], [0.95, 1.0], rtol=1e-6)
