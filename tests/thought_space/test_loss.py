"""InfoNCE: the printed formula, masked false negatives, sampled negatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pulse_ray.thought_space.loss import allowed_negatives, info_nce, sample_negatives


def test_loss_is_equation_1() -> None:
    torch.manual_seed(0)
    rationales, behaviours = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
    negatives = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    losses = info_nce(rationales, behaviours, negatives, temperature=0.05)
    for row in range(4):
        similar = [float(rationales[column] @ behaviours[row]) / 0.05 for column in range(4)]
        below = math.exp(similar[row]) + sum(math.exp(similar[j]) for j in range(4) if negatives[row, j])
        assert losses[row].item() == pytest.approx(-math.log(math.exp(similar[row]) / below), abs=1e-4)
    assert losses[2].item() == pytest.approx(0.0, abs=1e-6)


def test_same_user_and_same_target_are_no_negatives() -> None:
    allowed = allowed_negatives(["u", "v", "w", "u"], ["a", "b", "a", "c"])
    expected = [[0, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert allowed.tolist() == [[bool(entry) for entry in row] for row in expected]


def test_sampled_negatives_are_allowed_distinct_and_as_many_as_asked() -> None:
    torch.manual_seed(1)
    allowed = allowed_negatives([str(n) for n in range(32)], [str(n % 7) for n in range(32)])
    counts = torch.zeros(32, 32)
    for _ in range(200):
        drawn = sample_negatives(allowed, 10)
        assert not (drawn & ~allowed).any()
        assert drawn.sum(1).tolist() == [10] * 32
        counts += drawn
    drawn_shares = counts[allowed] / 200
    assert drawn_shares.min() > 0.15 and drawn_shares.max() < 0.6  # uniform: about 10 / 27
    few = torch.tensor([[False, True], [False, False]])
    assert torch.equal(sample_negatives(few, 10), few)
    assert torch.equal(sample_negatives(allowed, "all"), allowed)
