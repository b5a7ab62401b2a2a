"""Layers for CPUs: torch's results, and dropout that leaves out what it should."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from pulse_ray import cpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="layers for machines without a GPU")


@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (0, 24)])
@pytest.mark.parametrize("bias", [False, True])
def test_products_and_gradients_are_torchs(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(24, 40, bias=bias)
    quick = nn.Linear(24, 40, bias=bias)
    quick.load_state_dict(plain.state_dict())
    cpu.quicken(quick)
    assert type(quick) is cpu.Linear and isinstance(quick, nn.Linear)
    found = []
    for layer in (plain, quick):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        layer(x).pow(2).sum().backward()
        found.append([layer(x).detach(), x.grad, *(weight.grad for weight in layer.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_frozen_weights_keep_no_inputs_and_other_precisions_go_torchs_way() -> None:
    layer = nn.Linear(8, 8)
    cpu.quicken(layer)
    layer.requires_grad_(False)
    x = torch.randn(3, 8, requires_grad=True)
    kept = list[torch.Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        layer(x)
    assert [one.shape for one in kept] == [layer.weight.shape]
    assert layer(x[0]).shape == (8,)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    low = layer.bfloat16()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        found = low(x.bfloat16())
    assert found.dtype is torch.bfloat16 and type(found.grad_fn).__name__ != "_LinearBackward"


def test_dropout_leaves_out_its_share_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    layer = nn.Dropout(0.1)
    cpu.quicken(layer)
    assert type(layer) is cpu.Dropout
    x = torch.ones(1001, 1003, requires_grad=True)
    kept = layer(x)
    kept.sum().backward()
    assert x.grad is not None and torch.equal(x.grad, kept), "the gradient passes where the elements passed"
    assert kept.unique().tolist() == [0.0, pytest.approx(1 / 0.9, rel=1e-4)]
    for dim in (0, 1):  # A share of 1,000 is within five standard errors of 0.1, and draws are not repeated.
        shares = (kept == 0).float().mean(dim)
        assert shares.min() > 0.05 and shares.max() < 0.15
    assert (kept == 0).float().mean() == pytest.approx(0.1, abs=0.002)
    assert not torch.equal(layer(x), kept)
    torch.manual_seed(0)
    assert torch.equal(layer(x), kept), "the seed decides"
    assert torch.equal(layer.eval()(x), x)
    assert not cpu.dropout(x, 1.0).any() and torch.equal(cpu.dropout(x, 0.0), x)


FAULTS = """
import resource, threading, torch
from pulse_ray import cpu
if {keep}:
    cpu.keep_memory()
def work():
    for _ in range(20):
        torch.ones(2**22) + torch.ones(2**21).repeat(2)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(min(faults() for _ in range(4)))  # Until all has been taken that is needed.
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_memory_that_tensors_leave_is_kept() -> None:
    faults = {
        keep: int(subprocess.check_output([sys.executable, "-c", FAULTS.format(keep=keep)])) for keep in (True, False)
    }
    assert faults[True] < faults[False] / 10
