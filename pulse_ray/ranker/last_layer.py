"""The last decoder layer for the ends of candidates alone, as nothing else goes on to the head.

Keys and values are computed for every token, and what follows from them for one token of each candidate: attention,
its output projection and the MLP. Of a layer's work that leaves a sixth, and of L layers' L - 1 and a sixth.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import nn

from pulse_ray.ranker.packing import PackedBatch

MARK = "pulse_ray_ends_only"
"""Attribute of the attention module of such a layer."""


class _Pass(threading.local):
    """The batch that a thread's pass is about; None for one that is not packed."""

    batch: PackedBatch | None = None


def shorten(decoder: nn.Module) -> None:
    """Lets the last layer of a decoder compute for ends alone, if it is made as Llama's is. Others stay as they are."""
    layer: Any = list(getattr(decoder, "layers", [None]))[-1]
    attention: Any = getattr(layer, "self_attn", None)
    mlp: Any = getattr(layer, "mlp", None)
    if not hasattr(attention, "o_proj") or not hasattr(mlp, "down_proj"):
        return
    under_way = _Pass()

    def begin(_: nn.Module, __: Any, given: dict[str, Any]) -> None:
        under_way.batch = given.get("packing")

    def take(_: nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        batch = under_way.batch
        return given if batch is None else (given[0][:, batch.ends_N], *given[1:])

    def put(_: nn.Module, __: Any, found: torch.Tensor) -> torch.Tensor:
        batch = under_way.batch
        if batch is None:
            return found
        return found.new_zeros(1, len(batch.slots_T), found.shape[-1]).index_copy(1, batch.ends_N, found)

    layer.register_forward_pre_hook(begin, with_kwargs=True)
    for module in (attention.o_proj, mlp):
        module.register_forward_pre_hook(take)
        module.register_forward_hook(put)
    setattr(attention, MARK, True)
