"""Candidate sets: the target and K - 1 items that the user never touched.

A draw is seeded by the example's id, so neither the number of workers nor the order of parts changes it. The target's
place is random. Negatives exclude *all* of the user's items, those after the target included.

Draws reject what is touched or drawn already, so they take about K + touched steps however large the catalogue is.
That is sampling without replacement by definition: each draw is proportional to the weights of what is left. Where
rejection would go on for long, the rest is drawn over the whole catalogue, by the same law.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

HARD_POOL = 10
"""Hard negatives are drawn from the model's best `HARD_POOL` × (K - 1) untouched items."""

ROUNDS = 8
"""Times that items are drawn and rejected, some more than are lacking each time, before the whole catalogue is used."""


def draw_negatives(
    rng: np.random.Generator,
    count: int,
    num_items: int,
    touched: Collection[int],
    *,
    cumulative: NDArray[np.int64] | None = None,
) -> NDArray[np.int64] | None:
    """`count` distinct item indices outside `touched`, or None where there are not so many.

    Args:
        rng: seeded for this example alone.
        num_items: items of the domain; indices are below it.
        cumulative: [num_items] running sum of the items' weights, whole numbers above 0. Unset weighs all alike.
    """
    taken = set(touched)
    if num_items - len(taken) < count:
        return None
    found: list[int] = []
    if 2 * (len(taken) + count) <= num_items:
        found = _draw_and_reject(rng, count, num_items, taken, cumulative)
    rest = _draw_exactly(rng, count - len(found), num_items, taken, cumulative) if len(found) < count else []
    return np.array([*found, *rest], dtype=np.int64)


def _draw_and_reject(
    rng: np.random.Generator, count: int, num_items: int, taken: set[int], cumulative: NDArray[np.int64] | None
) -> list[int]:
    """Up to `count` new items, in the order in which they were drawn; adds them to `taken`."""
    found: list[int] = []
    for _ in range(ROUNDS):
        size = 2 * (count - len(found)) + 8
        if cumulative is None:
            drawn = rng.integers(num_items, size=size)
        else:
            drawn = np.searchsorted(cumulative, rng.integers(cumulative[-1], size=size), side="right")
        for item in drawn.tolist():
            if item not in taken:
                taken.add(item)
                found.append(item)
                if len(found) == count:
                    return found
    return found


def _draw_exactly(
    rng: np.random.Generator, count: int, num_items: int, taken: set[int], cumulative: NDArray[np.int64] | None
) -> list[int]:
    """`count` of the items outside `taken`, by keys with Gumbel noise: the law of drawing one after another."""
    left = np.ones(num_items, dtype=bool)
    left[list(taken)] = False
    free = np.flatnonzero(left)
    keys = rng.gumbel(size=len(free))
    if cumulative is not None:
        keys += np.log(np.diff(cumulative, prepend=0)[free])
    found: list[int] = free[np.argsort(-keys, kind="stable")[:count]].tolist()
    return found


def draw_hard(rng: np.random.Generator, count: int, pool: NDArray[np.int64]) -> NDArray[np.int64] | None:
    """`count` distinct entries of `pool`, or None where it holds fewer."""
    return rng.choice(pool, size=count, replace=False) if len(pool) >= count else None


def hardest(logits: NDArray[np.float32], touched: Collection[int], size: int) -> NDArray[np.int64]:
    """The `size` best untouched items by (-logit, index), or all where there are fewer, ascending by index.

    Two logits that differ in their last bit from one batch to the next may change places within the pool. Its order
    does not show that.

    Args:
        logits: [items] of one user, finite. The logits of touched items are overwritten.
    """
    logits[list(touched)] = -np.inf
    size = min(size, len(logits) - len(set(touched)))
    if size <= 0:
        return np.zeros(0, dtype=np.int64)
    least = np.partition(logits, len(logits) - size)[len(logits) - size]
    above = np.flatnonzero(logits > least)
    ties = np.flatnonzero(logits == least)[: size - len(above)]
    return np.union1d(above, ties)


def place_target(rng: np.random.Generator, target: int, negatives: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
    """Candidates [K] with the target at a random place, and that place."""
    index = int(rng.integers(len(negatives) + 1))
    return np.insert(negatives, index, target), index
