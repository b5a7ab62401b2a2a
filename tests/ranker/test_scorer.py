"""Any number of candidates: chunks after a remembered prompt give the logits of one packed sequence."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import tiny
import torch

from pulse_ray.config import LoraConfig, RankerConfig, TrainingConfig
from pulse_ray.ranker import model
from pulse_ray.ranker.packing import PackedBatch, TokenRow, chunks
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.ranker.scorer import Scorer
from pulse_ray.schema import History, Interaction, Item

KINDS = ("Soap", "Balm for dry hands", "Kit", "Crème № 5, refillable glass jar")
ITEMS = {f"i{n}": Item(item_id=f"i{n}", title="", text=f"{KINDS[n % len(KINDS)]} {n}") for n in range(300)}
WHOLE = 100_000
"""A budget that every row fits into."""


def row(candidates: int, steps: int = 4, user: str = "u") -> RankRow:
    history = tuple(
        Interaction(item_id=f"i{7 * n}", timestamp=n, rating=4.0, review="just right") for n in range(steps)
    )
    return RankRow(
        history=History(example_id=f"d/{user}/9", domain="d", user_id=user, interactions=history),
        reason="They want fragrance-free care.",
        candidates=tuple(ITEMS.values())[:candidates],
    )


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    folder = tmp_path_factory.mktemp("ranker")
    config = RankerConfig(
        model=str(tiny.make(folder / "base")), lora=LoraConfig(r=4), training=TrainingConfig(precision="fp32")
    )
    torch.manual_seed(1)
    made = model.create(config)
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "score" in name:  # zero at the start, or too small for the logits to differ
            torch.nn.init.normal_(parameter, std=0.5)
    model.save(made, folder / "adapter", config)
    return Scorer(folder / "adapter", config, {"d": ITEMS})


@pytest.mark.parametrize("candidates", [3, 40, 300])
def test_chunks_give_the_logits_of_one_sequence(scorer: Scorer, candidates: int) -> None:
    ranked = row(candidates)
    [whole] = scorer.score([ranked], WHOLE)
    assert whole.shape == (candidates,)
    assert whole.std() > 0.1
    for token_budget in (1, 64, 500):
        [cut] = scorer.score([ranked], token_budget)
        np.testing.assert_allclose(cut, whole, atol=1e-4, rtol=0)


def test_long_rows_short_rows_and_rows_without_candidates_go_together(scorer: Scorer) -> None:
    rows = [row(300, user="a"), row(3, user="b"), row(0, user="c"), row(40, 1, user="d"), row(3, 9, user="e")]
    alone = [scorer.score([one], WHOLE)[0] for one in rows]
    together = scorer.score(rows, 600)
    assert [len(logits) for logits in together] == [300, 3, 0, 40, 3]
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4, rtol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU makes one pass at a time")
@pytest.mark.parametrize(
    ("threads", "token_budget", "expected"),
    [
        (1, 900, {1: 1}),
        (2, 900, {1: 2}),
        (3, 900, {1: 3}),
        (12, 6144, {2: 6}),
        (12, 500, {6: 2}),  # Rows have up to 200 tokens.
    ],
)
def test_passes_at_once_change_nothing(
    scorer: Scorer, threads: int, token_budget: int, expected: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Args:
    expected: by the threads of a pass, how many went on at once.
    """
    rows = [row(3 + number % 6, user=str(number)) for number in range(60)]
    alone = [scorer.score([one], WHOLE)[0] for one in rows]
    seen: dict[int, set[int]] = {}
    forward = model.PackedRanker.forward

    def spied(ranker: model.PackedRanker, batch: PackedBatch) -> torch.Tensor:
        seen.setdefault(torch.get_num_threads(), set()).add(threading.get_ident())
        return forward(ranker, batch)

    monkeypatch.setattr(model.PackedRanker, "forward", spied)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for one, other in zip(alone, scorer.score(rows, token_budget), strict=True):
            np.testing.assert_allclose(other, one, atol=1e-4, rtol=0)
        apart = {count: len(own) for count, own in seen.items() if threading.main_thread().ident not in own}
        assert apart.keys() == (expected.keys() if threads > 1 else set())
        assert all(1 < count <= expected[each] for each, count in apart.items())
        unknown = TokenRow(prompt=[10**9], candidates=[[1], [2]])
        with pytest.raises(IndexError):
            scorer.score_tokens([scorer.encode(one) for one in rows] + [unknown], token_budget)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_chunks_keep_order_and_budget() -> None:
    lengths = [3, 5, 9, 1, 1, 1, 4]
    candidates = [[number] * length for number, length in enumerate(lengths)]
    pieces = list(chunks(TokenRow(prompt=[0, 0], candidates=candidates), 8))
    assert [one for piece in pieces for one in piece.candidates] == candidates
    assert [[len(one) for one in piece.candidates] for piece in pieces] == [[3, 5], [9], [1, 1, 1, 4]]
    assert not any(piece.prompt for piece in pieces)
