"""Texts without padding: the vectors and gradients of padded ones, or no flat texts at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    MPNetConfig,
    MPNetModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)

from pulse_ray import models
from pulse_ray.thought_space import flat
from pulse_ray.thought_space.encoders import Encoders, Features

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXTS = ["tea", "they like unscented hand cream " * 6, "they moved on from black tea to green tea"]


def _tower(folder: Path, kind: str) -> Encoders:
    tokenizer = AutoTokenizer.from_pretrained(models.resolve(tiny.ENCODER_TOKENIZER))
    torch.manual_seed(0)
    words = {"vocab_size": len(tokenizer)}
    made: dict[str, PreTrainedModel] = {
        "bert": BertModel(BertConfig(**words, **SIZES)),
        "roberta": RobertaModel(RobertaConfig(**words, **SIZES, pad_token_id=tokenizer.pad_token_id)),
        "distilbert": DistilBertModel(DistilBertConfig(**words, dim=32, hidden_dim=64, n_layers=2, n_heads=2)),
        "mpnet": MPNetModel(MPNetConfig(**words, **SIZES, pad_token_id=tokenizer.pad_token_id)),
    }
    made[kind].save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Encoders.create(str(folder), 64, shared=True).eval()


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert"])
def test_flat_texts_have_the_vectors_and_gradients_of_padded_ones(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoders = _tower(tmp_path, kind)
    padded = {k: v for k, v in encoders.rationale.preprocess(TEXTS).items() if isinstance(v, torch.Tensor)}
    given = encoders.tokens("rationale", TEXTS)
    tokens = int(padded["attention_mask"].sum())
    assert [piece["input_ids"].shape for piece in given] == [(1, tokens)]
    monkeypatch.setattr(flat, "PIECE_TOKENS", tokens - 1)
    cut = encoders.tokens("rationale", TEXTS)
    assert [len(piece["text_lengths"]) for piece in cut] == [2, 1]
    weights = [weight for weight in encoders.rationale.parameters() if weight.requires_grad]
    towards = torch.randn(len(TEXTS), 32, generator=torch.Generator().manual_seed(0))

    def vectors_and_gradients(features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        vectors_BD, _ = encoders(features, features)
        found = torch.autograd.grad((vectors_BD * towards).sum(), weights, allow_unused=True)
        return vectors_BD.detach(), torch.cat([one.flatten() for one in found if one is not None])

    expected, slopes = vectors_and_gradients([padded])
    for pieces in (given, cut):
        vectors, flat_slopes = vectors_and_gradients(pieces)
        torch.testing.assert_close(vectors, expected, atol=1e-6, rtol=0)
        assert (flat_slopes - slopes).norm() < 1e-5 * slopes.norm()


def test_a_model_whose_attention_knows_places_reads_padded_texts(tmp_path: Path) -> None:
    encoders = _tower(tmp_path, "mpnet")
    assert flat.first_position(encoders.rationale) is None
    (padded,) = encoders.tokens("rationale", TEXTS)
    assert padded["attention_mask"].shape[0] == len(TEXTS)


@pytest.mark.parametrize(("causal", "key_heads"), [(False, 4), (True, 4), (False, 2)])
def test_dropout_of_attention_is_right_in_the_mean(causal: bool, key_heads: int) -> None:
    torch.manual_seed(0)
    module = nn.Module()
    module.is_causal, module.num_key_value_groups = causal, 4 // key_heads
    query, key, value = (torch.randn(1, heads, 8, 16) for heads in (4, key_heads, key_heads))
    given = {"text_lengths": [3, 5], "scaling": 0.3}

    def mean(**more: Any) -> torch.Tensor:
        draws = [flat.attend(module, query, key, value, None, **given, **more)[0] for _ in range(2000)]
        assert more or torch.equal(draws[0], draws[1])
        assert not more or not torch.equal(draws[0], draws[1])
        return torch.stack(draws).mean(0)

    # Of a mean of 2,000 draws the standard error is 0.02 here.
    torch.testing.assert_close(mean(dropout=0.3), mean(), atol=0.15, rtol=0)
