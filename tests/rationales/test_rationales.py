"""Phase I: the one prompt that shows the target, for training examples alone."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
from scribe import Scribe
from shops import INJECTION, ITEMS, TARGET, TITLES, example, stage, words

from pulse_ray.rationales import prompts
from pulse_ray.rationales.stage import RationaleWorker
from pulse_ray.schema import Interaction


def test_the_prompt_shows_history_then_target_and_asks_last() -> None:
    turns = prompts.rationale_messages(
        example(review=INJECTION),
        ITEMS["shop"],
        version="v1",
        count=words,
        max_tokens=200,
        review_words=12,
        special_tokens=Scribe.special_tokens,
    )
    content = turns[-1]["content"]
    places = [content.index(text) for text in (*TITLES, TARGET, prompts.instruction("v1"))]
    assert places == sorted(places)
    assert content.endswith(prompts.instruction("v1"))
    assert not any(token in content for token in Scribe.special_tokens)


PROMPT_V1 = """\
A customer bought these products, oldest first:
- Unscented Hand Cream (Fernleaf) | rated 5/5
- Hypoallergenic Shampoo (Fernleaf) | rated 5/5
- Gym Towel (Fernleaf) | rated 5/5
- Fragrance-Free Soap (Fernleaf) | rated 4/5 | "No perfume, my skin stays calm"

Then the customer chose: Zyxwort Balm (Fernleaf)

Why did the customer choose it? Which feature does it share with the products bought before? Say in two short \
sentences what the customer looks for in a product."""


def test_the_wording_of_v1_stays_as_it_was() -> None:
    turns = prompts.rationale_messages(
        example(), ITEMS["shop"], version="v1", count=words, max_tokens=200, review_words=12
    )
    assert turns == [
        {"role": "system", "content": "You explain what shoppers want."},
        {"role": "user", "content": PROMPT_V1},
    ]
    assert prompts.opening("v1") == "The customer looks for"


def test_the_targets_own_review_cannot_be_shown() -> None:
    """An example names its target; only a step of the history carries a rating or a review."""
    one = example()
    longer = replace(one.history, interactions=(*one.history.interactions, Interaction(item_id="i5", timestamp=10)))
    texts = [
        prompts.rationale_messages(
            replace(one, history=history), ITEMS["shop"], version="v1", count=words, max_tokens=200, review_words=9
        )
        for history in (one.history, longer)
    ]
    lines = [turns[-1]["content"].splitlines() for turns in texts]
    assert sum(TARGET in line for line in lines[0]) == 1
    assert f"Then the customer chose: {TARGET} (Fernleaf)" in lines[0]


def test_a_worker_writes_for_every_example_or_says_why_not(tmp_path: Path) -> None:
    given = [example("u1"), example("u2"), example("u3", review="so so")]
    run = stage("rationales", tmp_path, {"train-0000-0000": given}, {"rationales": {"sampling": {"attempts": 2}}})
    worker = RationaleWorker(run)
    scribe = Scribe(lambda prompt, seed: "Hm." if "so so" in prompt else "The customer wants things without perfume.")
    worker.engine = scribe  # type: ignore[assignment]
    output = asyncio.run(worker("train-0000-0000"))

    rows = output.tables["rationales"].to_pylist()
    assert [row["example_id"] for row in rows] == ["shop/u1/4", "shop/u2/4"]
    assert rows[0]["seed"] != rows[1]["seed"]
    (reject,) = output.rejects
    assert (reject.key, reject.reason, reject.detail) == ("shop/u3/4", "too short", "Hm.")
    assert len(scribe.prompts) == 2 + 2


def test_held_out_examples_are_refused(tmp_path: Path) -> None:
    run = stage("rationales", tmp_path, {"test-0000-0000": [example(split="test")]}, {})
    worker = RationaleWorker(run)
    worker.engine = Scribe(lambda prompt, seed: "")  # type: ignore[assignment]
    with pytest.raises(AssertionError, match="held out"):
        asyncio.run(worker("test-0000-0000"))
