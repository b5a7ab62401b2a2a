"""InfoNCE between rationales and behaviours (Eq. 1 of the paper), with sampled negatives and false negatives masked.

Shape suffixes: B examples of a batch; rows of a [B, B] matrix are behaviours (anchors), columns are rationales.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch


def allowed_negatives(users: Sequence[str], targets: Sequence[str]) -> torch.Tensor:
    """[B, B] bool: whether column j may be a negative of row i.

    Neither a rationale of the same user nor one for the same target is: it may well explain this behaviour too.
    """
    user_B, target_B = _codes(users), _codes(targets)
    return (user_B[:, None] != user_B[None]) & (target_B[:, None] != target_B[None])


def sample_negatives(allowed_BB: torch.Tensor, count: int | Literal["all"]) -> torch.Tensor:
    """[B, B] bool: up to `count` of the allowed negatives of each row, drawn uniformly with torch's generator."""
    if count == "all":
        return allowed_BB
    keys_BB = torch.rand(allowed_BB.shape).masked_fill(~allowed_BB, -1.0)
    kept = min(count, allowed_BB.shape[1])
    chosen_BK = keys_BB.topk(kept, dim=1).indices
    return torch.zeros_like(allowed_BB).scatter(1, chosen_BK, True) & allowed_BB


def info_nce(
    rationales_BD: torch.Tensor, behaviours_BD: torch.Tensor, negatives_BB: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Loss of each behaviour: [B].

    Args:
        rationales_BD: unit vectors; row i belongs to behaviour i.
        behaviours_BD: unit vectors.
        negatives_BB: which columns are negatives of each row; the diagonal is the positive and need not be set.
    """
    logits_BB = behaviours_BD @ rationales_BD.T / temperature
    kept_BB = negatives_BB | torch.eye(len(negatives_BB), dtype=torch.bool, device=negatives_BB.device)
    return torch.logsumexp(logits_BB.masked_fill(~kept_BB, -torch.inf), dim=1) - logits_BB.diagonal()


def _codes(names: Sequence[str]) -> torch.Tensor:
    place: dict[str, int] = {}
    return torch.tensor([place.setdefault(name, len(place)) for name in names])
