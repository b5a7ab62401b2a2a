"""Models that are made in a second and know nothing: real tokenizers before random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from pulse_ray import models

TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_TOKENIZER = "sentence-transformers/all-MiniLM-L6-v2"


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


def make_encoder(folder: Path) -> Path:
    """Saves an encoder in `folder`: MiniLM's tokenizer before two random layers."""
    source = models.resolve(ENCODER_TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
