"""Reasons on the spot: the tree and its choice, written by a stand-in for the engine."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from pulse_ray.serving import reasoning
from pulse_ray.serving.reasoning import Reasoning
from pulse_ray.serving.store import Found
from pulse_ray.thought_space.encoders import Encoders
from pulse_ray.workspace import Workspace
from tests import shops, tiny
from tests.scribe import Scribe
from tests.serving import shop


def _mild() -> Scribe:
    return Scribe(lambda prompt, seed: f"mild care number {seed % 97} for skin without perfume.")


def _reasoning(scribe: Scribe, variant: str, folder: Path = Path("unused"), **sections: Any) -> Reasoning:
    ranker = {"model": "unused", "variants": [variant]}
    config = shop.config(folder, ranker=ranker, **{"tree": {"breadths": [2, 2]}, **sections})
    return reasoning.load(config, scribe, shops.ITEMS, Workspace(str(folder), "tiny-shop").artefact("encoders"))


def test_a_tree_is_grown_and_its_likeliest_leaf_chosen() -> None:
    scribe = _mild()
    history = shops.example().history
    found = asyncio.run(_reasoning(scribe, "log_likelihood").reason(history))
    assert isinstance(found, Found)
    assert [node.node_id for node in found.tree] == ["", "1", "1.1", "1.2", "2", "2.1", "2.2"]
    assert found.reason.node_id == "1.1"
    assert (found.reason.agreement, found.reason.version) == (-1.0, "log_likelihood@online")
    assert found.reason.text in {node.text for node in found.tree}
    # What everybody's prompts of the tree begin with, and no target.
    assert all("Fragrance-Free Soap" in prompt and shops.TARGET not in prompt for prompt in scribe.prompts)
    assert asyncio.run(_reasoning(scribe, "base").reason(history)).reason.node_id == ""  # type: ignore[union-attr]


def test_a_rejected_tree_says_why() -> None:
    found = asyncio.run(_reasoning(Scribe(lambda prompt, seed: "no"), "base").reason(shops.example().history))
    assert found == "the tree was rejected: too short"


@pytest.mark.parametrize("variant", ["thought_space", "sbert", "encoder_base", "random", "base"])
def test_a_beam_and_every_selector_work_online_as_they_do_in_the_run(tmp_path: Path, variant: str) -> None:
    model = str(tiny.make_encoder(tmp_path / "bert"))
    encoders = Path(Workspace(str(tmp_path), "tiny-shop").artefact("encoders").path)
    Encoders.create(model, 96, shared=True).save(encoders)
    sections = {
        "tree": {"breadths": [3, 2], "beam_width": 1},
        "thought_space": {"model": model, "max_tokens": 96, "text": {"history_tokens": 60}},
        "select": {"selectors": ["thought_space", "sbert", "encoder_base", "random"], "sbert_model": model},
    }
    made = _reasoning(_mild(), variant, tmp_path, **sections)
    assert (made.comparing is not None) == (variant not in ("random", "base"))
    found = asyncio.run(made.reason(shops.example().history))
    assert isinstance(found, Found)
    first = [node for node in found.tree if node.depth == 1]
    best = max(first, key=lambda node: node.agreement or -1.0)
    leaves = [node.node_id for node in found.tree if node.leaf]
    assert leaves == [f"{best.node_id}.1", f"{best.node_id}.2"]
    assert found.reason.node_id in ([""] if variant == "base" else leaves)
