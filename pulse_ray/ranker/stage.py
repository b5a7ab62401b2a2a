"""The `ranker` stage: trains one LoRA ranker for each configured variant, on the same candidates."""

from __future__ import annotations

from typing import Any

from pulse_ray import models
from pulse_ray.ranker import model
from pulse_ray.ranker.loop import RankData, RankerTask
from pulse_ray.seeding import derive
from pulse_ray.training import fitting
from pulse_ray.workspace import StageRun


def run(stage: StageRun) -> dict[str, dict[str, Any]]:
    """Reads items, examples, candidates and reasons; writes ranker."""
    config = stage.config.ranker
    models.resolve(config.model)
    model.check_quantization(config)
    data = RankData(
        items=stage.input("items"),
        examples=stage.input("examples"),
        candidates=stage.input("candidates"),
        reasons=stage.input("reasons"),
    )
    metrics: dict[str, Any] = {}
    for variant in config.variants:
        record = fitting.fit(
            RankerTask,
            config,
            variant,
            data,
            config=config.training,
            # The same for all variants, so that they start from the same head and see examples in the same order.
            seed=derive(stage.config.seed, "ranker"),
            output=stage.output("ranker"),
            folder=variant,
            title=f"ranker: {variant}",
            log_interval_s=stage.config.cluster.log_interval_s,
        )
        metrics[variant] = fitting.best_metrics(record)
    return {"ranker": metrics}
