"""SASRec: what its states may depend on, its losses, its positions, and how a batch is laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pulse_ray.candidates import sasrec
from pulse_ray.candidates.losses import FullSoftmax
from pulse_ray.candidates.sasrec import Layout, Sasrec, rotate
from pulse_ray.config import SasrecConfig

LOSSES = ("sampled_softmax", "full_softmax", "gbce")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def made(items: int = 20, max_length: int = 6, **settings: Any) -> Sasrec:
    torch.manual_seed(0)
    return Sasrec(SasrecConfig(**settings), [("d", str(number)) for number in range(items)], max_length)


def random_sequences(lengths: list[int], items: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, items + 1, length).tolist() for length in lengths]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_it_is_causal_ignores_its_batch_and_survives_saving(tmp_path: Path, positions: str) -> None:
    model = made(dim=16, positions=positions).eval()
    one, two, none = model.states([[1, 2, 3], [4, 5, 6, 7, 8], []])
    np.testing.assert_allclose(one, model.states([[1, 2, 3]])[0], **CLOSE)
    layout = Layout.of(torch.tensor([6]))
    every = model.encode(torch.tensor([4, 5, 6, 7, 8, 9]), layout).detach()
    np.testing.assert_allclose(two, every[4], **CLOSE)
    assert not np.allclose(model.states([[5, 4, 6, 7, 8]])[0], two, **CLOSE), "the order of items changed nothing"
    np.testing.assert_allclose(model.states([[9, 9, 1, 2, 3, 4, 5, 6]]), model.states([[1, 2, 3, 4, 5, 6]]), **CLOSE)
    assert np.isfinite(none).all()
    model.save(tmp_path)
    np.testing.assert_allclose(Sasrec.load(tmp_path).states([[1, 2, 3]])[0], one, **CLOSE)


def test_rotary_scores_depend_on_distance_alone() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(8).expand(9, 8), torch.randn(8).expand(9, 8)
    scores_LL = rotate(query) @ rotate(key).T
    for distance in range(-8, 9):
        diagonal = scores_LL.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert scores_LL.diagonal(1)[0] != pytest.approx(float(scores_LL.diagonal(4)[0]), rel=1e-3)


@pytest.mark.parametrize("loss", LOSSES)
def test_padding_changes_neither_loss_nor_gradient(loss: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(items=40, max_length=16, dim=16, dropout=0.0, loss=loss)
    negatives = torch.tensor([3, 8, 21, 40])
    rows = model.pad(random_sequences([2, 17, 3, 9, 2, 5, 1, 12], items=40), extra=1)
    assert len(Layout.of((rows != 0).sum(1) - 1).groups) > 2
    grouped = model(rows, negatives)
    grouped.sum().backward()
    slopes = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    monkeypatch.setattr(sasrec, "GROUP_RATIO", 100)
    assert len(Layout.of((rows != 0).sum(1) - 1).groups) == 1
    together = model(rows, negatives)
    together.sum().backward()
    torch.testing.assert_close(grouped, together)
    assert grouped[6] == 0, "a single item is followed by nothing"
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(slopes[name], parameter.grad, rtol=1e-4, atol=1e-5)


def test_full_softmax_is_a_sampled_one_with_all_items() -> None:
    full, sampled = (made(items=40, dim=16, dropout=0.0, loss=loss) for loss in ("full_softmax", "sampled_softmax"))
    rows = full.pad(random_sequences([2, 7, 3, 5], items=40), extra=1)
    losses = [full(rows), sampled(rows, torch.arange(1, 41))]
    torch.testing.assert_close(losses[0], losses[1])
    for loss in losses:
        loss.mean().backward()
    for (name, one), two in zip(full.named_parameters(), sampled.parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-4, atol=1e-6)


def test_full_softmax_in_chunks_is_cross_entropy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pulse_ray.candidates.losses.CHUNK_LOGITS", 3 * 30)
    torch.manual_seed(0)
    states = torch.randn(10, 8, dtype=torch.float64, requires_grad=True)
    items = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(30, (10,))
    wanted = torch.nn.functional.cross_entropy(states @ items.T, targets, reduction="none")
    slopes = torch.autograd.grad(wanted.mean(), (states, items))
    found = FullSoftmax.apply(states, items, targets)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(torch.autograd.grad(found.mean(), (states, items)), slopes, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    with pytest.raises(AssertionError, match="weight"):
        (FullSoftmax.apply(states, items, targets) * torch.arange(10)).sum().backward()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("loss", LOSSES)
def test_it_learns_a_cycle(loss: str, positions: str) -> None:
    model = made(items=12, max_length=8, dim=32, dropout=0.0, loss=loss, positions=positions)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    rows = [[(start + step) % 12 + 1 for step in range(3 + start % 6)] for start in range(12)]
    for _ in range(150):
        optimizer.zero_grad()
        model(model.pad(rows), torch.randint(1, 13, (6,))).mean().backward()
        optimizer.step()
    model.eval()
    best = model.logits(model.states([[3, 4, 5], [11, 12]])).argmax(1)
    assert best.tolist() == [6, 1]


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("loss", LOSSES)
def test_bf16_weights_give_nearly_the_same_loss(loss: str, positions: str) -> None:
    model = made(items=40, dim=16, dropout=0.0, loss=loss, positions=positions)
    rows, negatives = model.pad(random_sequences([2, 7, 3, 5], items=40), extra=1), torch.tensor([3, 8, 21, 40])
    exact = model(rows, negatives)
    rounded = model.bfloat16()(rows, negatives)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0.03, atol=0.0)
    rounded.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
