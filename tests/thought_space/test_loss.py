"""InfoNCE: the printed formula, masked false negatives, sampled negatives."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch.nn import functional as F

from pulse_ray.thought_space.loss import Labels, allowed_negatives, info_nce, sample_negatives


def test_loss_is_equation_1() -> None:
    torch.manual_seed(0)
    rationales, behaviours = F.normalize(torch.randn(4, 8), dim=1), F.normalize(torch.randn(4, 8), dim=1)
    negatives = torch.tensor([[0, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    losses = info_nce(behaviours @ rationales.T, torch.arange(4), negatives, temperature=0.05)
    for row in range(4):
        similar = [float(rationales[column] @ behaviours[row]) / 0.05 for column in range(4)]
        below = math.exp(similar[row]) + sum(math.exp(similar[j]) for j in range(4) if negatives[row, j])
        assert losses[row].item() == pytest.approx(-math.log(math.exp(similar[row]) / below), abs=1e-4)
    assert losses[2].item() == pytest.approx(0.0, abs=1e-6)


def labels(users: Sequence[int], targets: Sequence[int]) -> Labels:
    return Labels(
        examples=torch.arange(len(users)),
        users=torch.tensor(users),
        targets=torch.tensor(targets),
        domains=torch.zeros(len(users)),
    )


def test_same_user_and_same_target_are_no_negatives() -> None:
    examples = labels([0, 1, 2, 0], [10, 11, 10, 12])
    allowed = allowed_negatives(examples, examples)
    expected = [[0, 1, 0, 0], [1, 0, 1, 1], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert allowed.tolist() == [[bool(entry) for entry in row] for row in expected]


def test_a_repeated_example_is_one_negative() -> None:
    examples = labels([0, 1, 2, 1], [10, 11, 12, 11])
    examples.examples[3] = 1
    assert allowed_negatives(examples, examples)[0].tolist() == [False, True, True, False]


def test_sampled_negatives_are_allowed_distinct_and_as_many_as_asked() -> None:
    torch.manual_seed(1)
    examples = labels(range(32), [n % 7 for n in range(32)])
    allowed = allowed_negatives(examples, examples)
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


def test_negatives_come_from_other_domains_and_from_nearby_as_asked() -> None:
    torch.manual_seed(2)
    allowed = ~torch.eye(24, dtype=torch.bool)
    other = (torch.arange(24)[:, None] % 3) != (torch.arange(24) % 3)
    similar = torch.rand(24, 24)
    drawn = sample_negatives(allowed, 10, other_domain_BN=other, inter_domain=0.4, similar_BN=similar, hard=0.5)
    assert (drawn & other).sum(1).tolist() == [4] * 24
    assert (drawn & allowed & ~other).sum(1).tolist() == [6] * 24
    for pool, nearest in ((allowed & other, 2), (allowed & ~other, 3)):
        best = similar.masked_fill(~pool, -1).topk(nearest, dim=1).indices
        assert drawn.gather(1, best).all()
    few = sample_negatives(allowed, 10, other_domain_BN=torch.zeros_like(other), inter_domain=0.4)
    assert few.sum(1).tolist() == [6] * 24, "what another domain lacks is not taken from this one"
