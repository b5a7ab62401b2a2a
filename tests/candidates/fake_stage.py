"""The stage `candidates`, run in this process on two small shops, with a SASRec that was never trained."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pulse_ray.candidates.check import CheckWorker, Finding, summarise
from pulse_ray.candidates.exports import ExportWorker, IndexWorker, exports, unindexed
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.candidates.stage import CandidateWorker
from pulse_ray.config import Config
from pulse_ray.data.stage import prepare
from pulse_ray.pipeline import plan
from pulse_ray.workspace import Part, StageRun


def make(folder: Path, **candidates: Any) -> StageRun:
    """The stage over prepared shops, begun, with its SASRec."""
    source = {"kind": "synthetic", "users": 24, "items": 60}
    config = Config.model_validate(
        {
            "name": "run",
            "storage": str(folder),
            "prepare": {
                "domains": [{"name": name, "source": source} for name in ("shop", "pantry")],
                "min_item_interactions": 1,
                "shard_examples": 7,
                "partitions": 2,
                "positions_per_user": 2,
            },
            "candidates": {"similar_users": 3, "sasrec": {"dim": 16, "layers": 1}, **candidates},
        }
    )
    runs = plan(config)
    runs["prepare"].begin()
    prepare(runs["prepare"], _each(runs["prepare"]))
    runs["prepare"].complete(1.0)
    stage = runs["candidates"]
    stage.begin()
    torch.manual_seed(0)
    vocabulary = [
        key
        for data in stage.input("items").tables(columns=["domain", "item_id"])
        for key in zip(data.column(0).to_pylist(), data.column(1).to_pylist(), strict=True)
    ]
    Sasrec(config.candidates.sasrec, vocabulary, config.prepare.max_sequence).save(Path(stage.output("sasrec").path))
    return stage


def export(stage: StageRun) -> None:
    """Vectors, states and the indices of users."""
    exporter, indexer = ExportWorker(stage), IndexWorker(stage)
    for name in exports(stage):
        exporter(name)
    for domain in unindexed(stage):
        indexer(domain)


def draw(stage: StageRun, parts: Sequence[Part] | None = None) -> None:
    """Candidates and neighbours of parts; unset: of all. Then the stage is complete."""
    worker = CandidateWorker(stage)
    for part in stage.input("examples").parts() if parts is None else parts:
        made = worker(part)
        stage.reject(part, made.rejects)
        for name, data in made.tables.items():
            stage.output(name).write(part, data)
    stage.complete(1.0)


def check(stage: StageRun) -> list[Finding]:
    """What `candidates --check` finds, with the parts in reverse."""
    parts = sorted({*stage.input("examples").parts(), *stage.output("candidates").parts()}, reverse=True)
    return summarise(map(CheckWorker(stage), parts), stage.config.candidates)


def rows(stage: StageRun, name: str) -> list[dict[str, Any]]:
    """All rows of an output or an input."""
    return [row for data in stage.workspace.artefact(name).tables() for row in data.to_pylist()]


def _each(stage: StageRun) -> Any:
    def each(step: Any, numbers: Sequence[tuple[int, ...]]) -> dict[int, dict[str, int]]:
        totals: dict[int, Counter[str]] = {domain: Counter() for domain, *_ in numbers}
        for entry in numbers:
            totals[entry[0]].update(step(stage, *entry))
        return {domain: dict(counts) for domain, counts in totals.items()}

    return each
