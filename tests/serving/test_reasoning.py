"""Reasons on the spot: the tree and its choice, written by a stand-in for the engine."""

from __future__ import annotations

import asyncio

from pulse_ray.serving.reasoning import Reasoning
from pulse_ray.serving.store import Found
from tests import shops
from tests.scribe import Scribe
from tests.serving import shop


def _reasoning(scribe: Scribe, selector: str) -> Reasoning:
    config = shop.config(shop.Path("unused"), tree={"breadths": [2, 2]})
    return Reasoning(config, scribe, shops.ITEMS, None, selector=selector, version="v")


def test_a_tree_is_grown_and_its_likeliest_leaf_chosen() -> None:
    scribe = Scribe(lambda prompt, seed: f"mild care number {seed % 97} for skin without perfume.")
    history = shops.example().history
    found = asyncio.run(_reasoning(scribe, "log_likelihood").reason(history))
    assert isinstance(found, Found)
    assert [node.node_id for node in found.tree] == ["", "1", "1.1", "1.2", "2", "2.1", "2.2"]
    assert found.reason.node_id == "1.1"
    assert (found.reason.agreement, found.reason.version) == (-1.0, "v")
    assert found.reason.text in {node.text for node in found.tree}
    # What everybody's prompts of the tree begin with, and no target.
    assert all("Fragrance-Free Soap" in prompt and shops.TARGET not in prompt for prompt in scribe.prompts)
    assert asyncio.run(_reasoning(scribe, "base").reason(history)).reason.node_id == ""  # type: ignore[union-attr]


def test_a_rejected_tree_says_why() -> None:
    found = asyncio.run(_reasoning(Scribe(lambda prompt, seed: "no"), "base").reason(shops.example().history))
    assert found == "the tree was rejected: too short"
