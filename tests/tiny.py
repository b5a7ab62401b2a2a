"""Models that are made in a second and know nothing: real tokenizers before random weights. And a run on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BertConfig, BertModel

from pulse_ray import models

TOKENIZER = "HuggingFaceTB/SmolLM2-135M-Instruct"
ENCODER_TOKENIZER = "sentence-transformers/all-MiniLM-L6-v2"


def make(folder: Path, architecture: str = "llama", **settings: Any) -> Path:
    """Saves the model in `folder` (two layers of 64 dimensions; nearly all of its weights are the vocabulary's).

    Args:
        architecture: transformers' name of it.
        settings: more of its configuration.
    """
    tokenizer = AutoTokenizer.from_pretrained(models.resolve(TOKENIZER))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model(
        architecture,
        vocab_size=len(tokenizer),
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **(sizes | heads | settings),
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_encoder(folder: Path, **settings: Any) -> Path:
    """Saves an encoder in `folder`: MiniLM's tokenizer before two random layers.

    Args:
        settings: more of its configuration.
    """
    source = models.resolve(ENCODER_TOKENIZER)
    tokenizer = AutoTokenizer.from_pretrained(source)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        **settings,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def experiment(folder: Path) -> dict[str, Any]:
    """Settings of a run in a small shop with models in `folder`, of which nothing but emptiness is a flaw."""
    text = {"history_tokens": 60, "review_words": 3}
    sampling = {"max_tokens": 8, "gates": [], "attempts": 4}
    model = str(make(folder / "llama"))
    once = {"epochs": 1, "evaluations_per_epoch": 1.0}
    return {
        "name": "run",
        "seed": 5,
        "prepare": {
            "domains": [{"name": "shop", "source": {"kind": "synthetic", "users": 48, "items": 60}}],
            "min_item_interactions": 1,
            "partitions": 2,
            "shard_examples": 8,
        },
        "engine": {"model": model, "dtype": "float32", "max_model_len": 512, "max_num_seqs": 16, "kv_cache_gb": 0.25},
        "candidates": {"sasrec": {"dim": 16, "training": {**once, "batch_size": 16}}},
        "rationales": {"text": text, "sampling": sampling, "max_reject_fraction": 0.5},
        "thought_space": {
            "model": str(make_encoder(folder / "bert")),
            "max_tokens": 96,
            "text": text,
            "training": {**once, "batch_size": 16, "lr": 1e-3},
        },
        "tree": {"breadths": [2, 1], "text": text, "sampling": sampling, "max_reject_fraction": 0.5},
        "ranker": {
            "model": model,
            "variants": ["thought_space"],
            "text": text,
            "max_tokens": 192,
            "training": {"epochs": 3, "batch_size": 8, "lr": 1e-3, "precision": "fp32", "patience": 9},
        },
        "evaluate": {"bootstrap_samples": 100, "report_users": 2},
    }
