"""The `thought-space` stage: trains the encoders, and keeps what the plot of the space before and after needs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import ray
from safetensors.numpy import save

from pulse_ray import catalogue, models
from pulse_ray.seeding import derive
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.thought_space.loop import RETRIEVAL_POOL, Behaviours, ThoughtSpaceTask, held_out, pairs
from pulse_ray.training import fitting
from pulse_ray.workspace import StageRun


def run(stage: StageRun) -> dict[str, dict[str, Any]]:
    """Reads items, examples and rationales; writes encoders."""
    config = stage.config.thought_space
    models.resolve(config.model)
    seed = derive(stage.config.seed, "thought space")
    record = fitting.fit(
        ThoughtSpaceTask,
        config,
        stage.input("items"),
        stage.input("examples"),
        stage.input("rationales"),
        seed,
        config=config.training,
        seed=seed,
        output=stage.output("encoders"),
        folder="",
        title="thought-space: encoders",
        log_interval_s=stage.config.cluster.log_interval_s,
    )
    workers = config.training.workers
    ray.get(ray.remote(num_cpus=workers.cpus, num_gpus=workers.gpus)(_project).remote(stage, seed))
    before, after = record["evaluations"][0], fitting.best_metrics(record)
    measured = {
        f"{name}_{when}": entry[name]
        for name in ("r@1", "r@1_history_only", "loss")
        for when, entry in (("before", before), ("after", after))
    }
    rationales = stage.input("rationales")
    pairs_found = sum(rationales.num_rows(part) for part in rationales.parts("train"))
    return {"encoders": {"retrieval_pool": min(RETRIEVAL_POOL, pairs_found), **measured}}


def _project(stage: StageRun, seed: int) -> None:
    """Writes `projection.safetensors`: vectors of held-out examples under the untrained and the trained encoders.

    Tensors `{before,after}_{behaviour,positive,negative}`: [n, D]; row i of each belongs to the same example, and its
    negative is the rationale of another user.
    """
    config = stage.config.thought_space
    found = [pair for pair in pairs(stage.input("examples"), stage.input("rationales")) if held_out(pair, seed)]
    found = found[: config.projected_examples]
    if not found:
        return
    shift = np.random.default_rng(seed).integers(1, max(2, len(found)))
    negatives = [found[(row + int(shift)) % len(found)].rationale for row in range(len(found))]
    items = catalogue.load(stage.input("items"))
    tensors: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as local:
        trained = Encoders.load(stage.output("encoders").download(Path(local)))
    untrained = Encoders.create(config.model, config.max_tokens, shared=config.shared_tower)
    for when, encoders in (("before", untrained), ("after", trained)):
        behaviours = Behaviours(config, encoders, items)
        texts = [behaviours.text(pair.example, with_target=True) for pair in found]
        tensors[f"{when}_behaviour"] = encoders.encode("history", texts)
        tensors[f"{when}_positive"] = encoders.encode("rationale", [pair.rationale for pair in found])
        tensors[f"{when}_negative"] = encoders.encode("rationale", negatives)
    stage.output("encoders").write_bytes("projection.safetensors", save(tensors))
