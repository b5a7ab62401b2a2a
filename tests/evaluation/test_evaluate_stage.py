"""The stage from stored candidates to metrics, with a ranker that needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import fake_run
import pytest
from ray import cloudpickle

from pulse_ray.errors import DataError
from pulse_ray.evaluation import stage as evaluate
from pulse_ray.evaluation.protocol import models
from pulse_ray.workspace import StageRun

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(fake_run)


@pytest.fixture
def stage(tmp_path: Path) -> StageRun:
    return fake_run.make(fake_run.config(tmp_path))


def test_every_model_scores_the_same_examples(ray_cluster: None, stage: StageRun) -> None:
    measured = evaluate.run(stage, fake_run.MotiveScorer)
    stage.complete(1.0, measured)
    rows = json.loads(stage.output("evaluation").read_bytes("metrics.json") or b"")
    assert rows == measured["evaluation"]["rows"]
    measured_models = list(models(stage.config))
    assert [(row["model"], row["candidates"]) for row in rows] == [
        *((model, 10) for model in measured_models),
        *((model, 24) for model in ("popularity", "sasrec")),
    ]
    assert {row["n"] for row in rows} == {fake_run.USERS - 1}
    whole = {row["model"]: row for row in rows if row["candidates"] == 24}
    stored = [row for data in stage.input("candidates").tables("test") for row in data.to_pylist()]
    for model in ("popularity", "sasrec"):
        ranks = [row[f"{model}_catalogue_rank"] for row in stored]
        assert whole[model]["mrr"] == pytest.approx(sum(1 / rank for rank in ranks) / len(ranks))
        assert whole[model]["hr@3"] == pytest.approx(sum(rank <= 3 for rank in ranks) / len(ranks))
        assert whole[model]["mrr_low"] < whole[model]["mrr"] < whole[model]["mrr_high"]
    reached = {row["model"]: row["hr@1"] for row in rows if row["candidates"] == 10}
    assert reached["thought_space"] > reached["base"], "the scorer ranks by what its reason names"
    assert stage.rejected() == {"no candidates": 1}
    assert stage.condition() == "complete"
    scores = stage.output("scores").manifest()
    assert scores is not None
    assert scores.rows == (fake_run.USERS - 1) * len(measured_models)


def test_a_part_that_is_scored_is_not_scored_again(ray_cluster: None, stage: StageRun) -> None:
    evaluate.run(stage, fake_run.MotiveScorer)
    first = stage.output("evaluation").read_bytes("metrics.json")
    evaluate.run(stage, fake_run.FirstScorer)
    assert stage.output("evaluation").read_bytes("metrics.json") == first


def test_scores_keep_the_stored_candidates_and_rank_ties_last(stage: StageRun) -> None:
    part = "test-0000-0000"
    rows = evaluate.ScoreWorker(stage, fake_run.FirstScorer)(part).tables["scores"].to_pylist()
    stored = {row["example_id"]: row for row in stage.input("candidates").read(part).to_pylist()}
    for row in rows:
        drawn = stored[row["example_id"]]
        assert (row["items"], row["target_index"]) == (drawn["items"], drawn["target_index"])
        if row["variant"] == "sasrec":
            assert row["logits"] == drawn["sasrec_logits"]
        if row["variant"] in stage.config.ranker.variants:
            assert row["rank"] == len(row["items"])


def test_rankers_get_their_own_reason_or_none(stage: StageRun) -> None:
    seen: dict[str, list[str | None]] = {}

    class Recorder(fake_run.MotiveScorer):
        def score(self, rows, token_budget):  # type: ignore[no-untyped-def]
            seen[self.variant] = [row.reason for row in rows]
            return super().score(rows, token_budget)

    evaluate.ScoreWorker(stage, Recorder)("test-0000-0000")
    assert set(seen["none"]) == {None}
    for selector in ("base", "log_likelihood", "thought_space"):
        without = [user for user, reason in enumerate(seen[selector]) if reason is None]
        assert without == [fake_run.REJECTED_TREE]
    assert seen["base"] != seen["thought_space"] != seen["log_likelihood"]


def test_a_diverged_ranker_is_an_error(stage: StageRun) -> None:
    class Diverged(fake_run.MotiveScorer):
        def _logit(self, row, title):  # type: ignore[no-untyped-def]
            return float("nan")

    with pytest.raises(DataError, match="not numbers"):
        evaluate.ScoreWorker(stage, Diverged)("test-0000-0000")
