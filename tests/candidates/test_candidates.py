"""SASRec, and retrieval with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pulse_ray.candidates.retrieval import BATCH, Query, Retrieval
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.config import SasrecConfig


def test_sasrec_is_causal_ignores_padding_and_survives_saving(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Sasrec(SasrecConfig(dim=16), [("d", str(n)) for n in range(20)], max_length=6).eval()
    one, two = model.states([[1, 2, 3], [4, 5, 6, 7, 8]])
    close = {"rtol": 1e-4, "atol": 1e-5}
    np.testing.assert_allclose(one, model.states([[1, 2, 3]])[0], **close)
    np.testing.assert_allclose(two, model.encode(torch.tensor([[4, 5, 6, 7, 8, 9]]))[0, 4].detach(), **close)
    np.testing.assert_allclose(model.states([[9, 9, 1, 2, 3, 4, 5, 6]]), model.states([[1, 2, 3, 4, 5, 6]]), **close)
    model.save(tmp_path)
    np.testing.assert_allclose(Sasrec.load(tmp_path).states([[1, 2, 3]])[0], one, **close)


@pytest.mark.parametrize("loss", ["sampled_softmax", "gbce"])
def test_sasrec_learns_a_cycle(loss: str) -> None:
    torch.manual_seed(0)
    model = Sasrec(SasrecConfig(dim=32, dropout=0.0, loss=loss), [("d", str(n)) for n in range(12)], max_length=8)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = [[(start + step) % 12 + 1 for step in range(8)] for start in range(12)]
    for _ in range(150):
        optimizer.zero_grad()
        model(model.pad(rows), torch.randint(1, 13, (6,))).mean().backward()
        optimizer.step()
    model.eval()
    best = model.logits(model.states([[3, 4, 5], [11, 12]])).argmax(1)
    assert best.tolist() == [6, 1]


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
