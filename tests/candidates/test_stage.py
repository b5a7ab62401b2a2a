"""What the stage stores, in this process: sets, ranks in the whole catalogue, states, similar users."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import fake_stage
import numpy as np
import pytest

from pulse_ray.candidates import sets
from pulse_ray.candidates.exports import exports, load_model, unindexed
from pulse_ray.candidates.rows import read_rows
from pulse_ray.candidates.sets import CandidateSets, Touched
from pulse_ray.errors import DataError
from pulse_ray.workspace import StageRun


@pytest.fixture(scope="module", params=["uniform", "popularity", "sasrec"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> StageRun:
    made = fake_stage.make(tmp_path_factory.mktemp(request.param), sampler=request.param, size=8)
    fake_stage.export(made)
    fake_stage.draw(made)
    return made


def _examples(stage: StageRun) -> dict[str, sets.Row]:
    tables = stage.input("examples").tables()
    return {row.example_id: row for data in tables for row in read_rows(data)}


def test_sets_hold_the_target_and_items_that_the_user_never_touched(stage: StageRun) -> None:
    touched: dict[tuple[str, str], set[str]] = {}
    for row in fake_stage.rows(stage, "interactions"):
        touched.setdefault((row["domain"], row["user_id"]), set()).add(row["item_id"])
    examples = _examples(stage)
    catalogue = {(row["domain"], row["item_id"]) for row in fake_stage.rows(stage, "items")}
    stored = fake_stage.rows(stage, "candidates")
    assert {row["example_id"] for row in stored} == examples.keys()
    for row in stored:
        example = examples[row["example_id"]]
        negatives = set(row["items"]) - {example.target}
        assert row["items"][row["target_index"]] == example.target
        assert len(row["items"]) == 8 == len(negatives) + 1
        assert not negatives & touched[example.domain, example.user_id]
        assert all((example.domain, item) in catalogue for item in row["items"])


def test_the_check_finds_nothing_amiss(stage: StageRun) -> None:
    assert [finding.violations for finding in fake_stage.check(stage)] == [0] * 6


def test_ranks_and_logits_are_those_of_the_whole_catalogue(stage: StageRun) -> None:
    model, examples = load_model(stage), _examples(stage)
    popularity = {(row["domain"], row["item_id"]): row["popularity"] for row in fake_stage.rows(stage, "items")}
    stored = fake_stage.rows(stage, "candidates")
    histories = [examples[row["example_id"]] for row in stored]
    states = model.states([model.indices(example.domain, example.items) for example in histories])
    for row, example, logits in zip(stored, histories, model.logits(states), strict=True):
        expected = [logits[model.index[example.domain, item]] for item in row["items"]]
        np.testing.assert_allclose(row["sasrec_logits"], expected, rtol=1e-4, atol=1e-4)
        ranks = [row["sasrec_catalogue_rank"], row["popularity_catalogue_rank"]]
        if example.split == "train":
            assert ranks == [None, None]
            continue
        own = {item for domain, item in popularity if domain == example.domain} - set(example.items)
        by_logit = {item: logits[model.index[example.domain, item]] for item in own}
        by_count = {item: popularity[example.domain, item] for item in own}
        assert ranks == [
            sum(score >= scores[example.target] for score in scores.values()) for scores in (by_logit, by_count)
        ], "ties rank against the target"


def test_a_draw_depends_on_its_example_alone(stage: StageRun, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after another, backwards, or in chunks of the catalogue's logits: the rows are the same."""
    model = load_model(stage)
    drawer, touched = CandidateSets(stage, model), Touched(stage)
    stored = {row["example_id"]: row for row in fake_stage.rows(stage, "candidates")}
    monkeypatch.setattr(sets, "LOGITS_AT_ONCE", 3 * 60)
    for part in ("train-0000-0001", "test-0001-0000"):
        rows = read_rows(stage.input("examples").read(part))
        for batch in (rows[::-1], *([row] for row in rows)):
            states = model.states([model.indices(row.domain, row.items) for row in batch])
            for drawn in drawer.draw(batch, states, touched.of(part, batch)):
                assert drawn is not None
                _assert_same(drawn, stored[drawn["example_id"]])


def _assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one["sasrec_logits"] == pytest.approx(other["sasrec_logits"], abs=1e-4)
    assert {**one, "sasrec_logits": None} == {**other, "sasrec_logits": None}


def test_states_and_vectors_are_exported_once_for_each_user_and_item(stage: StageRun) -> None:
    model = load_model(stage)
    newest: dict[tuple[str, str], sets.Row] = {}
    for row in _examples(stage).values():
        key = (row.domain, row.user_id)
        if row.split == "train" and len(row.items) > len(newest[key].items if key in newest else ()):
            newest[key] = row
    found = fake_stage.rows(stage, "user_states")
    assert [(row["domain"], row["user_id"]) for row in found] == list(dict.fromkeys(newest))
    sequences = [[*example.items, example.target] for example in newest.values()]
    expected = model.states([model.indices(key[0], steps) for key, steps in zip(newest, sequences, strict=True)])
    np.testing.assert_allclose([row["state"] for row in found], expected, rtol=1e-4, atol=1e-5)
    for row, example, steps in zip(found, newest.values(), sequences, strict=True):
        assert (row["example_id"], row["items"]) == (example.example_id, steps[::-1])
    vectors = {(row["domain"], row["item_id"]): row["vector"] for row in fake_stage.rows(stage, "item_vectors")}
    assert vectors.keys() == model.index.keys()
    for key, vector in vectors.items():
        assert vector == model.items.weight[model.index[key]].tolist()


def test_neighbours_are_the_nearest_other_users_of_the_domain(stage: StageRun) -> None:
    model, examples = load_model(stage), _examples(stage)
    users = fake_stage.rows(stage, "user_states")
    stored = fake_stage.rows(stage, "neighbours")[::9]
    histories = [examples[row["example_id"]] for row in stored]
    states = model.states([model.indices(example.domain, example.items) for example in histories])
    for row, example, state in zip(stored, histories, states, strict=True):
        own = [user for user in users if user["domain"] == example.domain and user["user_id"] != example.user_id]
        own.sort(key=lambda user: -np.dot(user["state"], state) / np.linalg.norm(user["state"]))
        assert row["user_ids"] == [user["user_id"] for user in own[:3]]
        assert row["items"] == list(dict.fromkeys(item for user in own[:3] for item in user["items"]))[:30]


def test_an_example_without_enough_untouched_items_is_set_aside(tmp_path: Path) -> None:
    for sampler in ("popularity", "sasrec"):
        stage = fake_stage.make(tmp_path / sampler, sampler=sampler, size=50)
        fake_stage.export(stage)
        fake_stage.draw(stage)
        kept, near = (
            [row["example_id"] for row in fake_stage.rows(stage, name)] for name in ("candidates", "neighbours")
        )
        aside = [row["key"] for data in stage.rejects.tables() for row in data.to_pylist()]
        assert kept == near
        assert kept and aside and set(kept) | set(aside) == _examples(stage).keys()


def test_a_sasrec_that_diverged_is_an_error(stage: StageRun) -> None:
    model = load_model(stage)
    model.items.weight.data[3, 1] = np.nan
    with pytest.raises(DataError, match="not all finite numbers"):
        CandidateSets(stage, model)


def test_what_is_exported_is_not_exported_again(stage: StageRun) -> None:
    assert exports(stage) == unindexed(stage) == []
    stage.output("user_states").remove("part-0001")
    assert exports(stage) == ["user_states/part-0001"]
    fake_stage.export(stage)
    assert exports(stage) == []
