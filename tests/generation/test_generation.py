"""A real engine, a real pool: trees of a tiny random model, written shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from shops import example, stage

from pulse_ray.errors import GenerationError
from pulse_ray.generation import pool
from pulse_ray.schema import Reject
from pulse_ray.seeding import derive
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.tree import stage as tree

PARTS = {"train-0000-0000": [example("u1"), example("u2")], "test-0000-0000": [example("u1", "test")]}
"""The example of `u1` stands in two parts: what is written for it must not depend on the shard that it comes in."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random weights write anything, so that nothing but emptiness is a flaw."""
    engine = {"model": str(tiny.make(tmp_path_factory.mktemp("tiny"))), "dtype": "float32", "kv_cache_gb": 0.25}
    sampling = {"max_tokens": 12, "gates": [], "attempts": 3}
    return {
        "engine": {**engine, "max_num_seqs": 16},
        "tree": {"breadths": [2, 1], "beam_width": 1, "sampling": sampling, "text": {"history_tokens": 120}},
    }


@pytest.mark.usefixtures("ray_cluster")
def test_trees_are_written_whole_seeded_and_apart_from_their_shard(tmp_path: Path, settings: dict[str, Any]) -> None:
    run = stage("tree", tmp_path, PARTS, settings)
    encoders = Encoders.create(str(tiny.make_encoder(tmp_path / "bert")), 64, shared=False)
    encoders.save(Path(run.workspace.artefact("encoders").path))
    tree.run(run)
    thoughts = {part: run.output("thoughts").read(part).to_pylist() for part in run.output("thoughts").parts()}
    assert set(thoughts) == set(PARTS)
    rows = thoughts["train-0000-0000"]
    for user in ("u1", "u2"):
        grown = {row["node_id"]: row for row in rows if row["example_id"] == f"shop/{user}/4"}
        best = max("1", "2", key=lambda node: grown[node]["agreement"])
        assert set(grown) == {"", "1", "2", f"{best}.1"}
        assert [node for node, row in grown.items() if row["leaf"]] == [f"{best}.1"]
    assert all(row["mean_logprob"] < 0 < row["num_tokens"] <= 12 for row in rows)
    assert rows[0]["seed"] in [derive(0, "tree", "shop/u1/4", "base", attempt) for attempt in range(3)]
    assert len({row["text"] for row in rows}) == len(rows)
    for row, twin in zip(rows[:4], thoughts["test-0000-0000"], strict=True):
        assert row.pop("mean_logprob") == pytest.approx(twin.pop("mean_logprob"), abs=1e-4)
        assert row == twin


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_rejects_stop_the_stage_and_leave_what_is_written(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage("tree", tmp_path, PARTS, settings)
    monkeypatch.setattr(pool, "run_shards", lambda *_, **__: {})  # Every part was committed before.
    run.reject("train-0000-0000", [Reject(key="shop/u2/4", reason="too short")])
    with pytest.raises(GenerationError, match=r"1 examples, more than 10%: 1 too short"):
        tree.run(run)
    assert run.rejected() == {"too short": 1}
