"""Texts that follow each other in one sequence, so that an encoder computes nothing for padding.

Only attention looks from token to token, and it is one of transformers' attention functions here: each text attends to
itself, as it would in a batch of its own. Poolings of sentence-transformers read such a sequence by `cu_seq_lens_q`.

Shape suffixes: B texts, L tokens of the longest, T tokens of all.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Transformer
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pulse_ray import cpu

NAME = "pulse_ray_texts"
"""Of the function in transformers' registry."""

PROBES = ("One text.", "And another, which has rather more words than the first.")
CLOSE = 1e-4

PIECE_TOKENS = 2048
"""Tokens of a sequence, at most, unless one text alone has more: activations of longer ones leave a CPU's cache."""


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    text_lengths: list[int] | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of every text to itself: [1, T, H, D], and no weights. Without `text_lengths` it is transformers' sdpa.

    A product for each text beats one under a mask on a CPU, where what it computes then stays in the cache; on a GPU
    so many small ones would not.

    Args:
        query: [1, H, T, D].
        key: as `query`, of as many heads as the model has for keys.
        value: as `key`.
        text_lengths: tokens of each text; their sum is T.
    """
    if text_lengths is None:
        found: torch.Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **given)[0]
        return found, None
    texts = zip(*(torch.split(states, text_lengths, dim=2) for states in (query, key, value)), strict=True)
    alike = query.shape[1] == key.shape[1] and not getattr(module, "is_causal", True)
    one: Callable[..., Any] = _with_dropout if given.get("dropout") and alike else sdpa_attention_forward
    return torch.cat([one(module, *text, None, **given)[0] for text in texts], dim=1), None


def _with_dropout(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    dropout: float,
    scaling: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each token to all of its text, some weights left out: torch's own would draw them one by one."""
    weights = (query @ key.transpose(2, 3) * (scaling or query.shape[-1] ** -0.5)).softmax(-1)
    return (cpu.dropout(weights, dropout) @ value).transpose(1, 2), None


def pieces(features: dict[str, torch.Tensor], first_position: int) -> list[dict[str, Any]]:
    """Features of padded texts, each [B, L], as sequences of some of the texts, each [1, at most `PIECE_TOKENS`]."""
    lengths = features["attention_mask"].sum(1).tolist()
    starts, room = list[int](), 0
    for text, length in enumerate(lengths):
        if length > room:
            starts.append(text)
            room = PIECE_TOKENS
        room -= length
    return [
        flattened({name: value[start:end] for name, value in features.items()}, first_position)
        for start, end in pairwise([*starts, len(lengths)])
    ]


def flattened(features: dict[str, torch.Tensor], first_position: int) -> dict[str, Any]:
    """Features of padded texts, each [B, L], without their padding: each [1, T]."""
    kept_BL = features["attention_mask"].bool()
    lengths_B = kept_BL.sum(1)
    flat: dict[str, Any] = {
        name: value[kept_BL][None]
        for name, value in features.items()
        if name != "attention_mask" and value.shape == kept_BL.shape
    }
    positions_BL = kept_BL.cumsum(1) - 1 + first_position
    return flat | {
        "position_ids": positions_BL[kept_BL][None],
        "cu_seq_lens_q": F.pad(lengths_B.cumsum(0), (1, 0)),
        "text_lengths": lengths_B.tolist(),
    }


def first_position(tower: SentenceTransformer) -> int | None:
    """The position of a text's first token if the tower can read flat texts, and None if it cannot.

    It can if it asks transformers' registry for attention and gives two texts the vectors that they have when padded;
    models that add something of their own to attention do not. From here on it computes its attention by `attend`.
    """
    if tower.device.type != "cpu" or not isinstance(tower[0], Transformer):
        return None
    model = tower[0].auto_model
    if not getattr(model, "is_backend_compatible", bool)():
        return None
    model.set_attn_implementation(NAME)
    # RoBERTa and its descendants count positions from behind the padding token.
    tables = (module for name, module in model.named_modules() if name.endswith("position_embeddings"))
    pads = (getattr(table, "padding_idx", None) for table in tables)
    first = next((pad + 1 for pad in pads if pad is not None), 0)
    features = {name: value for name, value in tower.preprocess(list(PROBES)).items() if torch.is_tensor(value)}
    training = tower.training
    tower.eval()
    with torch.inference_mode():
        padded_BD, flat_BD = (
            tower(dict(inputs))["sentence_embedding"] for inputs in (features, flattened(features, first))
        )
    tower.train(training)
    return first if torch.allclose(padded_BD, flat_BD, atol=CLOSE * float(padded_BD.abs().max())) else None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
