"""Losses of SASRec: each of T positions against the item that came next.

Shape suffixes: T positions, D model dimension, N negatives, V items.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

CHUNK_LOGITS = 1 << 21
"""Logits of the full softmax that exist at once. On a CPU they stay in its cache: 8 MiB in fp32."""


class FullSoftmax(torch.autograd.Function):
    """Cross-entropy over all items without a [T, V] matrix: gradients are made beside the loss, some rows at a time.

    With 17,000 items on a CPU it takes a quarter of the time of `F.cross_entropy(states @ items.T, targets)`.
    """

    @staticmethod
    def forward(ctx: Any, states_TD: torch.Tensor, items_VD: torch.Tensor, targets_T: torch.Tensor) -> torch.Tensor:
        """Loss of each position: [T] fp32. `targets_T` counts the items from 0."""
        rows = max(1, CHUNK_LOGITS // len(items_VD))
        losses_T = torch.empty(len(states_TD), dtype=torch.float32, device=states_TD.device)
        by_states_TD, by_items_VD = torch.empty_like(states_TD), torch.zeros_like(items_VD, dtype=torch.float32)
        for start in range(0, len(states_TD), rows):
            part = slice(start, start + rows)
            states, targets = states_TD[part], targets_T[part, None]
            logits = (states @ items_VD.T).float()
            torch.log_softmax(logits, dim=-1, out=logits)
            losses_T[part] = -logits.gather(1, targets)[:, 0]
            slopes = logits.exp_().scatter_add_(1, targets, logits.new_full(targets.shape, -1.0)).to(states)
            by_states_TD[part] = slopes @ items_VD
            by_items_VD += slopes.T @ states
        ctx.save_for_backward(by_states_TD, by_items_VD)
        return losses_T

    @staticmethod
    def backward(ctx: Any, *slopes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Every position must weigh alike in what is differentiated, as all do in a mean."""
        by_states_TD, by_items_VD = ctx.saved_tensors
        weight = slopes[0][:1]
        assert bool((slopes[0] == weight).all()), "positions differ in weight"
        return by_states_TD * weight.to(by_states_TD), (by_items_VD * weight).to(by_states_TD), None


def sampled_softmax(positive_T: torch.Tensor, negative_TN: torch.Tensor, same_TN: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of the target among itself and the negatives: [T].

    Args:
        same_TN: where a negative is the target itself, which then counts once.
    """
    rest_T = torch.logsumexp(negative_TN.masked_fill(same_TN, -torch.inf), dim=-1)
    return torch.logaddexp(positive_T, rest_T) - positive_T


def gbce(
    positive_T: torch.Tensor, negative_TN: torch.Tensor, same_TN: torch.Tensor, *, items: int, calibration: float
) -> torch.Tensor:
    """Generalised binary cross-entropy (Petrov and Macdonald, 2023, Eq. 16), averaged over 1 + N terms: [T].

    Args:
        items: in the catalogue.
        calibration: t, from 0 (plain binary cross-entropy) to 1 (the positive's full correction).
    """
    sampled = negative_TN.shape[-1] / max(1, items - 1)
    beta = sampled * (calibration * (1 - 1 / sampled) + 1 / sampled)
    rejected_T = F.logsigmoid(-negative_TN).masked_fill(same_TN, 0.0).sum(-1)
    return -(beta * F.logsigmoid(positive_T) + rejected_T) / (1 + negative_TN.shape[-1])
