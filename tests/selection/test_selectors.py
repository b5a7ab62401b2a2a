"""Selectors choose among leaves, by the score that they are named after: against brute force."""

from __future__ import annotations

from collections import Counter
from typing import cast
from zlib import crc32

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pulse_ray.selection import selectors
from pulse_ray.selection.selectors import Thought
from pulse_ray.thought_space.encoders import Encoders

WORDS = ("tea", "soap", "balm", "wool")


class Stub:
    """Encodes texts as unit vectors that follow from their letters; keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def encode(self, tower: str, texts: list[str]) -> np.ndarray:
        self.asked.append((tower, list(texts)))
        return np.array([self.vector(text) for text in texts], dtype=np.float32).reshape(-1, 3)

    @staticmethod
    def vector(text: str) -> np.ndarray:
        found = np.random.default_rng(crc32(text.encode())).normal(size=3)
        return found / np.linalg.norm(found)


def trees() -> st.SearchStrategy[list[list[Thought]]]:
    """Trees with at least one leaf at any depth, whose texts and scores often repeat."""
    nodes = st.lists(
        st.tuples(st.booleans(), st.sampled_from(WORDS), st.sampled_from([-3.0, -2.0, -1.0])), min_size=1, max_size=8
    )
    return st.lists(nodes.map(_tree), max_size=4)


def _tree(nodes: list[tuple[bool, str, float]]) -> list[Thought]:
    some = any(leaf for leaf, _, _ in nodes)
    return [
        Thought(
            node_id=str(place or ""),
            depth=int(place > 0),
            leaf=leaf or (place == 0 and not some),
            text=text,
            mean_logprob=logprob,
        )
        for place, (leaf, text, logprob) in enumerate(nodes)
    ]


@given(grown=trees())
def test_each_selector_chooses_the_first_leaf_with_the_highest_score(grown: list[list[Thought]]) -> None:
    behaviours = [f"behaviour {place}" for place in range(len(grown))]
    stub = Stub()
    chosen = selectors.nearest(grown, behaviours, cast(Encoders, stub))
    assert len(chosen) == len(grown)
    for tree, behaviour, choice in zip(grown, behaviours, chosen, strict=True):
        leaves = [node for node in tree if node.leaf]
        cosines = [float(stub.vector(node.text) @ stub.vector(behaviour)) for node in leaves]
        # Both sides round, so that only equal texts tie.
        assert choice.thought.text == leaves[int(np.argmax(cosines))].text
        assert choice.thought == next(node for node in leaves if node.text == choice.thought.text)
        np.testing.assert_allclose(choice.agreement, max(cosines), rtol=1e-5)
        likeliest = selectors.log_likelihood(tree, 0)
        assert likeliest.agreement == max(node.mean_logprob for node in leaves)
        assert likeliest.thought == next(node for node in leaves if node.mean_logprob == likeliest.agreement)
        assert selectors.base(tree, 0).thought == tree[0]
        assert all(selectors.random(tree, seed).thought in leaves for seed in range(9))


@given(grown=trees())
def test_one_pass_reads_every_text_once(grown: list[list[Thought]]) -> None:
    stub = Stub()
    selectors.nearest(grown, ["b"] * len(grown), cast(Encoders, stub))
    assert [tower for tower, _ in stub.asked] == ["rationale", "history"]
    assert set(stub.asked[0][1]) == {node.text for tree in grown for node in tree if node.leaf}
    assert len(set(stub.asked[0][1])) == len(stub.asked[0][1])


def test_a_leaf_is_what_the_table_says_whatever_its_depth() -> None:
    places = [("", 0, False), ("1", 1, True), ("2", 1, False), ("2.1", 2, True), ("3", 1, False)]
    tree = [Thought(node_id=n, depth=d, leaf=leaf, text=n, mean_logprob=0.0) for n, d, leaf in places]
    assert [leaf.node_id for leaf in selectors.leaves(tree)] == ["1", "2.1"]


def test_chance_takes_all_leaves_alike_and_the_same_one_for_the_same_example() -> None:
    tree = _tree([(True, "tea", -1.0)] * 4)
    seeds = [selectors.draw_seed(0, f"shop/u{user}/4") for user in range(2000)]
    counts = Counter(selectors.random(tree, seed).thought.node_id for seed in seeds)
    assert all(420 < count < 580 for count in counts.values())
    assert selectors.draw_seed(0, "shop/u1/4") == seeds[1] != selectors.draw_seed(1, "shop/u1/4")
