"""A language model that is made in a second and writes nonsense: SmolLM2's tokenizer before random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from pulse_ray import models

TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"


def make(folder: Path) -> Path:
    """Saves the model in `folder` (two layers of 64 dimensions; nearly all of its weights are the vocabulary's)."""
    tokenizer = AutoTokenizer.from_pretrained(models.resolve(TOKENIZER))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
