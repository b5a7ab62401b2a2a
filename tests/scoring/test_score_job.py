"""Users in, ranked users and rejects out: every row once, in parts that a killed job keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_shop
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle
from typer.testing import CliRunner, Result

from pulse_ray import cli, pipeline
from pulse_ray.errors import ArtifactError, DataError
from pulse_ray.scoring import job as scoring
from pulse_ray.scoring.worker import UserWorker
from pulse_ray.serving.filling import opened
from pulse_ray.serving.store import Profile, StoredReason, StoredThought

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(fake_shop)

COLUMNS = pa.schema(
    {
        "user_id": pa.string(),
        "domain": pa.string(),
        "history": pa.list_(pa.string()),
        "candidates": pa.list_(pa.string()),
        "reason": pa.string(),
    }
)
GIVEN = ["s3", "s5", "s7", "s9"]
ROWS = [
    fake_shop.user("ann", candidates=GIVEN),
    fake_shop.user("ann", candidates=GIVEN, reason="They want Item s5."),
    fake_shop.user("b/ob", candidates=GIVEN),
    fake_shop.user("cy", candidates=GIVEN),
    fake_shop.user("dee", ["p1", "p2", "unknown"], "pantry"),
    fake_shop.user("eve", [], "pantry"),
    fake_shop.user("fay", [f"s{number}" for number in range(fake_shop.ITEMS)]),
    fake_shop.user("gil", ["s4"]),
]


@pytest.fixture
def users(tmp_path: Path) -> Path:
    path = tmp_path / "users.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS, schema=COLUMNS), path)
    return path


def prepared(tmp_path: Path, users: Path, output: str = "scored", **score: Any) -> scoring.ScoreJob:
    settings = fake_shop.config(tmp_path / "runs", **score)
    if not (tmp_path / "runs").exists():
        fake_shop.make(settings)
    return scoring.prepare(settings, str(users), str(tmp_path / output))


def ranked(job: scoring.ScoreJob) -> dict[str, dict[str, dict[str, Any]]]:
    """What a worker makes of the whole input: by table, then by row id."""
    worker = UserWorker(job.stage, job.users, job.variant, job.version, fake_shop.NoiseScorer)
    outputs = [worker(part) for part in job.users.shards(3)]
    found: dict[str, dict[str, dict[str, Any]]] = {
        name: {row["row_id"]: row for output in outputs for row in output.tables[name].to_pylist()}
        for name in job.stage.spec.outputs
    }
    return found | {"rejects": {one.key: {"reason": one.reason} for output in outputs for one in output.rejects}}


def test_every_row_is_ranked_or_rejected(tmp_path: Path, users: Path) -> None:
    job = prepared(tmp_path, users)
    made = ranked(job)
    names = [f"users.parquet:{place}" for place in range(len(ROWS))]
    assert sorted([*made["user_scores"], *made["rejects"]]) == names
    assert list(made["recommendations"]) == list(made["user_scores"])
    assert {key: row["reason"] for key, row in made["rejects"].items()} == {
        names[5]: "empty history",
        names[6]: "nothing to retrieve",
    }
    for key, row in made["recommendations"].items():
        scores = made["user_scores"][key]
        logits = dict(zip(scores["items"], scores["logits"], strict=True))
        assert row["items"] == sorted(logits, key=lambda item: -logits[item])[:3]
        weights = np.exp([logits[item] for item in row["items"]]) / np.exp(scores["logits"]).sum()
        np.testing.assert_allclose(row["probabilities"], weights, rtol=1e-5)
        assert row["titles"] == [f"Item {item}" for item in row["items"]]
        assert row["model_version"] == f"thought_space@{pipeline.plan(job.stage.config)['ranker'].fingerprint}"


def test_reasons_are_those_given_else_the_newest_that_the_run_found(tmp_path: Path, users: Path) -> None:
    best = list(ranked(prepared(tmp_path, users))["recommendations"].values())
    assert [row["reason"] for row in best[:4]] == [
        "They want Item s7.",
        "They want Item s5.",
        "They want Item s9.",
        None,
    ]
    assert [row["items"][0] for row in best[:3]] == ["s7", "s5", "s9"]
    plain = list(ranked(prepared(tmp_path, users, variant="none"))["recommendations"].values())
    assert {row["reason"] for row in plain} == {None}


def test_retrieved_candidates_are_of_the_domain_and_untouched(tmp_path: Path, users: Path) -> None:
    made = ranked(prepared(tmp_path, users))["user_scores"]
    dee, gil = made["users.parquet:4"], made["users.parquet:7"]
    assert len(dee["items"]) == len(set(dee["items"])) == 8
    assert all(item.startswith("p") for item in dee["items"])
    assert not {"p1", "p2"} & set(dee["items"])
    assert "s4" not in gil["items"]


def test_profiles_are_kept_for_serving(tmp_path: Path, users: Path) -> None:
    job = prepared(tmp_path, users, keep_profiles=True)
    stored = StoredReason(text="They want Item s9.", agreement=0.5, selector="thought_space", node_id="1", version="v")
    tree = (StoredThought(node_id="1", depth=1, text=stored.text, mean_logprob=-1.0, leaf=True, agreement=None),)
    with opened(job.stage.config) as store:
        store.put([Profile(domain="shop", user_id="b/ob", history=(), reason=stored, tree=tree)], "run")
    ranked(job)
    with opened(job.stage.config) as store:
        ann, bob, dee = (store.get(*key) for key in (("shop", "ann"), ("shop", "b/ob"), ("pantry", "dee")))
        assert store.find("shop", "", 9) == ["ann", "b/ob", "cy", "gil"], "rejected rows are not kept"
    assert ann is not None and bob is not None and dee is not None
    assert ann.reason is not None and (ann.reason.text, ann.reason.selector) == ("They want Item s5.", "given")
    assert (bob.reason, bob.tree) == (stored, tree), "what the run knows of a reason is more than the batch job knows"
    assert [step.item_id for step in bob.history] == ["s1", "s2"]
    assert (dee.reason, [step.item_id for step in dee.history]) == (None, ["p1", "p2"])


def test_parts_are_committed_and_never_made_again(tmp_path: Path, users: Path, ray_cluster: None) -> None:
    job = prepared(tmp_path, users, pool={"max": 2})
    first, second = job.users.shards(5)
    job.stage.begin()
    worker = UserWorker(job.stage, job.users, job.variant, job.version, fake_shop.NoiseScorer)
    made = worker(second)
    job.stage.reject(second, made.rejects)
    for name in job.stage.spec.outputs:
        job.stage.output(name).write(second, made.tables[name])
    before = job.stage.output("user_scores").read_bytes(f"{second}.parquet")
    assert scoring.condition(job) == "partial"
    done = scoring.run(job, fake_shop.NoiseScorer)
    assert (done.ran, done.users, dict(done.rejects)) == (True, 8, {"empty history": 1, "nothing to retrieve": 1})
    assert job.stage.output("user_scores").parts() == [first, second]
    assert job.stage.output("user_scores").read_bytes(f"{second}.parquet") == before
    manifest = job.stage.output("recommendations").manifest()
    assert manifest is not None
    assert (manifest.rows, manifest.rejects) == (6, {"empty history": 1, "nothing to retrieve": 1})
    assert not scoring.run(job, fake_shop.NoiseScorer).ran


def test_another_input_does_not_mix_with_an_older_output(tmp_path: Path, users: Path) -> None:
    prepared(tmp_path, users).stage.begin()
    assert scoring.condition(prepared(tmp_path, users)) == "partial"
    for changed in (prepared(tmp_path, users, top_n=2), prepared(tmp_path, users, variant="none")):
        with pytest.raises(ArtifactError, match="scores of another input"):
            scoring.condition(changed)
    pq.write_table(pa.Table.from_pylist(ROWS[:3], schema=COLUMNS), users)
    with pytest.raises(ArtifactError, match="scores of another input"):
        scoring.condition(prepared(tmp_path, users))
    assert scoring.condition(prepared(tmp_path, users, output="elsewhere")) == "missing"


def test_an_output_that_is_not_ours_is_left_alone(tmp_path: Path, users: Path) -> None:
    foreign = tmp_path / "scored" / "user_scores" / "2024" / "precious.parquet"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("precious")
    with pytest.raises(ArtifactError, match="is no run of pulse-ray"):
        prepared(tmp_path, users)
    assert foreign.read_text() == "precious"
    inside = tmp_path / "input"
    inside.mkdir()
    users.rename(inside / "users.parquet")
    with pytest.raises(ArtifactError, match="lies inside the input"):
        prepared(tmp_path, inside, output="input/scored")


def test_too_many_users_that_cannot_be_scored_are_an_error_that_keeps_what_is_done(
    tmp_path: Path, users: Path, ray_cluster: None
) -> None:
    with pytest.raises(DataError, match=r"2 of 8 users were set aside .*more than 10%"):
        scoring.run(prepared(tmp_path, users, max_reject_fraction=0.1), fake_shop.NoiseScorer)
    job = prepared(tmp_path, users, max_reject_fraction=0.25)
    assert job.stage.output("user_scores").parts() == job.users.shards(5)
    assert scoring.run(job, fake_shop.NoiseScorer).ran


def test_a_ranker_that_is_named_is_the_one_left_unset(tmp_path: Path, users: Path) -> None:
    assert (
        prepared(tmp_path, users).stage.fingerprint
        == prepared(tmp_path, users, variant="thought_space").stage.fingerprint
    )


def test_more_actors_go_on_with_the_same_output(tmp_path: Path, users: Path) -> None:
    prepared(tmp_path, users).stage.begin()
    assert scoring.condition(prepared(tmp_path, users, pool={"max": 9}, token_budget=9)) == "partial"


def test_a_run_without_its_ranker_is_refused(tmp_path: Path, users: Path) -> None:
    settings = fake_shop.config(tmp_path / "runs")
    with pytest.raises(ArtifactError, match="stage 'score' needs 'items', which is missing"):
        scoring.prepare(settings, str(users), str(tmp_path / "scored"))


def call(tmp_path: Path, users: Path, *options: str) -> Result:
    settings = fake_shop.config(tmp_path / "runs")
    if not (tmp_path / "runs").exists():
        fake_shop.make(settings)
    (tmp_path / "run.json").write_text(settings.to_json())
    arguments = ["score", str(tmp_path / "run.json"), "--input", str(users), "--output", str(tmp_path / "scored")]
    return CliRunner().invoke(cli.app, [*arguments, *options])


def test_a_dry_run_says_what_would_be_scored_and_writes_nothing(tmp_path: Path, users: Path) -> None:
    done = call(tmp_path, users, "--dry-run", "--top-n", "2", "--variant", "none", "--set", "score.shard_users=3")
    assert done.exit_code == 0, done.output
    shown = json.loads(done.stdout)["score"]
    assert (shown["variant"], shown["top_n"], shown["shard_users"]) == ("none", 2, 3)
    assert "8 users in 3 parts, ranked by none@" in done.stderr
    assert not (tmp_path / "scored").exists()


def test_the_command_says_in_one_line_what_is_wrong(tmp_path: Path, users: Path) -> None:
    wrong = call(tmp_path, users, "--variant", "base")
    assert (wrong.exit_code, "score.variant (base) is not among ranker.variants" in wrong.stderr) == (2, True)
    absent = call(tmp_path, tmp_path / "absent.parquet")
    assert (absent.exit_code, "holds no users" in absent.stderr) == (2, True)
    prepared(tmp_path, users, top_n=9).stage.begin()
    foreign = call(tmp_path, users)
    assert (foreign.exit_code, "Give another --output" in foreign.stderr) == (2, True)
