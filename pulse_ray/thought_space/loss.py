"""InfoNCE between rationales and behaviours (Eq. 1 of the paper), with sampled negatives and false negatives masked.

Shape suffixes: B behaviours (anchors) of a worker's batch, which are rows; N rationales of all workers' batches, which
are columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Labels:
    """Which examples they are and whose, as numbers that stand for names: each [B], int64."""

    examples: torch.Tensor
    users: torch.Tensor
    targets: torch.Tensor
    domains: torch.Tensor


def allowed_negatives(anchors: Labels, columns: Labels) -> torch.Tensor:
    """[B, N] bool: whether a rationale may be a negative of an anchor.

    Neither a rationale of the same user nor one for the same target is: it may well explain this behaviour too. One
    that stands among the columns more than once counts once: a worker without a share of a last batch repeats one.
    """
    repeated_N = (columns.examples[:, None] == columns.examples).tril(-1).any(1)
    apart_BN = (anchors.users[:, None] != columns.users) & (anchors.targets[:, None] != columns.targets)
    return apart_BN & ~repeated_N


def sample_negatives(
    allowed_BN: torch.Tensor,
    count: int | Literal["all"],
    *,
    other_domain_BN: torch.Tensor | None = None,
    inter_domain: float | None = None,
    similar_BN: torch.Tensor | None = None,
    hard: float = 0.0,
) -> torch.Tensor:
    """[B, N] bool: up to `count` of the allowed negatives of each row, drawn with torch's generator.

    Args:
        count: fewer are taken where there are fewer, of a domain as well.
        other_domain_BN: bool; whether a column is of another domain than the row. Needed for `inter_domain`.
        inter_domain: share of them from other domains; None draws from all alike.
        similar_BN: how near they are. Needed for `hard`.
        hard: share of them that is the nearest there are, instead of drawn.
    """
    if count == "all":
        return allowed_BN
    pools = [(allowed_BN, count)]
    if inter_domain is not None:
        assert other_domain_BN is not None
        inter = round(inter_domain * count)
        pools = [(allowed_BN & other_domain_BN, inter), (allowed_BN & ~other_domain_BN, count - inter)]
    chosen_BN = torch.zeros_like(allowed_BN)
    for pool_BN, wanted in pools:
        nearest = round(hard * wanted)
        if nearest:
            assert similar_BN is not None
            chosen_BN |= _highest(similar_BN, pool_BN, nearest)
        chosen_BN |= _highest(torch.rand(pool_BN.shape).to(pool_BN.device), pool_BN & ~chosen_BN, wanted - nearest)
    return chosen_BN


def _highest(keys_BN: torch.Tensor, pool_BN: torch.Tensor, count: int) -> torch.Tensor:
    """[B, N] bool: those of each row's pool with the highest keys."""
    kept = min(count, pool_BN.shape[1])
    places_BK = keys_BN.masked_fill(~pool_BN, -torch.inf).topk(kept, dim=1).indices
    return torch.zeros_like(pool_BN).scatter(1, places_BK, True) & pool_BN


def info_nce(
    similar_BN: torch.Tensor, positives_B: torch.Tensor, negatives_BN: torch.Tensor, temperature: torch.Tensor | float
) -> torch.Tensor:
    """Loss of each behaviour: [B].

    Args:
        similar_BN: cosines of behaviours and rationales.
        positives_B: the column of each behaviour's own rationale.
        negatives_BN: bool; which columns are negatives of each row.
    """
    logits_BN = similar_BN / temperature
    kept_BN = negatives_BN.scatter(1, positives_B[:, None], True)
    positive_B = logits_BN.gather(1, positives_B[:, None])[:, 0]
    return torch.logsumexp(logits_BN.masked_fill(~kept_BN, -torch.inf), dim=1) - positive_B
