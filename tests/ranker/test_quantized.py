"""A ranker whose frozen weights have four bits (QLoRA): trained, saved, and scoring as plain transformers would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learnable
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BitsAndBytesConfig

from pulse_ray import catalogue
from pulse_ray.config import RankerConfig
from pulse_ray.errors import ArtifactError
from pulse_ray.ranker import model
from pulse_ray.ranker.loop import RankData, RankerTask
from pulse_ray.ranker.scorer import Scorer
from pulse_ray.training import fitting
from pulse_ray.workspace import Workspace


def configure(folder: Path) -> RankerConfig:
    settings: dict[str, Any] = {
        "model": str(tiny.make(folder / "base")),
        "quantization": "nf4",
        "max_tokens": 256,
        "text": {"history_tokens": 100},
        "lora": {"dropout": 0.0},
        "training": {
            **{"epochs": 15, "evaluations_per_epoch": 0.2, "patience": 99},
            **{"batch_size": 4, "lr": 2e-2, "precision": "fp32"},
        },
    }
    return RankerConfig.model_validate(settings)


def test_quantized_training_learns_and_its_adapter_ranks_the_same(ray_cluster: None, tmp_path: Path) -> None:
    workspace, config = Workspace(str(tmp_path), "run"), configure(tmp_path)
    tables = learnable.write(workspace, 15)
    data = RankData(**{name: tables[name] for name in ("items", "examples", "candidates", "reasons")})
    output = workspace.artefact("ranker")
    task = (RankerTask, config, "base", data)
    record = fitting.fit(*task, config=config.training, seed=1, output=output, folder="", title="quantized")
    losses = [step["loss"] for step in record["steps"]]
    assert np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.1, losses

    items = catalogue.load(data.items)
    scorer = Scorer(Path(output.path), config, items)
    parameters = {name: value for name, value in scorer.ranker.named_parameters() if "proj.base_layer" in name}
    assert parameters and all(value.dtype == torch.uint8 for value in parameters.values())
    row, _ = next(data.rows("validation-0000-0000", "base", items))
    logits_K = scorer.score([row], 4096)[0]
    np.testing.assert_allclose(scorer.score([row], 60)[0], logits_K, atol=1e-5, err_msg="in chunks")
    plain = AutoModelForSequenceClassification.from_pretrained(
        config.model,
        num_labels=1,
        dtype=torch.float32,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=["score"],
        ),
    )
    for layer in plain.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False  # Or some processors would compute in bfloat16.
    plain = PeftModel.from_pretrained(plain, output.path, autocast_adapter_dtype=False).to(torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    prompt = scorer.encoder.prompt_text(row, items["shop"])
    texts = [prompt + scorer.encoder.candidate_text(item) for item in row.candidates]
    with torch.no_grad():
        expected = [
            float(plain(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits) for text in texts
        ]
    assert logits_K.std() > 0.01, "nothing to tell apart"
    np.testing.assert_allclose(logits_K, expected, atol=1e-4)


def test_what_quantizes_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ArtifactError, match="bitsandbytes is not installed"):
        model.create(configure(tmp_path))
