"""The `evaluate` stage: every model scores the stored candidates of held-out examples; metrics and a report follow."""

from __future__ import annotations

import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from pulse_ray import catalogue, metrics
from pulse_ray.catalogue import Catalogue
from pulse_ray.config import RankerConfig
from pulse_ray.evaluation import report
from pulse_ray.evaluation.protocol import CATALOGUE_RANKS, Tally, metric_rows, models
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.runtime import ShardOutput, run_shards
from pulse_ray.schema import Example, Item, Reject, examples, table
from pulse_ray.workspace import Artefact, Part, StageRun


class RankScorer(Protocol):
    """A trained ranker: `ranker.scorer.Scorer`, or what stands in for it in a test."""

    def score(self, rows: Sequence[RankRow], token_budget: int) -> list[np.ndarray]:
        """Logits of each row's candidates, [K] each."""
        ...


MakeScorer = Callable[[Path, RankerConfig, Catalogue], RankScorer]
"""Loads the ranker whose adapter lies in a local folder. It travels to the actors: a class or a module's function."""


def run(stage: StageRun, make_scorer: MakeScorer | None = None) -> dict[str, dict[str, Any]]:
    """Reads every artefact up to `ranker`; writes scores, and metrics.json and report.html in evaluation.

    Args:
        make_scorer: how an actor loads a ranker; unset means `ranker.scorer.Scorer`.
    """
    started = time.monotonic()
    parts = [part for split in stage.config.evaluate.splits for part in stage.input("examples").parts(split)]
    run_shards(
        stage,
        parts,
        ScoreWorker,
        stage,
        make_scorer or _trained_scorer,
        pool=stage.config.evaluate.pool,
        outputs=("scores",),
        title="evaluate: scores",
    )
    tally = Tally()
    for data in stage.output("scores").tables(columns=["example_id", "split", "variant", "logits", "rank"]):
        tally.add(data)
    sizes = _sizes(stage.input("items"))
    for split in stage.config.evaluate.splits:
        for data in stage.input("candidates").tables(split, ["example_id", *CATALOGUE_RANKS.values()]):
            tally.add_catalogue(data, split, sizes)
    rows = metric_rows(tally, stage.config)
    figures = [row.to_json() for row in rows]
    evaluation = stage.output("evaluation")
    evaluation.write_bytes("metrics.json", json.dumps(figures, indent=2).encode())
    page = report.render(report.collect(stage, rows, seconds=time.monotonic() - started))
    evaluation.write_bytes("report.html", page.encode())
    return {"evaluation": {"rows": figures}}


def _sizes(items: Artefact) -> dict[str, int]:
    """Items of each domain."""
    counts: Counter[str] = Counter()
    for data in items.tables(columns=["domain"]):
        counts.update(data.column("domain").to_pylist())
    return dict(counts)


def _trained_scorer(folder: Path, config: RankerConfig, items: Catalogue) -> RankScorer:
    from pulse_ray.ranker.scorer import Scorer  # torch and transformers load in the actors, not in the driver

    return Scorer(folder, config, items)


class ScoreWorker:
    """Ranks the candidates of a part's examples with every model. Holds the catalogue and all trained rankers."""

    def __init__(self, stage: StageRun, make_scorer: MakeScorer) -> None:
        self.stage = stage
        self.items = catalogue.load(stage.input("items"))
        self.scorers: dict[str, RankScorer] = {}
        for variant in stage.config.ranker.variants:
            adapter = Artefact(stage.workspace.filesystem, f"{stage.input('ranker').path}/{variant}", variant)
            with tempfile.TemporaryDirectory() as local:
                self.scorers[variant] = make_scorer(adapter.download(Path(local)), stage.config.ranker, self.items)

    def __call__(self, part: Part) -> ShardOutput:
        found = list(examples(self.stage.input("examples").read(part)))
        drawn = {row["example_id"]: row for row in self.stage.input("candidates").read(part).to_pylist()}
        ranked = [example for example in found if example.history.example_id in drawn]
        sets = [drawn[example.history.example_id] for example in ranked]
        for example, row in zip(ranked, sets, strict=True):
            assert row["items"][row["target_index"]] == example.target_item, f"{row['example_id']}: not its target"
        rows = [
            row
            for model, logits in self._logits(part, ranked, sets).items()
            for row in _score_rows(model, ranked, sets, logits)
        ]
        return ShardOutput(
            tables={"scores": table("scores", rows)},
            examples=len(found),
            rejects=[
                Reject(key=example.history.example_id, reason="no candidates", detail="`candidates` set it aside")
                for example in found
                if example.history.example_id not in drawn
            ],
        )

    def _logits(
        self, part: Part, ranked: Sequence[Example], sets: Sequence[Mapping[str, Any]]
    ) -> dict[str, list[np.ndarray]]:
        """By model, the logits of each example's candidates: [K] each."""
        candidates = [
            tuple(self.items[example.history.domain][item] for item in row["items"])
            for example, row in zip(ranked, sets, strict=True)
        ]
        logits = {"popularity": [_popularity(found) for found in candidates]}
        logits["sasrec"] = [np.array(row["sasrec_logits"], dtype=np.float32) for row in sets]
        reasons = self._reasons(part)
        for variant, scorer in self.scorers.items():
            rows = [
                RankRow(
                    history=example.history,
                    reason=reasons[variant].get(example.history.example_id),
                    candidates=found,
                )
                for example, found in zip(ranked, candidates, strict=True)
            ]
            logits[variant] = scorer.score(rows, self.stage.config.evaluate.token_budget)
        assert set(logits) == set(models(self.stage.config))
        return logits

    def _reasons(self, part: Part) -> dict[str, dict[str, str]]:
        """Reasons by selector and example. A variant is named after its selector; `none` selects nothing."""
        found: dict[str, dict[str, str]] = defaultdict(dict)
        for row in self.stage.input("reasons").read(part, ["example_id", "selector", "text"]).to_pylist():
            found[row["selector"]][row["example_id"]] = row["text"]
        return found


def _popularity(candidates: Sequence[Item]) -> np.ndarray:
    return np.array([item.popularity for item in candidates], dtype=np.float32)


def _score_rows(
    model: str, ranked: Sequence[Example], sets: Sequence[Mapping[str, Any]], logits: Sequence[np.ndarray]
) -> list[dict[str, Any]]:
    if not ranked:
        return []
    places = metrics.ranks(np.stack(logits), [row["target_index"] for row in sets])
    return [
        {
            "example_id": example.history.example_id,
            "split": example.split,
            "variant": model,
            "items": row["items"],
            "logits": scores.tolist(),
            "target_index": row["target_index"],
            "rank": int(rank),
        }
        for example, row, scores, rank in zip(ranked, sets, logits, places, strict=True)
    ]
