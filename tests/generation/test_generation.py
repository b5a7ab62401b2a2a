"""A real engine, a real pool: trees of a tiny random model, written shard by shard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
from shops import example, stage

from pulse_ray.errors import GenerationError
from pulse_ray.generation import pool
from pulse_ray.schema import Example, Reject
from pulse_ray.seeding import derive
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.tree import stage as tree

Rows = dict[tuple[str, str], dict[str, Any]]
PLAIN = ("text", "num_tokens", "seed", "finish_reason", "leaf", "prompt_sha")

USERS = [f"u{number}" for number in range(8)]
TOGETHER = {"train-0000-0000": [example(user) for user in USERS]}
APART = {f"train-0000-{place:04d}": [example(user) for user in USERS[place::4]] for place in range(4)}
"""The same examples as one part, and as four in another order."""


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Random weights write anything, so that nothing but emptiness is a flaw."""
    engine = {"model": str(tiny.make(tmp_path_factory.mktemp("tiny"))), "dtype": "float32", "kv_cache_gb": 0.25}
    sampling = {"max_tokens": 12, "gates": [], "attempts": 3}
    return {
        "engine": {**engine, "max_num_seqs": 16},
        "tree": {
            "breadths": [2, 1],
            "beam_width": 1,
            "temperatures": [0.0, 0.8, 0.8],
            "sampling": sampling,
            "text": {"history_tokens": 120},
        },
    }


def _grown(folder: Path, parts: dict[str, list[Example]], settings: dict[str, Any], engines: int) -> Rows:
    pool = {"min": engines, "max": engines}
    run = stage("tree", folder, parts, {**settings, "engine": {**settings["engine"], "pool": pool}})
    encoders = Encoders.create(str(tiny.make_encoder(folder / "bert")), 64, shared=False)
    encoders.save(Path(run.workspace.artefact("encoders").path))
    figures = tree.run(run)["thoughts"]
    assert 0 < figures["cached_tokens"] < figures["prompt_tokens"]
    assert run.output("thoughts").parts() == sorted(parts)
    rows = [row for data in run.output("thoughts").tables() for row in data.to_pylist()]
    return {(row["example_id"], row["node_id"]): row for row in rows}


@pytest.fixture(scope="module")
def together(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, settings: dict[str, Any]) -> Rows:
    """Trees of one engine that is given one part."""
    return _grown(tmp_path_factory.mktemp("together"), TOGETHER, settings, 1)


def test_trees_are_written_whole_and_seeded_along_their_beam(together: Rows) -> None:
    for user in USERS:
        grown = {node: row for (key, node), row in together.items() if key == f"shop/{user}/4"}
        best = max("1", "2", key=lambda node: grown[node]["agreement"])
        assert set(grown) == {"", "1", "2", f"{best}.1"}
        assert [node for node, row in grown.items() if row["leaf"]] == [f"{best}.1"]
        assert grown[""]["seed"] in [derive(0, "tree", f"shop/{user}/4", "base", attempt) for attempt in range(3)]
        assert grown["1"]["text"] != grown["2"]["text"]
    assert all(row["mean_logprob"] < 0 < row["num_tokens"] <= 12 for row in together.values())
    # All users have the same history: a greedy base reason is the same, what is sampled below it differs.
    assert len({row["text"] for (_, node), row in together.items() if node == ""}) == 1
    assert len({row["text"] for (_, node), row in together.items() if node == "1"}) == len(USERS)


def test_trees_do_not_depend_on_how_many_engines_and_parts_there_are(
    together: Rows, tmp_path: Path, settings: dict[str, Any]
) -> None:
    apart = _grown(tmp_path, APART, settings, 2)
    assert apart.keys() == together.keys()
    for key, row in apart.items():
        twin = together[key]
        assert {name: row[name] for name in PLAIN} == {name: twin[name] for name in PLAIN}
        assert row["mean_logprob"] == pytest.approx(twin["mean_logprob"], abs=1e-4)


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_rejects_stop_the_stage_and_leave_what_is_written(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = stage("tree", tmp_path, TOGETHER, settings)
    monkeypatch.setattr(pool, "run_shards", lambda *_, **__: {})  # Every part was committed before.
    run.reject("train-0000-0000", [Reject(key="shop/u2/4", reason="too short")])
    with pytest.raises(GenerationError, match=r"1 examples, more than 10%: 1 too short"):
        tree.run(run)
    assert run.rejected() == {"too short": 1}
