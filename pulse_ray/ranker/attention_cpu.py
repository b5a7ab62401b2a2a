"""`attention` on a CPU without gradients: for each row and key head by itself.

Products go by oneDNN (`pulse_ray.cpu`) and in float32, as they do inside of torch's own attention. Scores stay in the
cache from one product to the next, and prompts are neither padded nor gathered. Shape suffixes are those of
`attention`; M queries of all query heads of a key head.
"""

from __future__ import annotations

import torch

from pulse_ray import cpu
from pulse_ray.ranker.packing import PAD, PackedBatch

PRODUCTS = 2**19
"""Of queries and keys that are held at once: what the cache holds."""

BLOCK = 160
"""Queries of a prompt that look at the same keys; of the last ones of those each query sees but some."""


def attend(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    packing: PackedBatch,
    scaling: float,
    *,
    ends_only: bool,
) -> torch.Tensor:
    """Attention of packed rows: [T, H, D].

    Args:
        key_TGD: with a prompt that is remembered from before, its keys stand first.
        value_TGD: as `key_TGD`.
        ends_only: others than the last tokens of candidates get zeros.
    """
    dtype = query_THD.dtype
    query_THD, key_TGD, value_TGD = query_THD.float(), key_TGD.float(), value_TGD.float()
    remembered = len(key_TGD) - len(query_THD)
    prompt_key_PGD, prompt_value_PGD = key_TGD[:remembered], value_TGD[:remembered]
    own_key_TGD, own_value_TGD = key_TGD[remembered:], value_TGD[remembered:]
    found_THD = query_THD.new_empty(*query_THD.shape[:2], value_TGD.shape[-1])
    if ends_only:
        found_THD.zero_()
    start = 0
    for row, length in enumerate((packing.prompts_BP != PAD).sum(1).tolist()):
        if not remembered:
            place = slice(start, start + length)
            prompt_key_PGD, prompt_value_PGD = own_key_TGD[place], own_value_TGD[place]
            if not ends_only:
                _prompt(query_THD[place], prompt_key_PGD, prompt_value_PGD, scaling, found_THD[place])
            start += length
        places_KS = packing.candidates_BKS[row]
        places_KS = places_KS[places_KS[:, :1].flatten() != PAD] if places_KS.numel() else places_KS
        if not places_KS.numel():
            continue
        asked_KA = packing.ends_BK[row, : len(places_KS), None] if ends_only else places_KS
        unseen_KAS = (places_KS == PAD)[:, None] | (places_KS[:, None] > asked_KA[..., None])
        found_NHD = _candidates(
            query_THD[asked_KA],
            prompt_key_PGD,
            prompt_value_PGD,
            own_key_TGD[places_KS],
            own_value_TGD[places_KS],
            unseen_KAS,
            scaling,
        ).flatten(0, 1)
        asked_N = asked_KA.flatten()
        there = asked_N != PAD
        if there.all():
            found_THD.index_copy_(0, asked_N, found_NHD)
        else:
            found_THD.index_copy_(0, asked_N[there], found_NHD[there])
    return found_THD.to(dtype)


def _prompt(
    query_PHD: torch.Tensor, key_PGD: torch.Tensor, value_PGD: torch.Tensor, scaling: float, found_PHD: torch.Tensor
) -> None:
    """Causal attention of a prompt, written to `found_PHD`."""
    length, heads, size = key_PGD.shape
    shared = query_PHD.shape[1] // heads
    query_GQPD = query_PHD.view(length, heads, shared, size).permute(1, 2, 0, 3)
    found_GQPD = found_PHD.view(length, heads, shared, found_PHD.shape[-1]).permute(1, 2, 0, 3)
    later = query_PHD.new_full((BLOCK, BLOCK), -torch.inf).triu(1)
    for head in range(heads):
        key_PD, value_DP = key_PGD[:, head] * scaling, value_PGD[:, head].t()
        for start in range(0, length, BLOCK):
            end = min(length, start + BLOCK)
            block = end - start
            query_QbD = query_GQPD[head, :, start:end]
            scores = cpu.product(query_QbD.reshape(-1, size), key_PD[:end]).view(-1, block, end)
            scores[..., start:] += later[:block, :block]
            found = cpu.product(scores.softmax(-1).view(-1, end), value_DP[:, :end].contiguous())
            found_GQPD[head, :, start:end] = found.view(-1, block, found.shape[-1])


def _candidates(
    query_KAHD: torch.Tensor,
    prompt_key_PGD: torch.Tensor,
    prompt_value_PGD: torch.Tensor,
    own_key_KSGD: torch.Tensor,
    own_value_KSGD: torch.Tensor,
    unseen_KAS: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of a row's candidates to keys and values of their prompt and their own: [K, A, H, D].

    Args:
        unseen_KAS: of a candidate's own tokens those that one of them does not see.
    """
    count, asked, _, size = query_KAHD.shape
    length, heads, _ = prompt_key_PGD.shape
    shared, own = query_KAHD.shape[2] // heads, unseen_KAS.shape[-1]
    # Heads that share keys stand beside each other, so that a candidate's queries are one matrix.
    query_GKQAD = query_KAHD.view(count, asked, heads, shared, size).permute(2, 0, 3, 1, 4)
    own_key_KSGD = own_key_KSGD * scaling
    found_GKQAD = query_GKQAD.new_empty(*query_GKQAD.shape[:-1], own_value_KSGD.shape[-1])
    hidden_K1AS = query_GKQAD.new_zeros(unseen_KAS.shape).masked_fill_(unseen_KAS, -torch.inf)[:, None]
    step = max(1, PRODUCTS // (shared * asked * (length + own)))
    for head in range(heads):
        key_PD, value_DP = prompt_key_PGD[:, head] * scaling, prompt_value_PGD[:, head].t().contiguous()
        for start in range(0, count, step):
            some = slice(start, start + step)
            query_KMD = query_GKQAD[head, some].flatten(1, 2)
            to_own = query_KMD @ own_key_KSGD[some, :, head].transpose(1, 2)
            to_own = to_own.view(-1, shared, asked, own).add_(hidden_K1AS[some])
            to_prompt = cpu.product(query_KMD.flatten(0, 1), key_PD)
            weights = torch.cat([to_prompt, to_own.flatten(0, 2)], dim=-1).softmax(-1)
            found_KMD = weights[:, length:].view(*query_KMD.shape[:2], own) @ own_value_KSGD[some, :, head]
            found_KMD += cpu.product(weights[:, :length], value_DP).view(found_KMD.shape)
            found_GKQAD[head, some] = found_KMD.view(-1, shared, asked, found_KMD.shape[-1])
    return found_GKQAD.permute(1, 3, 0, 2, 4).flatten(2, 3)
