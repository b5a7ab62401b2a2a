"""Ranking metrics of the true item among K candidates, and their confidence intervals.

Every metric is the mean over examples of a **gain** g(r) of the target's rank r = 1 … K, 1 being best:

    HR@k    g(r) = 1 if r <= k else 0
    NDCG@k  g(r) = 1 / log2(r + 1) if r <= k else 0        (one relevant item, so the ideal DCG is 1)
    MRR     g(r) = 1 / r

A metric therefore depends on the ranks only through how often each occurs. `intervals` uses that: a bootstrap resample
of n examples is a multinomial draw of the K counts, whatever n is. Where K is a whole catalogue, ranks far down share a
count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pulse_ray.errors import DataError

Gain = Callable[[NDArray[np.int64]], NDArray[np.float64]]
"""Gain of each of an array of ranks; the shape stays."""


def ranks(logits: ArrayLike, target_index: ArrayLike) -> NDArray[np.int64]:
    """Rank of each row's target, 1 is best. Ties rank against the target: a constant scorer gets rank K.

    Args:
        logits: [n, K], higher is better; infinities are allowed.
        target_index: [n], place of the target in its row.

    Returns:
        [n], each from 1 to K.

    Raises:
        DataError: a logit is not a number.

    >>> ranks([[0.1, 0.9, 0.5], [0.1, 0.9, 0.5], [0.5, 0.5, 0.1]], [1, 2, 0])
    array([1, 2, 2])
    """
    scores = np.asarray(logits, dtype=np.float64)
    index = np.asarray(target_index, dtype=np.int64)
    assert scores.ndim == 2, f"logits have shape {scores.shape}, expected [n, K]"
    assert index.shape == scores.shape[:1], f"{index.shape} targets for logits of shape {scores.shape}"
    if bad := int(np.isnan(scores).any(axis=1).sum()):
        raise DataError(
            f"{bad} of {len(scores)} examples have logits that are not numbers",
            remedy="The model that made them diverged: train it again with a lower learning rate or in fp32",
        )
    target = np.take_along_axis(scores, index[:, None], axis=1)
    found: NDArray[np.int64] = (scores >= target).sum(axis=1, dtype=np.int64)
    return found


def hit_gain(ranks: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """1 where the target is among the first `k`, else 0. Shape of `ranks`."""
    return (ranks <= k).astype(np.float64)


def ndcg_gain(ranks: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Discounted gain of the target, 0 beyond the first `k`. Shape of `ranks`."""
    found: NDArray[np.float64] = hit_gain(ranks, k) / np.log2(ranks + 1.0)
    return found


def reciprocal_gain(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """1 / rank. Shape of `ranks`."""
    return 1.0 / ranks


GAINS: dict[str, Gain] = {
    "hr@1": partial(hit_gain, k=1),
    "hr@3": partial(hit_gain, k=3),
    "hr@5": partial(hit_gain, k=5),
    "ndcg@10": partial(ndcg_gain, k=10),
    "mrr": reciprocal_gain,
}
"""The metrics that are reported, in the order in which they are shown."""

EXACT_RANKS = 1000
"""Ranks that a bootstrap resample counts one by one. The gains of what is beyond lie below 1 / `EXACT_RANKS`."""


def hit_ratio(ranks: ArrayLike, k: int) -> float:
    """HR@k: share of targets among the first `k`.

    >>> hit_ratio([1, 2, 4], k=1), hit_ratio([1, 2, 4], k=2)
    (0.3333333333333333, 0.6666666666666666)
    """
    return float(hit_gain(_ranks(ranks), k).mean())


def ndcg(ranks: ArrayLike, k: int) -> float:
    """NDCG@k for one relevant item per example.

    >>> ndcg([1, 3, 4], k=3)  # (1 / log2(2) + 1 / log2(4) + 0) / 3
    0.5
    """
    return float(ndcg_gain(_ranks(ranks), k).mean())


def mrr(ranks: ArrayLike) -> float:
    """Mean reciprocal rank.

    >>> mrr([1, 2, 4])  # (1 + 1/2 + 1/4) / 3
    0.5833333333333334
    """
    return float(reciprocal_gain(_ranks(ranks)).mean())


def histogram(ranks: ArrayLike, size: int) -> NDArray[np.int64]:
    """How often each rank from 1 to `size` occurs: [size].

    >>> histogram([1, 3, 3], size=4)
    array([1, 0, 2, 0])
    """
    found = _ranks(ranks)
    assert found.size == 0 or found.max() <= size, f"rank {found.max()} among {size} candidates"
    return np.bincount(found - 1, minlength=size).astype(np.int64)


def means(counts: ArrayLike) -> dict[str, float]:
    """Every metric of `GAINS` from a histogram of ranks, [K] with at least one example.

    >>> means([1, 0, 1])["hr@1"], means([1, 0, 1])["ndcg@10"]
    (0.5, 0.75)
    """
    weights = np.asarray(counts, dtype=np.float64)
    return {name: float(weights @ gains / weights.sum()) for name, gains in _gains_by_rank(len(weights)).items()}


def intervals(counts: ArrayLike, *, samples: int, seed: int, level: float = 0.95) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap intervals of every metric of `GAINS`, over examples (Efron and Tibshirani, 1993, ch. 13).

    Ranks beyond `EXACT_RANKS` are resampled in groups, each with the mean gain of its examples: memory and time stay
    bounded, and the ends of an interval move by less than 1e-4.

    Args:
        counts: histogram of ranks, [K] with at least one example.
        samples: bootstrap resamples.
        seed: of the resamples; equal seeds give equal intervals.
        level: probability that an interval should cover.

    Returns:
        Low and high end of each metric's interval.

    >>> intervals([5, 0], samples=100, seed=0)["hr@1"]  # no spread in the sample, none in the interval
    (1.0, 1.0)
    """
    occurrences = np.asarray(counts, dtype=np.int64)
    n = int(occurrences.sum())
    first = _groups(len(occurrences))
    grouped = np.add.reduceat(occurrences, first)
    drawn = np.random.default_rng(seed).multinomial(n, grouped / n, size=samples)  # [samples, groups]
    tails = [(1 - level) / 2, (1 + level) / 2]
    found = {}
    for name, gains in _gains_by_rank(len(occurrences)).items():
        mean_gains = np.add.reduceat(occurrences * gains, first) / np.maximum(grouped, 1)
        low, high = np.quantile(drawn @ mean_gains / n, tails)
        found[name] = (float(low), float(high))
    return found


def _groups(size: int) -> NDArray[np.int64]:
    """Places at which groups of ranks begin: single ones first, then ever longer ones, each about a tenth of its rank.

    >>> _groups(4), len(_groups(1_000_000))
    (array([0, 1, 2, 3]), 1070)
    """
    single = np.arange(min(size, EXACT_RANKS))
    if size <= EXACT_RANKS:
        return single
    ends = np.geomspace(EXACT_RANKS, size, num=2 + int(10 * np.log(size / EXACT_RANKS)))
    return np.union1d(single, ends[:-1].astype(np.int64))


def _gains_by_rank(size: int) -> dict[str, NDArray[np.float64]]:
    every = np.arange(1, size + 1)
    return {name: gain(every) for name, gain in GAINS.items()}


def _ranks(values: Any) -> NDArray[np.int64]:
    found = np.asarray(values, dtype=np.int64)
    assert found.size == 0 or found.min() >= 1, "ranks begin at 1"
    return found
