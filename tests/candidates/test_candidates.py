"""Candidate sets, retrieval and similar users."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pulse_ray.candidates.neighbours import NeighbourIndex
from pulse_ray.candidates.retrieval import BATCH, Query, Retrieval
from pulse_ray.candidates.sampling import draw_negatives, place_target
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.config import SasrecConfig


@pytest.mark.parametrize("kind", ["uniform", "popularity", "sasrec"])
def test_negatives_are_distinct_untouched_and_reproducible(kind: str) -> None:
    popularity = np.arange(60.0) ** 2
    given = {"popularity": {"weights": popularity}, "sasrec": {"scores": -popularity}}.get(kind, {})
    for seed in range(50):
        touched = set(np.random.default_rng(seed).choice(60, 20, replace=False).tolist())
        drawn = draw_negatives(np.random.default_rng(seed), 9, 60, touched, **given)
        assert drawn is not None
        assert len(set(drawn.tolist())) == 9
        assert not touched & set(drawn.tolist())
        again = draw_negatives(np.random.default_rng(seed), 9, 60, touched, **given)
        np.testing.assert_array_equal(drawn, again)
    assert draw_negatives(np.random.default_rng(0), 9, 60, set(range(52)), **given) is None


def test_samplers_prefer_what_they_are_named_after() -> None:
    weights = np.r_[np.full(50, 1.0), np.full(50, 99.0)]
    drawn = [draw_negatives(np.random.default_rng(s), 5, 100, set(), weights=weights) for s in range(300)]
    assert np.mean(np.concatenate(drawn) >= 50) > 0.9
    hard = draw_negatives(np.random.default_rng(0), 3, 100, {99}, scores=np.arange(100.0))
    assert set(hard.tolist()) <= set(range(69, 99))


def test_target_takes_every_place_about_as_often() -> None:
    places = [place_target(np.random.default_rng(seed), 77, np.arange(9)) for seed in range(2000)]
    assert all(candidates[index] == 77 and len(candidates) == 10 for candidates, index in places)
    counts = np.bincount([index for _, index in places], minlength=10)
    assert counts.min() > 140 and counts.max() < 260


def test_retrieval_finds_the_untouched_items_of_highest_logit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vocabulary = [("ab"[number % 3 == 0], f"i{number}") for number in range(90)]
    model = Sasrec(SasrecConfig(dim=16), vocabulary, max_length=6).eval()
    model.save(tmp_path)
    rng = np.random.default_rng(0)
    queries = []
    for number in range(2 * BATCH + 5):
        domain = "ab"[number % 4 == 0]
        own = [item for name, item in vocabulary if name == domain]
        history = list(rng.permutation(own)[: rng.integers(0, len(own) - 3)])
        queries.append(Query(domain=domain, history=[*history, "unknown"], touched={*history, "unknown"}))
    everything = Query(domain="b", history=["i0"], touched=[item for _, item in vocabulary])
    found = Retrieval(tmp_path).nearest([*queries, everything, Query(domain="c", history=["i0"], touched=[])], 7)
    assert found[-2:] == [[], []]
    for query, items in zip(queries, found, strict=False):
        logits = model.logits(model.states([model.indices(query.domain, query.history)]))[0]
        untouched = [item for domain, item in vocabulary if domain == query.domain and item not in query.touched]
        assert items == sorted(untouched, key=lambda item: -logits[model.index[(query.domain, item)]])[:7]


def test_neighbours_are_by_cosine_and_never_the_user_itself() -> None:
    states = np.array([[1, 0], [0.9, 0.1], [0, 5], [-1, 0]], dtype=np.float32)
    index = NeighbourIndex(["a", "b", "c", "d"], states, [["x"], ["y", "x"], ["z"], []])
    assert index.nearest(np.array([[2, 0], [0, 1]], dtype=np.float32), ["a", "q"], 2) == [[1, 2], [2, 1]]
    assert index.items_of([1, 2, 0]) == ["x", "y", "z"]
