"""`attention` on a CPU without gradients, by `attention_cpu.cpp`, which is compiled for the processor at hand.

torch's own attention on a CPU multiplies by MKL, in AVX2 on processors that are not Intel's, and knows no queries with
keys of two kinds. Shape suffixes are those of `attention`.
"""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch

from pulse_ray.ranker.packing import PackedBatch

SOURCE = Path(__file__).with_suffix(".cpp")

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared")

SIZES = 16
"""Dimensions of a head are a multiple of this, which the source's LANES divide."""

log = logging.getLogger(__name__)


class _Packed(ctypes.Structure):
    """`Packed` of the source."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "found", "prompts", "candidates", "ends")),
        *((f"{of}_{stride}", ctypes.c_int64) for of in ("query", "key", "value") for stride in ("token", "head")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "size", "remembered")),
        *((name, ctypes.c_int64) for name in ("rows", "prompt_tokens", "most_candidates", "candidate_tokens")),
        *((name, ctypes.c_int64) for name in ("ends_only", "threads")),
        ("scaling", ctypes.c_float),
    )


@cache
def library(flags: tuple[str, ...] = FLAGS) -> ctypes.CDLL | None:
    """The source, compiled by `CXX`, else `c++`; None, with a warning, where that cannot be done.

    It takes some seconds, once in a process: what is kept in a folder could be another processor's, or another user's.
    """
    compiler = os.environ.get("CXX", "")
    try:
        with tempfile.TemporaryDirectory(prefix="pulse_ray-") as folder:
            built = f"{folder}/attention.so"
            command = [*(shlex.split(compiler) or ["c++"]), *flags, str(SOURCE), "-o", built]
            subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
            return ctypes.CDLL(built)
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        told = str(getattr(error, "stderr", None) or error).strip().splitlines()
        log.warning(
            "torch attends for the ranker, more slowly and with other roundings: '%s' built nothing that loads (%s)",
            compiler or "c++",
            told[-1] if told else "it says nothing",
        )
        return None


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether `attend` is for tensors like these: on a CPU, nothing is trained, and a compiler was there."""
    return (
        query.device.type == "cpu"
        and not torch.is_grad_enabled()
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.dtype == key.dtype == value.dtype
        and query.shape[-1] == value.shape[-1]
        and query.shape[-1] % SIZES == 0
        and library() is not None
    )


def attend(
    query_THD: torch.Tensor,
    key_TGD: torch.Tensor,
    value_TGD: torch.Tensor,
    packing: PackedBatch,
    scaling: float,
    *,
    ends_only: bool,
) -> torch.Tensor:
    """Attention of packed rows that this `serves`: [T, H, D]. It takes as many threads as torch would.

    Args:
        key_TGD: with a prompt that is remembered from before, its keys stand first.
        value_TGD: as `key_TGD`.
        ends_only: others than the last tokens of candidates get zeros.
    """
    compiled = library()
    remembered = len(key_TGD) - len(query_THD)
    assert compiled is not None and not (remembered and packing.prompts_BP.numel())
    states = {
        name: one if one.stride(-1) == 1 else one.contiguous()
        for name, one in (("query", query_THD), ("key", key_TGD), ("value", value_TGD))
    }
    found_THD = (torch.zeros if ends_only else torch.empty)(query_THD.shape, dtype=query_THD.dtype)
    places = {"prompts": packing.prompts_BP, "candidates": packing.candidates_BKS, "ends": packing.ends_BK}
    packed = _Packed(
        **{name: one.data_ptr() for name, one in (states | places | {"found": found_THD}).items()},
        **{f"{name}_token": one.stride(0) for name, one in states.items()},
        **{f"{name}_head": one.stride(1) for name, one in states.items()},
        heads=query_THD.shape[1],
        key_heads=key_TGD.shape[1],
        size=query_THD.shape[2],
        remembered=remembered,
        rows=packing.prompts_BP.shape[0],
        prompt_tokens=packing.prompts_BP.shape[1],
        most_candidates=packing.candidates_BKS.shape[1],
        candidate_tokens=packing.candidates_BKS.shape[2],
        ends_only=ends_only,
        threads=torch.get_num_threads(),
        scaling=scaling,
    )
    work = compiled.attend_bfloat16 if query_THD.dtype is torch.bfloat16 else compiled.attend_float32
    work(ctypes.byref(packed))
    return found_THD
