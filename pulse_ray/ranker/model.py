"""The ranker's model: a causal language model with its own sequence-classification head of one label, under LoRA.

The head is the model's own, so a saved adapter loads with plain transformers and PEFT, and gives on plain text the
logits that packed rows give.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig, DynamicCache
from transformers.utils import is_bitsandbytes_available

from pulse_ray import cpu, models
from pulse_ray.config import LoraConfig, RankerConfig
from pulse_ray.errors import ArtifactError, TrainingError
from pulse_ray.ranker import attention, last_layer
from pulse_ray.ranker.packing import ANSWER_TOKENS, PAD, PackedBatch

ATTENTION = ("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj")
"""Attention projections as Llama, Qwen, Gemma, Mistral (separate) and Phi-3/4 (fused) name them."""
MLP = ("gate_proj", "up_proj", "gate_up_proj", "down_proj")


class PackedRanker(nn.Module):
    """A PEFT model whose forward takes packed rows and gives one logit per candidate."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Logits: [B, K] float32, -inf for candidates that a row does not have. Only their ends go through the head."""
        return self._logits(self._hidden(batch, None), batch)

    def remember(self, prompt: PackedBatch) -> DynamicCache:
        """Keys and values of a prompt: of a batch of one row, without candidates."""
        cache = DynamicCache()
        self._hidden(prompt, cache)
        return cache

    def score_after(self, cache: DynamicCache, candidates: PackedBatch) -> torch.Tensor:
        """Logits of candidates that follow a remembered prompt: [1, K] float32. The cache is left as it was.

        Args:
            candidates: a batch of one row, without a prompt.
        """
        hidden_TD = self._hidden(candidates, cache)
        cache.crop(-len(hidden_TD))
        return self._logits(hidden_TD, candidates)

    def _hidden(self, batch: PackedBatch, cache: DynamicCache | None) -> torch.Tensor:
        """The last hidden states: [T, D]. Positions go on from what the cache holds."""
        base = self.model.get_base_model()
        seen = cache.get_seq_length() if cache is not None else 0
        hidden_1TD: torch.Tensor = getattr(base, base.base_model_prefix)(
            input_ids=batch.input_ids_T[None],
            position_ids=batch.positions_T[None] + seen,
            past_key_values=cache,
            use_cache=cache is not None,
            packing=batch,
        ).last_hidden_state
        return hidden_1TD[0]

    def _logits(self, hidden_TD: torch.Tensor, batch: PackedBatch) -> torch.Tensor:
        logits_BK: torch.Tensor = self.model.get_base_model().score(hidden_TD[batch.ends_BK]).squeeze(-1)
        return logits_BK.float().masked_fill(batch.ends_BK == PAD, -torch.inf)


def tokenizer(name: str) -> Any:
    """The tokenizer of a base model."""
    return AutoTokenizer.from_pretrained(models.resolve(name))


def base_model(config: RankerConfig) -> nn.Module:
    """A language model as a sequence classifier with one label; the head is new.

    Raises:
        ArtifactError: the architecture has no sequence-classification form, is recurrent, or sees too few tokens.
    """
    name, folder = config.model, models.resolve(config.model)
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    # transformers reports the new head as missing from the checkpoint, which is just what it is.
    logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)
    try:
        model = AutoModelForSequenceClassification.from_pretrained(
            folder,
            num_labels=1,
            dtype=dtype,
            attn_implementation=attention.NAME,
            quantization_config=_quantization(config, dtype),
        )
    except (ValueError, KeyError) as error:  # Of a model that does not ask transformers' registry for attention.
        raise ArtifactError(f"model '{name}' cannot rank: {error}", remedy="Choose a causal language model") from error
    _check_rows_stay_apart(model, config)
    if model.config.pad_token_id is None:
        known = tokenizer(name)
        model.config.pad_token_id = known.pad_token_id if known.pad_token_id is not None else known.eos_token_id
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes' kernel for such CPUs computes in bfloat16 whatever it is asked, and dies of an empty input.
            module.support_avx512bf16_for_cpu = False
    return model  # type: ignore[no-any-return]


def _quickened(adapted: PeftModel) -> PeftModel:
    """The same model, doing less. Its adapters are in place, as what they compute counts too."""
    base = adapted.get_base_model()
    last_layer.shorten(getattr(base, base.base_model_prefix))
    cpu.quicken(adapted)
    return adapted


def _quantization(config: RankerConfig, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """As QLoRA has it (Dettmers et al., 2023, §3): 4-bit NormalFloat, whose own constants are quantized once more."""
    if config.quantization is None:
        return None
    check_quantization(config)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=["score"],  # The head is trained.
    )


def check_quantization(config: RankerConfig) -> None:
    """Whether what quantizes is installed, where it is asked for.

    Raises:
        ArtifactError: it is not.
    """
    if config.quantization is not None and not is_bitsandbytes_available():
        raise ArtifactError(
            f"ranker.quantization is {config.quantization}, and bitsandbytes is not installed",
            remedy="pip install bitsandbytes, or leave ranker.quantization unset",
        )


def _check_rows_stay_apart(model: Any, config: RankerConfig) -> None:
    """Rows follow each other in one sequence, so nothing but our attention may carry anything from token to token."""
    text = model.config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ())
    if kinds - {"full_attention", "sliding_attention"} or getattr(model, "_is_stateful", False):
        raise ArtifactError(
            f"model '{config.model}' cannot rank: it has recurrent or other special layers",
            remedy=attention.REMEDY,
        )
    window = getattr(text, "sliding_window", None) if not kinds or "sliding_attention" in kinds else None
    longest = config.max_tokens + config.candidate_tokens + ANSWER_TOKENS
    if window is not None and longest > window:
        raise ArtifactError(
            f"model '{config.model}' cannot rank rows of {longest} tokens: it sees {window} at a time",
            remedy=f"Lower ranker.max_tokens to {config.max_tokens - longest + window}, or choose another ranker.model",
        )


def create(config: RankerConfig) -> PackedRanker:
    """An untrained ranker: base model, LoRA and a new head."""
    model = base_model(config)
    adapted = get_peft_model(
        model,
        PeftLoraConfig(
            task_type=TaskType.SEQ_CLS,
            r=config.lora.r,
            lora_alpha=config.lora.alpha,
            lora_dropout=config.lora.dropout,
            target_modules=lora_targets(model, config.lora),
            layers_to_transform=_last_layers(model, config.lora),
        ),
        autocast_adapter_dtype=False,  # DeepSpeed keeps fp32 master weights.
    )
    # The adapter must name the model, not the folder of this machine that it was read from.
    adapted.peft_config["default"].base_model_name_or_path = config.model
    if config.gradient_checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable()
    return PackedRanker(_quickened(adapted))


def lora_targets(model: nn.Module, config: LoraConfig) -> list[str]:
    """Names of the projections to adapt that this architecture has.

    Raises:
        ArtifactError: it has none of the known ones.
    """
    wanted = ATTENTION if config.targets == "attention" else (*ATTENTION, *MLP)
    present = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    found = [name for name in wanted if name in present]
    if not found:
        raise ArtifactError(
            f"{type(model).__name__} has no projection named {', '.join(wanted)}",
            remedy="Choose a Llama, Qwen, Gemma, Mistral or Phi model",
        )
    return found


def _last_layers(model: Any, config: LoraConfig) -> list[int] | None:
    """Indices of the layers to adapt; None for all. Backward passes end at the first of them."""
    if config.last_layers is None:
        return None
    depth = model.config.get_text_config().num_hidden_layers
    return list(range(max(0, depth - config.last_layers), depth))


def save(ranker: PackedRanker, folder: Path, config: RankerConfig) -> None:
    """Writes the adapter and the head as a PEFT folder, and checks what was written.

    Raises:
        TrainingError: a saved tensor is empty or not finite.
    """
    # The vocabulary is the base model's; looking whether it grew would ask the model hub.
    ranker.model.save_pretrained(str(folder), save_embedding_layers=False)
    for name, value in load_file(folder / "adapter_model.safetensors").items():
        if value.numel() == 0 or not torch.isfinite(value).all():
            raise TrainingError(
                f"the saved adapter's tensor '{name}' is empty or not finite", remedy="Use ranker.training.zero_stage 2"
            )
    (folder / "ranker.json").write_text(json.dumps(config.model_dump(mode="json"), indent=2))


def load(folder: Path, config: RankerConfig) -> PackedRanker:
    """A trained ranker from a PEFT folder that `save` wrote, ready for inference."""
    cuda = torch.cuda.is_available()
    model = base_model(config)
    adapted = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    if not getattr(model, "is_quantized", False):
        # One product for each projection instead of three. What bfloat16 rounds of the sum is little beside what it
        # rounds of activations: of SmolLM2-135M with random adapters, logits were 1.01 to 1.1 times as far from
        # float32's as without.
        adapted.merge_adapter()
    return PackedRanker(_quickened(adapted).to(model.dtype)).to("cuda" if cuda else "cpu").eval()
