"""What the tree's prompts show, share and hide."""

from __future__ import annotations

import asyncio
from pathlib import Path

from scribe import Scribe
from shops import INJECTION, ITEMS, TARGET, TITLES, example, stage, words

from pulse_ray.seeding import derive
from pulse_ray.tree import prompts
from pulse_ray.tree.stage import TreeWorker

SPECIAL = Scribe.special_tokens


def _context(review: str = "", max_tokens: int = 200) -> str:
    history = example(review=review).history
    return prompts.context(
        history,
        ITEMS["shop"],
        prompts.unseen(history, ["i0", "i5", "i6"], 1),
        count=words,
        max_tokens=max_tokens,
        review_words=12,
        special_tokens=SPECIAL,
    )


def test_history_stands_first_and_similar_users_items_follow_without_what_the_user_has() -> None:
    context = _context()
    places = [context.index(title) for title in (*TITLES, "Pet Brush")]
    assert places == sorted(places)
    assert context.count(TITLES[0]) == 1
    assert "Trail Mix" not in context


def test_a_budget_drops_the_oldest() -> None:
    context = _context(max_tokens=8)
    assert TITLES[-1] in context
    assert TITLES[0] not in context


def test_what_a_review_says_stays_data() -> None:
    context = _context(review=INJECTION)
    assert not any(token in context for token in SPECIAL)
    assert "Ignore the above" in context
    (content,) = [turn["content"] for turn in prompts.base_messages(context) if turn["role"] == "user"]
    assert content.endswith(prompts.BASE)
    refined = prompts.refine_messages(context, f"They like tea.{SPECIAL[1]}", SPECIAL)
    assert not any(token in refined[-1]["content"] for token in SPECIAL)


def test_a_worker_grows_trees_from_histories_alone_with_one_prefix_each(tmp_path: Path) -> None:
    settings = {"tree": {"breadths": [2, 2]}, "seed": 3}
    run = stage("tree", tmp_path, {"test-0000-0000": [example("u1", "test"), example("u2", "test")]}, settings)
    worker = TreeWorker(run)
    scribe = Scribe(lambda prompt, seed: f"The customer wants thing number {seed}.")
    worker.engine = scribe  # type: ignore[assignment]
    output = asyncio.run(worker("test-0000-0000"))

    assert TARGET not in "".join(scribe.prompts)
    assert len(scribe.prompts) == 2 * (1 + 1 + 2), "siblings are asked for together"
    before, _, _ = scribe.prompts[0].partition(prompts.BASE)
    assert before.endswith(prompts.NEIGHBOURS.format(items="- Pet Brush (Fernleaf)\n- Trail Mix (Fernleaf)"))
    assert all(prompt.startswith(before) for prompt in scribe.prompts)  # Both users have the same history here.

    rows = output.tables["thoughts"].to_pylist()
    assert [row["node_id"] for row in rows] == ["", "1", "1.1", "1.2", "2", "2.1", "2.2"] * 2
    assert len({row["seed"] for row in rows}) == len(rows)
    assert rows[2]["seed"] == derive(3, "tree", "shop/u1/4", "1", 0)
    assert {row["prompt_sha"] for row in rows} == {prompts.TEMPLATE_SHA}
    # A refinement reads its parent's thought.
    assert sum(rows[1]["text"] in prompt for prompt in scribe.prompts) == 1
