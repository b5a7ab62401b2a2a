"""The ranker, trained by two workers that share its weights: what they save is whole, and what one worker gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learnable
import numpy as np
import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from pulse_ray import catalogue
from pulse_ray.config import RankerConfig
from pulse_ray.ranker.loop import RankData, RankerTask
from pulse_ray.ranker.scorer import Scorer
from pulse_ray.training import fitting
from pulse_ray.workspace import Workspace

ONE: dict[str, Any] = {"epochs": 2, "batch_size": 4, "lr": 5e-3}
TWO: dict[str, Any] = {**ONE, "zero_stage": 3, "workers": {"count": 2, "cpus": 0.5, "threads": 1}}


def test_sharded_training_saves_the_adapter_of_one_worker(ray_cluster: None, tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path), "run")
    tables = learnable.write(workspace, 15)
    data = RankData(**{name: tables[name] for name in ("items", "examples", "candidates", "reasons")})
    base = {"model": str(tiny.make(tmp_path / "base")), "max_tokens": 256, "text": {"history_tokens": 100}}
    records, folders = {}, {}
    for name, training in (("one", ONE), ("two", TWO)):
        config = RankerConfig.model_validate({**base, "lora": {"dropout": 0.0}, "training": training})
        output = workspace.artefact(name)
        task = (RankerTask, config, "base", data)
        records[name] = fitting.fit(*task, config=config.training, seed=1, output=output, folder="", title=name)
        folders[name] = Path(output.path)
    for one, other in zip(records["one"]["steps"], records["two"]["steps"], strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    saved = {name: load_file(folder / "adapter_model.safetensors") for name, folder in folders.items()}
    for name, value in saved["one"].items():
        assert value.numel()
        torch.testing.assert_close(saved["two"][name], value, atol=1e-4, rtol=0)
    assert any(value.abs().max() > 1e-3 for name, value in saved["two"].items() if "lora_B" in name), "nothing learned"

    items = catalogue.load(data.items)
    row, _ = next(data.rows("validation-0000-0000", "base", items))
    scorer = Scorer(folders["two"], config, items)
    logits_K = scorer.score([row], 4096)[0]
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    plain = AutoModelForSequenceClassification.from_pretrained(config.model, num_labels=1, dtype=torch.float32)
    plain = PeftModel.from_pretrained(plain, str(folders["two"])).eval()
    prompt = scorer.encoder.prompt_text(row, items["shop"])
    texts = [prompt + scorer.encoder.candidate_text(item) for item in row.candidates]
    with torch.no_grad():
        expected = [
            float(plain(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits) for text in texts
        ]
    np.testing.assert_allclose(logits_K, expected, atol=1e-4)
