"""Selectors: which leaf of a tree becomes the reason. All of them choose from the same stored tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pulse_ray.thought_space.encoders import Encoders


@dataclass(frozen=True, kw_only=True, slots=True)
class Thought:
    """A node of a tree: `node_id` is "" for the base reason, "1.2" for the second child of its first child."""

    node_id: str
    depth: int
    text: str
    mean_logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The chosen node, and the score that chose it; None where nothing was compared."""

    thought: Thought
    agreement: float | None


def leaves(tree: Sequence[Thought]) -> list[Thought]:
    """The deepest nodes of a tree, in order. A tree that is a base reason alone has that as its leaf."""
    deepest = max(thought.depth for thought in tree)
    return sorted((thought for thought in tree if thought.depth == deepest), key=lambda thought: thought.node_id)


def base(trees: Sequence[Sequence[Thought]]) -> list[Choice]:
    """The base reason of each tree."""
    return [Choice(thought=next(t for t in tree if t.depth == 0), agreement=None) for tree in trees]


def log_likelihood(trees: Sequence[Sequence[Thought]]) -> list[Choice]:
    """The leaf that the language model itself finds likeliest: highest mean log-probability of its tokens."""
    return [
        Choice(thought=best, agreement=best.mean_logprob)
        for best in (max(leaves(tree), key=lambda thought: thought.mean_logprob) for tree in trees)
    ]


def thought_space(trees: Sequence[Sequence[Thought]], behaviours: Sequence[str], encoders: Encoders) -> list[Choice]:
    """The leaf that agrees best with the behaviour: highest cosine of E1(leaf) and E2(behaviour) (Eq. 2).

    Args:
        behaviours: [n] one text per tree; histories alone, except under the oracle protocol.
    """
    candidates = [leaves(tree) for tree in trees]
    vectors = encoders.encode("rationale", [leaf.text for tree in candidates for leaf in tree])
    anchors = encoders.encode("history", behaviours)
    ends = np.cumsum([len(tree) for tree in candidates])
    choices = []
    for tree, anchor, end in zip(candidates, anchors, ends, strict=True):
        scores = vectors[end - len(tree) : end] @ anchor
        best = int(scores.argmax())
        choices.append(Choice(thought=tree[best], agreement=float(scores[best])))
    return choices
