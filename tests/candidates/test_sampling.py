"""Draws of negatives against naive Python, and the law of each sampler."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from pulse_ray.candidates.sampling import draw_hard, draw_negatives, hardest, place_target

CATALOGUES = st.integers(1, 60).flatmap(
    lambda size: st.tuples(
        st.lists(st.integers(0, 10**6), min_size=size, max_size=size),
        st.sets(st.integers(0, size - 1)),
        st.integers(1, size + 2),
    )
)
"""Weights less 1, touched items, and how many are wanted."""


@given(CATALOGUES, st.booleans(), st.integers(0, 2**32))
def test_draws_are_distinct_and_untouched_and_there_are_none_only_where_there_are_too_few(
    given_: tuple[list[int], set[int], int], weighted: bool, seed: int
) -> None:
    popularity, touched, count = given_
    cumulative = np.cumsum(np.array(popularity) + 1) if weighted else None
    drawn, again = (
        draw_negatives(np.random.default_rng(seed), count, len(popularity), order, cumulative=cumulative)
        for order in (touched, sorted(touched, reverse=True))
    )
    untouched = [item for item in range(len(popularity)) if item not in touched]
    if len(untouched) < count:
        assert drawn is again is None
        return
    assert drawn is not None and again is not None
    assert drawn.tolist() == again.tolist()
    assert len(drawn) == count == len(set(drawn.tolist()))
    assert set(drawn.tolist()) <= set(untouched)


@pytest.mark.parametrize(
    ("weights", "touched", "count"),
    [
        ([1] * 7, {2}, 2),
        ([1] * 5, {0}, 3),
        ([9, 1, 4, 2, 5, 3], set(), 2),
        ([9, 1, 4, 2, 5, 3], {0}, 2),
        ([5, 1, 3, 2], {1}, 2),
        ([100_000, 1, 4, 2, 5, 3], set(), 2),
    ],
    ids=["uniform", "uniform, most of it", "weighted", "one touched", "most of it", "one outweighs the rest"],
)
def test_draws_follow_the_law_of_taking_one_item_after_another(
    weights: list[int], touched: set[int], count: int
) -> None:
    """Against the probability of each sequence of items, computed by hand."""
    free = [item for item in range(len(weights)) if item not in touched]
    law = {}
    for sequence in permutations(free, count):
        chance, left = 1.0, float(sum(weights[item] for item in free))
        for item in sequence:
            chance, left = chance * weights[item] / left, left - weights[item]
        law[sequence] = chance
    cumulative = None if len(set(weights)) == 1 else np.cumsum(weights)
    total = 4000
    drawn: Counter[tuple[int, ...]] = Counter()
    for seed in range(total):
        made = draw_negatives(np.random.default_rng(seed), count, len(weights), touched, cumulative=cumulative)
        assert made is not None
        drawn[tuple(made.tolist())] += 1
    likely = [sequence for sequence, chance in law.items() if chance * total >= 5]
    seen = [drawn[sequence] for sequence in likely]
    expected = [law[sequence] * total for sequence in likely]
    seen[-1], expected[-1] = seen[-1] + total - sum(seen), expected[-1] + total - sum(expected)
    assert chisquare(seen, expected).pvalue > 0.001


def test_a_uniform_draw_makes_nothing_as_long_as_the_catalogue() -> None:
    drawn = draw_negatives(np.random.default_rng(0), 9, 10**12, set(range(1000)))
    assert drawn is not None and len(set(drawn.tolist())) == 9


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_the_hardest_are_the_best_untouched_and_of_equals_the_first(levels: list[int], data: st.DataObject) -> None:
    touched = data.draw(st.sets(st.integers(0, len(levels) - 1)))
    size = data.draw(st.integers(1, len(levels) + 3))
    free = [item for item in range(len(levels)) if item not in touched]
    best = sorted(free, key=lambda item: (-levels[item], item))[:size]
    found = hardest(np.array(levels, dtype=np.float32), touched, size)
    assert found.tolist() == sorted(best)
    drawn = draw_hard(np.random.default_rng(0), 3, found)
    assert (drawn is None) == (len(best) < 3)
    assert drawn is None or (len(set(drawn.tolist())) == 3 and set(drawn.tolist()) <= set(best))


def test_target_takes_every_place_about_as_often() -> None:
    places = [place_target(np.random.default_rng(seed), 77, np.arange(9)) for seed in range(2000)]
    assert all(candidates[index] == 77 and len(candidates) == 10 for candidates, index in places)
    counts = np.bincount([index for _, index in places], minlength=10)
    assert counts.min() > 140 and counts.max() < 260
