"""The parts of `attention` in float32 on a CPU without gradients: for each row and key head by itself.

Products go by oneDNN (`pulse_ray.cpu`), scores stay in the cache from one product to the next, and prompts' padding is
left out. Shape suffixes are those of `attention`; M queries of all query heads of a key head.
"""

from __future__ import annotations

import torch

from pulse_ray import cpu

PRODUCTS = 2**19
"""Of queries and keys that are held at once: what the cache holds."""

BLOCK = 160
"""Queries of a prompt that look at the same keys; of the last ones of those each query sees but some."""


def prompts(
    query_BPHD: torch.Tensor, key_BPGD: torch.Tensor, value_BPGD: torch.Tensor, lengths_B: list[int], scaling: float
) -> torch.Tensor:
    """Causal attention of the prompts, which have so many tokens: [B · P, H, D]. Of padding it is anything."""
    rows, longest, heads, size = key_BPGD.shape
    shared = query_BPHD.shape[2] // heads
    later = torch.ones(BLOCK, BLOCK, dtype=torch.bool).triu(1)
    query_BGQPD = (query_BPHD * scaling).view(rows, longest, heads, shared, size).permute(0, 2, 3, 1, 4)
    found_BGQPD = query_BGQPD.new_zeros(*query_BGQPD.shape[:-1], value_BPGD.shape[-1])
    for row, length in enumerate(lengths_B):
        for head in range(heads):
            key_PD = key_BPGD[row, :, head].contiguous()
            for start in range(0, length, BLOCK):
                end = min(length, start + BLOCK)
                block = end - start
                query_MD = query_BGQPD[row, head, :, start:end].reshape(-1, size)
                scores = cpu.product(query_MD, key_PD[:end]).view(shared, block, end)
                scores[..., start:].masked_fill_(later[:block, :block], -torch.inf)
                value_DP = value_BPGD[row, :end, head].t().contiguous()
                found = cpu.product(scores.softmax(-1).view(-1, end), value_DP)
                found_BGQPD[row, head, :, start:end] = found.view(shared, block, -1)
    return found_BGQPD.permute(0, 3, 1, 2, 4).flatten(2, 3).flatten(0, 1)


def candidates(
    query_BKAHD: torch.Tensor,
    prompt_BPGD: tuple[torch.Tensor, torch.Tensor],
    own_BKSGD: tuple[torch.Tensor, torch.Tensor],
    lengths_B: list[int],
    unseen_BKAS: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of the candidates to keys and values of their prompts and their own: [B, K, A, H, D].

    Args:
        lengths_B: tokens of each prompt.
        unseen_BKAS: of a candidate's own tokens those that one of them does not see.
    """
    count, asked = query_BKAHD.shape[1:3]
    heads, own = own_BKSGD[0].shape[3], unseen_BKAS.shape[-1]
    # Heads that share keys stand beside each other, so that a candidate's queries are one matrix.
    query_BKAGQD = (query_BKAHD * scaling).view(*query_BKAHD.shape[:3], heads, -1, query_BKAHD.shape[-1])
    query_BGKQAD = query_BKAGQD.permute(0, 3, 1, 4, 2, 5)
    shared = query_BGKQAD.shape[3]
    found_BGKQAD = query_BGKQAD.new_empty(*query_BGKQAD.shape[:-1], own_BKSGD[1].shape[-1])
    for row, length in enumerate(lengths_B):
        step = max(1, PRODUCTS // (shared * asked * (length + own)))
        for head in range(heads):
            key_PD = prompt_BPGD[0][row, :length, head].contiguous()
            value_DP = prompt_BPGD[1][row, :length, head].t().contiguous()
            for start in range(0, count, step):
                some = slice(start, start + step)
                query_KMD = query_BGKQAD[row, head, some].flatten(1, 2)
                to_own = query_KMD @ own_BKSGD[0][row, some, :, head].transpose(1, 2)
                to_own = to_own.view(-1, shared, asked, own).masked_fill_(unseen_BKAS[row, some, None], -torch.inf)
                to_prompt = cpu.product(query_KMD.flatten(0, 1), key_PD)
                weights = torch.cat([to_prompt, to_own.flatten(0, 2)], dim=-1).softmax(-1)
                found_KMD = weights[:, length:].view(*query_KMD.shape[:2], own) @ own_BKSGD[1][row, some, :, head]
                found_KMD += cpu.product(weights[:, :length], value_DP).view(found_KMD.shape)
                found_BGKQAD[row, head, some] = found_KMD.view(-1, *found_BGKQAD.shape[3:])
    return found_BGKQAD.permute(0, 2, 4, 1, 3, 5).flatten(3, 4)
