"""The stage with a beam: what it compares, what it keeps, and when it reads the encoders at all."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scribe import Scribe
from shops import ITEMS, example, stage
from tiny import make_encoder

from pulse_ray.config import Config
from pulse_ray.pipeline import STAGES, plan
from pulse_ray.schema import History
from pulse_ray.text import behaviour_text
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.tree.stage import TreeWorker
from pulse_ray.workspace import StageRun

PART = "test-0000-0000"
GOODS = ("soap", "balm", "towels", "tea", "wool", "lamps", "shoes", "paper")


def _answer(prompt: str, seed: int) -> str:
    return f"{GOODS[seed % 8]} and {GOODS[seed // 8 % 8]} that will last for {seed % 97} years."


def _stage(folder: Path, tree: dict[str, Any]) -> StageRun:
    settings = {
        "tree": tree,
        "seed": 3,
        "thought_space": {"text": {"history_tokens": 40}, "max_tokens": 64, "shared_tower": False},
        "select": {"protocol": "oracle"},
    }
    users = [example(f"u{number}", "test", review=f"For {GOODS[number]}") for number in range(4)]
    return stage("tree", folder, {PART: users}, settings)


def _grown(run: StageRun) -> list[dict[str, Any]]:
    worker = TreeWorker(run)
    worker.engine = Scribe(_answer)  # type: ignore[assignment]
    return list(asyncio.run(worker(PART)).tables["thoughts"].to_pylist())


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> Encoders:
    return Encoders.create(str(make_encoder(tmp_path_factory.mktemp("bert"))), 64, shared=False).eval()


def test_a_beam_refines_what_agrees_best_with_each_history(tmp_path: Path, encoders: Encoders) -> None:
    run = _stage(tmp_path, {"breadths": [3, 3, 2], "beam_width": 2})
    encoders.save(Path(run.workspace.artefact("encoders").path))
    rows = _grown(run)
    assert _grown(run) == rows
    refined: set[tuple[str, ...]] = set()
    for user in range(4):
        history = example(f"u{user}", "test", review=f"For {GOODS[user]}").history
        tree = {row["node_id"]: row for row in rows if row["example_id"] == history.example_id}
        assert len(tree) == 1 + 3 + 6 + 4
        anchor = encoders.encode("history", [_behaviour(history, encoders)])[0]
        for depth in (1, 2):
            level = [row for row in tree.values() if row["depth"] == depth]
            cosines = encoders.encode("rationale", [row["text"] for row in level]) @ anchor
            np.testing.assert_allclose([row["agreement"] for row in level], cosines, atol=1e-5)
            best = {level[place]["node_id"] for place in np.argsort(-cosines, kind="stable")[:2]}
            assert {one.rpartition(".")[0] for one in tree if one.count(".") == depth} == best
            refined.add((str(depth), *sorted(best)))
        assert [row["node_id"] for row in tree.values() if row["leaf"]] == [one for one in tree if one.count(".") == 2]
        assert all(tree[one]["agreement"] is None for one in tree if one == "" or one.count(".") == 2)
    assert len(refined) > 2, "all histories chose alike"


def test_a_tree_that_no_beam_prunes_is_the_tree_without_one(tmp_path: Path, encoders: Encoders) -> None:
    run = _stage(tmp_path / "wide", {"breadths": [3, 2], "beam_width": 9})
    encoders.save(Path(run.workspace.artefact("encoders").path))
    plain = _stage(tmp_path / "plain", {"breadths": [3, 2]})
    assert _grown(run) == _grown(plain)
    with pytest.raises(AssertionError, match="does not declare the input encoders"):
        plain.input("encoders")


def test_each_level_has_its_temperature(tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []

    class Warm(Scribe):
        async def complete(self, prompt: str, n: int, seed: int, sampling: Any) -> Any:
            seen.append(("refined" if "guessed" in prompt else "base", sampling.temperature))
            return await super().complete(prompt, n, seed, sampling)

    worker = TreeWorker(_stage(tmp_path, {"breadths": [1, 1], "temperatures": [0.1, 0.5, 0.9]}))
    worker.engine = Warm(_answer)  # type: ignore[assignment]
    asyncio.run(worker(PART))
    assert sorted(seen) == [("base", 0.1)] * 4 + [("refined", 0.5)] * 4 + [("refined", 0.9)] * 4


def test_the_thought_space_shapes_trees_and_choices_only_where_they_read_it(tmp_path: Path) -> None:
    def stale(tree: dict[str, Any], selectors: list[str], change: dict[str, Any]) -> set[str]:
        base = {
            "name": "run",
            "storage": str(tmp_path),
            "prepare": {"domains": [{"name": "shop", "source": {"kind": "synthetic"}}]},
            "tree": tree,
            "select": {"selectors": selectors},
            "ranker": {"variants": ["none"]},
        }
        before, after = (plan(Config.model_validate({**base, "thought_space": one})) for one in ({}, change))
        return {name for name in STAGES if before[name].fingerprint != after[name].fingerprint} & {"tree", "select"}

    trained, text = {"temperature": 0.1}, {"text": {"history_tokens": 100}}
    assert stale({}, ["log_likelihood", "sbert"], trained) == set()
    assert stale({}, ["encoder_base"], text) == stale({}, ["sbert"], text) == {"select"}
    assert stale({}, ["encoder_base"], {"model": "another"}) == {"select"}
    assert stale({}, ["thought_space"], trained) == {"select"}
    assert stale({"beam_width": 2}, ["log_likelihood"], trained) == {"tree", "select"}


def _behaviour(history: History, encoders: Encoders) -> str:
    return behaviour_text(
        history, ITEMS["shop"], None, count=encoders.counter("history"), max_tokens=40, review_words=24
    )
