"""Layers whose float32 products and masks cost less on a CPU than torch's own. Their weights and names stay the same.

torch multiplies by MKL, which uses AVX2 at most on processors that are not Intel's; oneDNN, which torch has aboard for
its compiler, uses what there is. And torch draws a random number for each element that dropout may leave out, one after
the other; here one serves four.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

PARTS = 2**16
"""A share of elements to leave out is rounded to a multiple of one in so many."""

MALLOPT = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1)}
"""Of glibc, by name: the number of a setting, and what it is set to. Arenas of other threads give memory back, too."""


class Linear(nn.Linear):
    """A linear layer by oneDNN, in training too. What is no float32 on a CPU goes torch's way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[…, in] → […, out]."""
        low = x.dtype is not torch.float32 or self.weight.dtype is not torch.float32 or torch.is_autocast_enabled("cpu")
        if low or x.device.type != "cpu" or x.dim() < 2 or not x.numel():
            return super().forward(x)
        if not torch.is_grad_enabled():
            return _product(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)  # type: ignore[no-any-return,no-untyped-call]


class Dropout(nn.Dropout):
    """Dropout with cheaper draws. They are others than torch's for the same seed, and never in place."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The same shape."""
        return dropout(x, self.p) if self.training and x.device.type == "cpu" else super().forward(x)


def dropout(x: torch.Tensor, share: float) -> torch.Tensor:
    """Leaves out a share of the elements, drawn with torch's generator, and scales the others up."""
    left_out = round(share * PARTS)
    if left_out == 0:
        return x
    words = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].view(x.shape) >= left_out - PARTS // 2
    return x * kept * (PARTS / (PARTS - left_out) if left_out < PARTS else 0.0)


def quicken(module: nn.Module) -> None:
    """Makes the plain linear layers and dropouts of a module the ones of here, if there is no GPU."""
    if torch.cuda.is_available() or not _has_onednn():
        return
    for one in module.modules():
        if type(one) is nn.Linear:
            one.__class__ = Linear
        elif type(one) is nn.Dropout:
            one.__class__ = Dropout


def keep_memory() -> None:
    """Lets this process keep the memory that large tensors leave for those that follow, where its C library is glibc.

    By default they give it back to the system and ask for it again, page by page, in every layer. Arenas that threads
    have already stay as they are.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for option, value in MALLOPT.values():
            set_option(option, value)


class _Linear(torch.autograd.Function):
    """Products as torch's compiler asks oneDNN for them."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = slope.flatten(0, -2)
        return (
            _product(slope, weight.t()) if for_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


def _has_onednn() -> bool:
    return bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
