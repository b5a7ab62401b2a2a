"""Metrics against numbers worked out by hand, and the bootstrap against the resampling that it stands for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pulse_ray import metrics
from pulse_ray.errors import DataError

LOGITS = [
    [0.9, 0.1, 0.3, 0.2],  # target first
    [0.9, 0.1, 0.3, 0.2],  # target last
    [0.5, 0.5, 0.5, 0.5],  # all tie: last
    [-np.inf, 2.0, 2.0, 1.0],  # ties with one other: second
]
TARGETS = [0, 1, 2, 1]


def test_golden_ranks_and_metrics() -> None:
    ranks = metrics.ranks(LOGITS, TARGETS)
    assert ranks.tolist() == [1, 4, 4, 2]
    assert metrics.hit_ratio(ranks, 1) == 0.25
    assert metrics.hit_ratio(ranks, 3) == 0.5
    assert metrics.ndcg(ranks, 10) == pytest.approx((1 + 2 / math.log2(5) + 1 / math.log2(3)) / 4)
    assert metrics.mrr(ranks) == pytest.approx((1 + 1 / 4 + 1 / 4 + 1 / 2) / 4)


@pytest.mark.parametrize("constant", [0.0, -np.inf, 1e30])
def test_a_constant_scorer_never_hits(constant: float) -> None:
    ranks = metrics.ranks(np.full((5, 10), constant), np.arange(5))
    assert set(ranks.tolist()) == {10}


def test_order_of_candidates_does_not_matter() -> None:
    rng = np.random.default_rng(1)
    logits, targets = rng.integers(0, 4, size=(50, 8)).astype(float), rng.integers(0, 8, size=50)
    order = rng.permutation(8)
    assert (metrics.ranks(logits, targets) == metrics.ranks(logits[:, order], np.argsort(order)[targets])).all()


def test_a_logit_that_is_not_a_number_is_an_error() -> None:
    with pytest.raises(DataError, match="1 of 2 examples have logits that are not numbers"):
        metrics.ranks([[0.1, np.nan], [0.1, 0.2]], [0, 0])


def test_metrics_of_a_histogram_equal_those_of_its_ranks() -> None:
    ranks = np.random.default_rng(2).integers(1, 11, size=200)
    found = metrics.means(metrics.histogram(ranks, 10))
    assert found["hr@3"] == pytest.approx(metrics.hit_ratio(ranks, 3))
    assert found["ndcg@10"] == pytest.approx(metrics.ndcg(ranks, 10))
    assert found["mrr"] == pytest.approx(metrics.mrr(ranks))


def test_intervals_are_those_of_resampled_examples() -> None:
    rng = np.random.default_rng(3)
    ranks = rng.integers(1, 11, size=120)
    found = metrics.intervals(metrics.histogram(ranks, 10), samples=20_000, seed=0)
    resampled = ranks[rng.integers(0, len(ranks), size=(20_000, len(ranks)))]
    for name, gain in metrics.GAINS.items():
        expected = np.quantile(gain(resampled).mean(axis=1), [0.025, 0.975])
        assert found[name] == pytest.approx(expected, abs=0.01)


def test_intervals_of_ranks_in_a_large_catalogue_are_those_of_resampled_examples() -> None:
    rng = np.random.default_rng(5)
    ranks = np.minimum(1 + rng.pareto(0.3, size=300) * 8, 200_000).astype(np.int64)
    found = metrics.intervals(metrics.histogram(ranks, 200_000), samples=20_000, seed=0)
    resampled = ranks[rng.integers(0, len(ranks), size=(20_000, len(ranks)))]
    for name, gain in metrics.GAINS.items():
        expected = np.quantile(gain(resampled).mean(axis=1), [0.025, 0.975])
        assert found[name] == pytest.approx(expected, abs=0.01)


def test_intervals_repeat_with_the_seed_and_hold_the_value() -> None:
    counts = [40, 20, 10, 5, 25]
    one, other = (metrics.intervals(counts, samples=300, seed=seed) for seed in (1, 2))
    assert one == metrics.intervals(counts, samples=300, seed=1) != other
    for name, value in metrics.means(counts).items():
        assert one[name][0] <= value <= one[name][1]


def test_intervals_cover_the_truth_as_often_as_they_claim() -> None:
    rng = np.random.default_rng(4)
    truth = np.array([0.4, 0.3, 0.2, 0.1])
    held = 0
    for trial in range(300):
        low, high = metrics.intervals(rng.multinomial(200, truth), samples=400, seed=trial)["hr@1"]
        held += low <= 0.4 <= high
    assert 0.91 <= held / 300 <= 0.98
