"""Candidates where none are given."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from pulse_ray.candidates.retrieval import BATCH, Query, Retrieval
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.config import SasrecConfig


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
