"""Selectors: which leaf of a tree becomes the reason. All of them choose from the same stored tree."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pulse_ray.config import Config, Variant
from pulse_ray.seeding import derive
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.workspace import Artefact


@dataclass(frozen=True, kw_only=True, slots=True)
class Thought:
    """A node of a tree: `node_id` is "" for the base reason, "1.2" for the second child of its first child."""

    node_id: str
    depth: int
    leaf: bool
    text: str
    mean_logprob: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """The chosen node, and the score that chose it; None where nothing was compared."""

    thought: Thought
    agreement: float | None


Tree = Sequence[Thought]
"""The nodes of a tree, in the order in which they are stored."""


def leaves(tree: Tree) -> list[Thought]:
    """The nodes that may become the reason, in order."""
    return [thought for thought in tree if thought.leaf]


def best(tree: Tree, scores: Sequence[float]) -> Choice:
    """The leaf with the highest score; of equals, the first.

    Args:
        scores: [leaves of the tree].
    """
    place = int(np.argmax(scores))
    return Choice(thought=leaves(tree)[place], agreement=float(scores[place]))


def base(tree: Tree, seed: int) -> Choice:
    """The base reason."""
    return Choice(thought=next(thought for thought in tree if thought.depth == 0), agreement=None)


def log_likelihood(tree: Tree, seed: int) -> Choice:
    """The leaf that the language model itself finds likeliest: highest mean log-probability of its tokens."""
    return best(tree, [leaf.mean_logprob for leaf in leaves(tree)])


def random(tree: Tree, seed: int) -> Choice:
    """Any leaf."""
    among = leaves(tree)
    return Choice(thought=among[seed % len(among)], agreement=None)


WITHOUT_ENCODERS: Mapping[str, Callable[[Tree, int], Choice]] = {
    "base": base,
    "log_likelihood": log_likelihood,
    "random": random,
}
"""What chooses without reading the texts, by name. `draw_seed` gives the seed."""


def draw_seed(seed: int, example_id: str) -> int:
    """The seed of an example's choice in a run."""
    return derive(seed, "select", example_id)


def nearest(trees: Sequence[Tree], behaviours: Sequence[str], encoders: Encoders) -> list[Choice]:
    """Of each tree, the leaf that agrees best with its behaviour: highest cosine of E1(leaf) and E2(behaviour) (Eq. 2).

    Equal texts are encoded once.

    Args:
        behaviours: [n] one text per tree; histories alone, except under the oracle protocol.
    """
    texts = list(dict.fromkeys(leaf.text for tree in trees for leaf in leaves(tree)))
    place = {text: row for row, text in enumerate(texts)}
    vectors_ND = encoders.encode("rationale", texts)
    anchors_BD = encoders.encode("history", behaviours)
    # One product per leaf: a matrix product may round equal rows differently, and a later equal text would be chosen.
    return [
        best(tree, [float(vectors_ND[place[leaf.text]] @ anchor_D) for leaf in leaves(tree)])
        for tree, anchor_D in zip(trees, anchors_BD, strict=True)
    ]


def load_encoders(selector: Variant, config: Config, trained: Callable[[], Artefact]) -> Encoders:
    """What a selector of `config.BY_BEHAVIOUR` compares with.

    Args:
        trained: gives the artefact of the trained encoders; called for `thought_space` alone.

    Raises:
        ArtifactError: the selector's model does not resolve.
    """
    model = config.model_of(selector)
    if model is None:
        with tempfile.TemporaryDirectory() as local:
            return Encoders.load(trained().download(Path(local)))
    limit = config.thought_space.max_tokens if selector == "encoder_base" else None
    return Encoders.create(model, limit, shared=True).eval()
