"""A batch that is cut among workers has the negatives of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import learnable
import pytest
import tiny
from safetensors.torch import load_file

from pulse_ray.config import ThoughtSpaceConfig
from pulse_ray.thought_space.loop import ThoughtSpaceTask
from pulse_ray.training import fitting
from pulse_ray.workspace import Workspace


def test_two_workers_train_the_encoders_of_one(ray_cluster: None, tmp_path: Path) -> None:
    """The last batch of an epoch has a single example, so that the second worker has no share of it."""
    workspace = Workspace(str(tmp_path), "run")
    tables = learnable.write(workspace, 24)
    inputs = [tables[name] for name in ("items", "examples", "rationales")]
    dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # Its draws depend on the workers.
    model, seed = str(tiny.make_encoder(tmp_path / "bert", **dropout)), 1
    records, weights = {}, {}
    for workers in (1, 2):
        training: dict[str, Any] = {"epochs": 2, "batch_size": 9, "lr": 1e-3}
        config = ThoughtSpaceConfig.model_validate(
            {
                "model": model,
                "max_tokens": 96,
                "text": {"history_tokens": 60},
                "negatives": "all",
                "drop_target": 0.0,
                "learned_temperature": True,
                "training": {**training, "workers": {"count": workers, "cpus": 0.5, "threads": 1, "max_failures": 0}},
            }
        )
        task = ThoughtSpaceTask(config, *inputs, seed)
        assert len(task) % 9 == 1, "the last batch has a share for both"
        output = workspace.artefact(f"encoders{workers}")
        fit = (ThoughtSpaceTask, config, *inputs, seed)
        title = f"{workers} workers"
        records[workers] = fitting.fit(*fit, config=config.training, seed=seed, output=output, folder="", title=title)
        weights[workers] = load_file(Path(output.path) / "history/model.safetensors")
    assert records[1]["evaluations"][-1]["loss"] < records[1]["evaluations"][0]["loss"]
    for name in ("steps", "evaluations"):
        for one, other in zip(records[2][name], records[1][name], strict=True):
            assert one == pytest.approx(other, rel=1e-4)
    for name, weight in weights[1].items():
        assert (weights[2][name] - weight).abs().max() < 1e-4, name
