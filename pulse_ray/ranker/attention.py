"""Attention over packed rows in parts, where a mask would make every token look at all of them.

A prompt attends to itself, and a candidate to its prompt and itself: P²/2 + K·s·(P + s) products of a query and a key
for a row, where (P + K·s)² stand under a mask. It is one of transformers' attention functions, so a model that asks
their registry for causal attention can rank.

Shape suffixes: B rows, P prompt tokens, K candidates, S tokens of one, A of those the ones that ask: all, or the last.
T tokens of the batch, H query heads, G key heads, Q query heads of a key head, D dimensions of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface

from pulse_ray.errors import ArtifactError
from pulse_ray.ranker import attention_cpu
from pulse_ray.ranker.last_layer import MARK
from pulse_ray.ranker.packing import PAD, PackedBatch

NAME = "pulse_ray_packed"
"""Of the function in transformers' registry."""

PRODUCTS = 2**20
"""Of queries and keys that are held at once on a CPU, where torch attends: what its cache holds."""

REMEDY = "Choose a Llama, Qwen, Gemma 1 or 3, Mistral or Phi model"
"""Where rows of a model's tokens cannot follow each other."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packing: PackedBatch,
    scaling: float,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of packed rows, as transformers calls it in every layer. It has no dropout.

    Args:
        query: [1, H, T, D].
        key: [1, G, T, D]; with a prompt that is remembered from before, its keys stand first.
        value: as `key`.
        attention_mask: must be None, as `packing` says who sees whom.
        packing: of the tokens T.
        scaling: of the products.
        softcap: as `attention_mask`, and so are those that follow: what some models do to the products.

    Returns:
        [1, T, H, D], and no weights.

    Raises:
        ArtifactError: it is another attention than that of products under a softmax, each token to those before it.
    """
    special = {"mask": attention_mask, "softcap": softcap, "s_aux": s_aux, "position_bias": position_bias}
    given = [name for name, value in special.items() if value is not None]
    if given or not getattr(module, "is_causal", True):
        raise ArtifactError(
            f"the model cannot rank: {type(module).__name__} has an attention of its own "
            f"({', '.join(given) or 'to later tokens'})",
            remedy=REMEDY,
        )
    query_THD, key_TGD, value_TGD = (states[0].transpose(0, 1) for states in (query, key, value))
    ends_only = getattr(module, MARK, False)
    if attention_cpu.serves(query, key, value):
        found_THD = attention_cpu.attend(query_THD, key_TGD, value_TGD, packing, scaling, ends_only=ends_only)
        return found_THD[None], None
    remembered = len(key_TGD) - len(query_THD)
    own_TGD = (key_TGD[remembered:], value_TGD[remembered:])
    prompts = packing.prompts_BP
    prompt_BPGD = (own_TGD[0][prompts], own_TGD[1][prompts])
    parts = []
    if prompts.numel() and not ends_only:
        parts.append(_prompts(query_THD[prompts], *prompt_BPGD, scaling))
    if remembered:
        prompt_BPGD = (key_TGD[None, :remembered], value_TGD[None, :remembered])
    if packing.candidates_BKS.numel():
        asked_BKA = packing.ends_BK[..., None] if ends_only else packing.candidates_BKS
        parts.append(_by_candidates(query_THD, prompt_BPGD, own_TGD, packing, asked_BKA, scaling).flatten(0, 2))
    if not ends_only:
        return torch.cat(parts)[packing.slots_T][None], None
    whole_THD = query_THD.new_zeros(*query_THD.shape[:2], value.shape[-1])
    if parts:
        whole_THD = whole_THD.index_copy(0, packing.ends_N, parts[0][packing.ends_BK.flatten() != PAD])
    return whole_THD[None], None


def _by_candidates(
    query_THD: torch.Tensor,
    prompt_BPGD: tuple[torch.Tensor, torch.Tensor],
    own_TGD: tuple[torch.Tensor, torch.Tensor],
    packing: PackedBatch,
    asked_BKA: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """The candidates' attention, all rows together, on a CPU some candidates after the other: [B, K, A, H, D]."""
    prompts = packing.prompts_BP
    products = query_THD.shape[1] * asked_BKA[:, 0].numel() * prompt_BPGD[0].shape[1]
    together = max(1, PRODUCTS // max(1, products)) if query_THD.device.type == "cpu" else asked_BKA.shape[1]
    found = [
        _candidates(
            query_THD[asked],
            prompt_BPGD,
            (own_TGD[0][places], own_TGD[1][places]),
            prompts == PAD if len(prompts) > 1 else None,  # A row by itself has no padding.
            ((places == PAD)[:, :, None] | (places[:, :, None] > asked[..., None]))[:, None, None],
            scaling,
        )
        for asked, places in zip(
            torch.split(asked_BKA, together, dim=1), torch.split(packing.candidates_BKS, together, dim=1), strict=True
        )
    ]
    return torch.cat(found, dim=1)


def _prompts(
    query_BPHD: torch.Tensor, key_BPGD: torch.Tensor, value_BPGD: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Causal attention of the prompts: [B · P, H, D]. Padding stands last, where no token of a prompt sees it."""
    query, key, value = (states.transpose(1, 2) for states in (query_BPHD, key_BPGD, value_BPGD))
    found = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
    return found.transpose(1, 2).flatten(0, 1)


def _candidates(
    query_BKAHD: torch.Tensor,
    prompt_BPGD: tuple[torch.Tensor, torch.Tensor],
    own_BKSGD: tuple[torch.Tensor, torch.Tensor],
    padding_BP: torch.Tensor | None,
    unseen_B11KAS: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of the candidates to keys and values of their prompts and their own: [B, K, A, H, D]."""
    heads, size = prompt_BPGD[0].shape[2], unseen_B11KAS.shape[-1]
    query_BGQKAD = query_BKAHD.reshape(*query_BKAHD.shape[:3], heads, -1, query_BKAHD.shape[-1]).permute(
        0, 3, 4, 1, 2, 5
    )
    prompt_key_BGDP = prompt_BPGD[0].permute(0, 2, 3, 1)
    prompt_value_BGPD = prompt_BPGD[1].transpose(1, 2)
    own_key_BG1KDS, own_value_BG1KSD = (
        own_BKSGD[0].permute(0, 3, 1, 4, 2)[:, :, None],
        own_BKSGD[1].permute(0, 3, 1, 2, 4)[:, :, None],
    )
    # One product with a prompt's keys for all queries that share them.
    shape = query_BGQKAD.shape[:-1]
    to_prompt = (query_BGQKAD.flatten(2, 4) @ prompt_key_BGDP).reshape(*shape, -1)
    if padding_BP is not None:
        to_prompt = to_prompt.masked_fill(padding_BP[:, None, None, None, None], -torch.inf)
    to_own = query_BGQKAD @ own_key_BG1KDS
    to_own = to_own.masked_fill(unseen_B11KAS, -torch.inf)
    scores = torch.cat([to_prompt, to_own], dim=-1).float() * scaling
    weights = scores.softmax(dim=-1).to(query_BKAHD.dtype)
    on_prompt, on_own = weights[..., :-size], weights[..., -size:]
    found_BGQKAD = (on_prompt.flatten(2, 4) @ prompt_value_BGPD).reshape(*shape, -1) + on_own @ own_value_BG1KSD
    return found_BGQKAD.permute(0, 3, 4, 1, 2, 5).flatten(3, 4)


AttentionInterface.register(NAME, attend)
