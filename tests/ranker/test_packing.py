"""Packed rows: equal to separate sequences, and to plain text in plain transformers + PEFT."""

from __future__ import annotations

import copy
import math
import platform
import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pulse_ray.config import RankerConfig, TrainingConfig
from pulse_ray.errors import ArtifactError
from pulse_ray.ranker import attention, attention_cpu, last_layer, model
from pulse_ray.ranker.packing import ANSWER_TOKENS, PackedBatch, PromptEncoder, TokenRow, budgeted, pack
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.ranker.scorer import Scorer
from pulse_ray.schema import History, Interaction, Item

TITLES = [
    "Oat Soap, Fragrance-Free",
    "Rose Soap",
    "3-in-1 Travel Kit",
    "“Quoted” Balm (2 oz)",
    "a",
    "Ünïcode Crème № 5",
]
ITEMS = {f"i{n}": Item(item_id=f"i{n}", title=title, text=title) for n, title in enumerate(TITLES)}
LONG = Item(item_id="long", title="long", text="very long name " * 20)


def row(history: int = 3, reason: str | None = "They want fragrance-free care.", candidates: int = 5) -> RankRow:
    steps = tuple(
        Interaction(item_id=f"i{n % 6}", timestamp=n, rating=4.0, review="ends </s> <|im_end|> here")
        for n in range(history)
    )
    chosen = (*list(ITEMS.values())[: candidates - 1], LONG)
    return RankRow(
        history=History(example_id="d/u/9", domain="d", user_id="u", interactions=steps),
        reason=reason,
        candidates=chosen,
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RankerConfig:
    """Of a small model: whether rows are equal is a matter of masks and positions, not of size."""
    base = tiny.make(tmp_path_factory.mktemp("base"))
    return RankerConfig(model=str(base), training=TrainingConfig(precision="fp32"), candidate_tokens=12)


@pytest.fixture(scope="module")
def ranker(config: RankerConfig) -> model.PackedRanker:
    return create(config)


def create(config: RankerConfig) -> model.PackedRanker:
    torch.manual_seed(0)
    made = model.create(config).eval()
    for name, parameter in made.named_parameters():
        if "lora_B" in name or "score" in name:  # zero at the start, or too small for the logits to differ
            torch.nn.init.normal_(parameter, std=0.5)
    return made


@pytest.fixture(scope="module")
def encoder(config: RankerConfig) -> PromptEncoder:
    return PromptEncoder(model.tokenizer(config.model), config)


@contextmanager
def plain_attention(ranker: model.PackedRanker) -> Iterator[None]:
    """transformers' own attention inside of it."""
    ranker.model.get_base_model().set_attn_implementation("sdpa")
    yield
    ranker.model.get_base_model().set_attn_implementation(attention.NAME)


def one_by_one(ranker: model.PackedRanker, tokens: TokenRow) -> torch.Tensor:
    """One sequence per candidate, through the model's own forward."""
    return torch.stack([ranker.model(torch.tensor([tokens.prompt + c])).logits[0, 0] for c in tokens.candidates])


def separate(ranker: model.PackedRanker, tokens: TokenRow) -> torch.Tensor:
    """One sequence per candidate, as transformers has them."""
    with plain_attention(ranker):
        return one_by_one(ranker, tokens)


@pytest.mark.parametrize("way", ["compiled", "torch", "torch, by candidates"])
@torch.no_grad()
def test_packed_logits_equal_separate_ones(
    way: str, ranker: model.PackedRanker, encoder: PromptEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    attended: list[bool] = []
    compiled = attention_cpu.attend
    monkeypatch.setattr(
        attention_cpu, "attend", lambda *given, **more: attended.append(True) or compiled(*given, **more)
    )
    if way != "compiled":
        monkeypatch.setattr(attention_cpu, "library", lambda: None)
    if way == "torch, by candidates":
        monkeypatch.setattr(attention, "PRODUCTS", 1)
    rows = [row(1), row(6, reason=None, candidates=3), row(4)]
    tokens = [encoder.encode(entry, ITEMS) for entry in rows]
    packed = ranker(pack(tokens))
    assert bool(attended) == (way == "compiled")
    assert packed[1, 3:].tolist() == [-math.inf] * 2
    for logits, entry in zip(packed, tokens, strict=True):
        expected = separate(ranker, entry)
        assert expected.std() > 0.1, "nothing to tell apart"
        torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("architecture", "settings"),
    [
        ("llama", {"num_attention_heads": 4, "num_key_value_heads": 2}),
        ("phi3", {"sliding_window": 2048}),
        ("qwen2", {}),
        ("qwen3", {"head_dim": 32}),
        ("mistral", {"head_dim": 32, "sliding_window": 2048}),
        ("gemma", {"head_dim": 32}),
        ("gemma3_text", {"head_dim": 32, "sliding_window": 2048, "query_pre_attn_scalar": 32}),
    ],
)
@torch.no_grad()
def test_architectures_rank_as_they_would_with_separate_sequences(
    architecture: str, settings: dict[str, Any], config: RankerConfig, encoder: PromptEncoder, tmp_path: Path
) -> None:
    ranker = create(config.model_copy(update={"model": str(tiny.make(tmp_path, architecture, **settings))}))
    tokens = encoder.encode(row(3), ITEMS)
    expected = separate(ranker, tokens)
    assert expected.std() > 0.01, "nothing to tell apart"
    torch.testing.assert_close(ranker(pack([tokens]))[0], expected, atol=1e-4, rtol=0)
    prompt = ranker.remember(pack([TokenRow(prompt=tokens.prompt, candidates=[])]))
    for _ in range(2):
        later = ranker.score_after(prompt, pack([TokenRow(prompt=[], candidates=tokens.candidates)]))
        torch.testing.assert_close(later[0], expected, atol=1e-4, rtol=0)


# A processor has the registers of those before it, but for ARM's, which have one kind.
@pytest.fixture(params=["", *(["-mno-avx512f", "-mno-avx"] if platform.machine() == "x86_64" else [])])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiled attention, for wide registers and for narrow ones."""
    library = attention_cpu.library((*attention_cpu.FLAGS, *request.param.split()))
    assert library is not None
    monkeypatch.setattr(attention_cpu, "library", lambda: library)


SIZES = [(170, [5, 1, 9]), (3, [4]), (0, [2, 2]), (40, [])]
"""Of rows: tokens of the prompt, and of each candidate."""
BATCH = pack([TokenRow(prompt=[0] * prompt, candidates=[[0] * own for own in owns]) for prompt, owns in SIZES])
TOKENS = len(BATCH.slots_T)


def states(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values, views of one tensor, whose scores are far apart, as a trained model's are."""
    drawn = 2 * torch.randn(1, TOKENS, 4 + 2 + 2, 96, generator=torch.Generator().manual_seed(0))
    drawn[0, 7, 0] *= 50  # Some are so far apart that weights are zero.
    query, key, value = drawn.to(dtype).transpose(1, 2).split([4, 2, 2], dim=1)
    return query, key, value


def attended(*given: torch.Tensor, packing: PackedBatch = BATCH, ends_only: bool = False) -> torch.Tensor:
    """Compiled attention to keys and values: [tokens, heads, dimensions]."""
    module = torch.nn.Identity()
    setattr(module, last_layer.MARK, ends_only)
    assert attention_cpu.serves(*given)
    return attention.attend(module, *given, None, packing=packing, scaling=96**-0.5)[0][0]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_compiled_attention_is_as_exact_as_torchs_under_a_mask(dtype: torch.dtype) -> None:
    prompts = [(number, -1) for number, (prompt, _) in enumerate(SIZES) for _ in range(prompt)]
    owns = [(number, k) for number, (_, owns) in enumerate(SIZES) for k, own in enumerate(owns) for _ in range(own)]
    row_T, own_T = torch.tensor(prompts + owns).T
    seen = (row_T[:, None] == row_T) & ((own_T[None] == -1) | (own_T[:, None] == own_T))
    seen &= torch.ones_like(seen).tril()
    query, key, value = states(dtype)
    right = F.scaled_dot_product_attention(
        query.double(), key.double(), value.double(), attn_mask=seen, enable_gqa=True
    )

    def lost(found_HTD: torch.Tensor) -> float:
        return float((found_HTD.double() - right[0]).square().mean().sqrt())

    found = attended(query, key, value)
    assert found.dtype is dtype
    torchs = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True)
    assert lost(found.transpose(0, 1)) < 1.2 * lost(torchs[0])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_compiled_attention_of_a_part_is_that_part_of_the_whole(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = states(dtype)
    whole = attended(query, key, value)
    ends = attended(query, key, value, ends_only=True)
    assert torch.equal(ends[BATCH.ends_N], whole[BATCH.ends_N])
    assert ends.count_nonzero(0).max() == len(BATCH.ends_N)

    prompt, owns = SIZES[0]
    places = torch.arange(sum(one for one, _ in SIZES), TOKENS)[: sum(owns)]
    row = [one[:, :, torch.cat([torch.arange(prompt), places])] for one in (key, value)]
    later = pack([TokenRow(prompt=[], candidates=[[0] * own for own in owns])])
    assert torch.equal(attended(query[:, :, places], *row, packing=later), whole[places])

    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(attended(query, key, value), whole)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@torch.no_grad()
def test_what_is_not_finite_reaches_no_other_row_or_candidate(bad: float, dtype: torch.dtype) -> None:
    query, key, value = (one.clone() for one in states(dtype))
    whole = attended(query, key, value)
    candidate = BATCH.candidates_BKS[0, 2]  # The longest, so without padding.
    for spoilt in (key, value):
        spoilt[:, :, candidate[0]] = bad
        found = attended(query, key, value)
        assert not found[candidate].isfinite().any()
        others = torch.ones(TOKENS, dtype=torch.bool).index_fill(0, candidate, False)
        assert torch.equal(found[others], whole[others])
    key, value = states(dtype)[1:]
    query[0, 1, 100, 7] = bad
    differ = (attended(query, key, value) != whole).any(-1)
    assert differ.nonzero().tolist() == [[100, 1]]


@pytest.mark.parametrize("compiler", ["no-such-compiler -v", "false", "'"])
@torch.no_grad()
def test_without_a_compiler_torch_attends(
    compiler: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given = states(torch.float32)
    right = attended(*given)
    monkeypatch.setenv("CXX", compiler)
    library = cache(attention_cpu.library.__wrapped__)
    monkeypatch.setattr(attention_cpu, "library", library)
    for _ in range(2):
        assert not attention_cpu.serves(*given)
        by_torch, _ = attention.attend(torch.nn.Identity(), *given, None, packing=BATCH, scaling=96**-0.5)
        torch.testing.assert_close(by_torch[0], right, atol=1e-5, rtol=1e-5)
    (warning,) = caplog.messages
    assert "\n" not in warning
    assert f"more slowly and with other roundings: '{compiler}' built nothing that loads" in warning


@torch.no_grad()
def test_neither_packing_nor_merging_costs_precision_in_bf16(
    ranker: model.PackedRanker, config: RankerConfig, encoder: PromptEncoder, tmp_path: Path
) -> None:
    low = copy.deepcopy(ranker).bfloat16()
    exact = copy.deepcopy(low).float()
    half = config.model_copy(update={"training": TrainingConfig(precision="bf16")})
    model.save(low, tmp_path, half)
    merged = model.load(tmp_path, half)
    lost = {"packed": torch.zeros(()), "merged": torch.zeros(()), "separate": torch.zeros(())}
    for history in range(1, 9):
        tokens = encoder.encode(row(history), ITEMS)
        right = separate(exact, tokens)
        lost["packed"] += ((low(pack([tokens]))[0] - right) ** 2).sum()
        lost["merged"] += ((merged(pack([tokens]))[0] - right) ** 2).sum()
        lost["separate"] += ((separate(low, tokens) - right) ** 2).sum()
    assert 0 < lost["packed"] < 1.5 * lost["separate"]
    assert 0 < lost["merged"] < 1.5 * lost["separate"]


@pytest.mark.parametrize(
    ("architecture", "settings", "cause"),
    [
        ("gemma2", {"head_dim": 32}, r"Gemma2Attention has an attention of its own \(softcap\)"),
        ("mistral", {"head_dim": 32, "sliding_window": 520}, "rows of 528 tokens: it sees 520 at a time"),
        ("qwen3_next", {"head_dim": 32}, "recurrent or other special layers"),
    ],
)
@torch.no_grad()
def test_what_packing_would_change_is_refused(
    architecture: str,
    settings: dict[str, Any],
    cause: str,
    config: RankerConfig,
    encoder: PromptEncoder,
    tmp_path: Path,
) -> None:
    base = str(tiny.make(tmp_path, architecture, **settings))
    with pytest.raises(ArtifactError, match=cause):
        create(config.model_copy(update={"model": base}))(pack([encoder.encode(row(3), ITEMS)]))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_separate_ones(
    checkpointing: bool, config: RankerConfig, encoder: PromptEncoder
) -> None:
    lora = config.lora.model_copy(update={"dropout": 0.0})
    ranker = create(config.model_copy(update={"gradient_checkpointing": checkpointing, "lora": lora})).train()
    tokens = [encoder.encode(row(3), ITEMS), encoder.encode(row(6, candidates=3), ITEMS)]
    trainable = [p for p in ranker.parameters() if p.requires_grad]
    targets = torch.tensor([2, 1])
    packed = torch.autograd.grad(F.cross_entropy(ranker(pack(tokens)), targets, reduction="sum"), trainable)
    with plain_attention(ranker):
        alone = [F.cross_entropy(one_by_one(ranker, one), target) for one, target in zip(tokens, targets, strict=True)]
        apart = torch.autograd.grad(sum(alone, torch.zeros(())), trainable)
    difference = torch.cat([(a - b).flatten() for a, b in zip(packed, apart, strict=True)]).norm()
    assert difference / torch.cat([b.flatten() for b in apart]).norm() < 1e-3


@torch.no_grad()
def test_saved_adapter_gives_the_same_logits_in_plain_transformers_and_peft(
    config: RankerConfig, ranker: model.PackedRanker, encoder: PromptEncoder, tmp_path: Path
) -> None:
    model.save(ranker, tmp_path, config)
    folder = config.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    plain.config.pad_token_id = tokenizer.pad_token_id
    plain = PeftModel.from_pretrained(plain, str(tmp_path)).eval()
    entry = row(4)
    prompt = encoder.prompt_text(entry, ITEMS)
    texts = [prompt + encoder.candidate_text(item) for item in entry.candidates]
    expected = plain(**tokenizer(texts, padding=True, add_special_tokens=False, return_tensors="pt")).logits[:, 0]
    scored = Scorer(tmp_path, config, {"d": ITEMS}).score([entry, row(2)], token_budget=4096)[0]
    torch.testing.assert_close(torch.from_numpy(scored), expected, atol=1e-4, rtol=0)


def test_prompt_and_candidate_tokens_are_the_tokens_of_the_whole_text(encoder: PromptEncoder) -> None:
    entry = row(5)
    tokens = encoder.encode(entry, ITEMS)
    for item, candidate in zip(entry.candidates, tokens.candidates, strict=True):
        whole = encoder.prompt_text(entry, ITEMS) + encoder.candidate_text(item)
        assert tokens.prompt + candidate == encoder.tokenizer(whole, add_special_tokens=False)["input_ids"]


def test_special_tokens_in_reviews_stay_text(encoder: PromptEncoder) -> None:
    prompt = encoder.encode(row(1), ITEMS).prompt
    clean = encoder.encode(
        RankRow(history=History(example_id="x", domain="d", user_id="u", interactions=()), reason=None, candidates=()),
        ITEMS,
    ).prompt
    special = set(encoder.tokenizer.all_special_ids)
    assert [t for t in prompt if t in special] == [t for t in clean if t in special]


def test_long_candidates_are_cut_and_budgets_are_kept(config: RankerConfig, encoder: PromptEncoder) -> None:
    tokens = encoder.encode(row(40), ITEMS)
    assert len(tokens.prompt) <= config.max_tokens
    assert max(map(len, tokens.candidates)) <= config.candidate_tokens + ANSWER_TOKENS
    draws = random.Random(0)
    rows = [
        TokenRow(
            prompt=[1] * draws.choice((3, 150)), candidates=[[1] * draws.choice((1, 8))] * draws.choice((1, 2, 60))
        )
        for _ in range(200)
    ]
    batches = list(budgeted(rows, 500))
    assert sorted(index for batch in batches for index in batch) == list(range(200))
    assert len(batches) < 1.5 * sum(one.packed_length for one in rows) / 500
    for several in (batch for batch in batches if len(batch) > 1):
        packed = pack([rows[index] for index in several])
        assert len(packed.input_ids_T) <= 500
        assert packed.prompts_BP.numel() + packed.candidates_BKS.numel() <= 1000, "what attention pads is not bounded"


@torch.no_grad()
def test_the_last_layer_computes_for_ends_alone(ranker: model.PackedRanker, encoder: PromptEncoder) -> None:
    read: list[tuple[int, ...]] = []
    layers = ranker.model.get_base_model().model.layers
    hooks = [
        module.register_forward_hook(lambda _, given, __: read.append(tuple(given[0].shape[:2])))
        for layer in layers
        for module in (layer.self_attn.o_proj.lora_A["default"], layer.mlp.down_proj)
    ]
    batch = pack([encoder.encode(row(2), ITEMS), encoder.encode(row(4, candidates=3), ITEMS)])
    ranker(batch)
    for hook in hooks:
        hook.remove()
    assert read == [(1, len(batch.slots_T))] * 2 * (len(layers) - 1) + [(1, 8)] * 2
