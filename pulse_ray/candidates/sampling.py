"""Candidate sets: the target and K - 1 items that the user never touched.

A draw is seeded by the example's id, so neither the number of workers nor the order of parts changes it. The target's
place is random. Negatives exclude *all* of the user's items, those after the target included.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

HARD_POOL = 10
"""Hard negatives are drawn from the model's best `HARD_POOL` × (K - 1) untouched items."""


def draw_negatives(
    rng: np.random.Generator,
    count: int,
    num_items: int,
    touched: Collection[int],
    *,
    weights: np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> np.ndarray | None:
    """`count` distinct item indices outside `touched`, or None where there are not so many.

    Args:
        rng: seeded for this example alone.
        num_items: items of the domain; indices are below it.
        weights: [num_items] non-negative; draws are proportional to them. Unset draws uniformly.
        scores: [num_items] a model's logits; draws come from the best of the untouched items.
    """
    free = np.setdiff1d(np.arange(num_items), np.fromiter(touched, dtype=np.int64, count=len(touched)))
    if scores is not None:
        pool = min(HARD_POOL * count, len(free))
        free = free[np.argsort(-scores[free], kind="stable")[:pool]]
    if len(free) < count:
        return None
    if weights is None:
        return rng.choice(free, size=count, replace=False)
    # Gumbel keys give weighted draws without replacement in one pass; one unseen purchase keeps every item possible.
    keys = np.log(weights[free] + 1.0) + rng.gumbel(size=len(free))
    return free[np.argsort(-keys)[:count]]


def place_target(rng: np.random.Generator, target: int, negatives: np.ndarray) -> tuple[np.ndarray, int]:
    """Candidates [K] with the target at a random place, and that place."""
    index = int(rng.integers(len(negatives) + 1))
    return np.insert(negatives, index, target), index
