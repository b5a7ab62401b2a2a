"""What the tree's prompts show, share and hide."""

from __future__ import annotations

import asyncio
from pathlib import Path

from scribe import Scribe
from shops import INJECTION, ITEMS, TARGET, TITLES, example, stage, words

from pulse_ray import templates
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
        version="v1",
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
    refined = prompts.refine_task("v1", f"They like tea.{SPECIAL[1]}", SPECIAL)
    assert not any(token in refined for token in SPECIAL)


CONTEXT_V1 = """\
A customer bought these products, oldest first:
- Unscented Hand Cream (Fernleaf) | rated 5/5
- Hypoallergenic Shampoo (Fernleaf) | rated 5/5
- Gym Towel (Fernleaf) | rated 5/5
- Fragrance-Free Soap (Fernleaf) | rated 4/5 | "{{ 7 * 6 }} <b> & 'more'"

Customers with similar taste also bought:
- Pet Brush (Fernleaf)

"""
BASE_V1 = """\
Which feature do the products that this customer liked share? Say in two short sentences what the customer looks for \
in a product and will want next."""
REFINE_V1 = """\
Another reader guessed: They like {{ tea }}.

Improve this guess. Which feature do the words of the products and reviews show? Say in two short sentences what the \
customer looks for in a product and will want next."""


def test_the_wording_of_v1_stays_as_it_was_and_what_strangers_write_is_no_template() -> None:
    context = _context(review='{{ 7 * 6 }} <b> & "more"')
    for task, golden in (
        (prompts.base_task("v1"), BASE_V1),
        (prompts.refine_task("v1", "They like {{ tea }}."), REFINE_V1),
    ):
        assert prompts.messages("v1", context, task) == [
            {"role": "system", "content": "You explain what shoppers want."},
            {"role": "user", "content": CONTEXT_V1 + golden},
        ]
    assert prompts.opening("v1") == "The customer looks for"


def test_a_worker_grows_trees_from_histories_alone_with_one_prefix_each(tmp_path: Path) -> None:
    settings = {"tree": {"breadths": [2, 2]}, "seed": 3}
    run = stage("tree", tmp_path, {"test-0000-0000": [example("u1", "test"), example("u2", "test")]}, settings)
    worker = TreeWorker(run)
    scribe = Scribe(lambda prompt, seed: f"The customer wants thing number {seed}.")
    worker.engine = scribe  # type: ignore[assignment]
    output = asyncio.run(worker("test-0000-0000"))

    assert TARGET not in "".join(scribe.prompts)
    assert len(scribe.prompts) == 2 * (1 + 1 + 2), "siblings are asked for together"
    before, _, _ = scribe.prompts[0].partition(prompts.base_task("v1"))
    assert before.endswith("also bought:\n- Pet Brush (Fernleaf)\n- Trail Mix (Fernleaf)\n\n")
    assert all(prompt.startswith(before) for prompt in scribe.prompts)  # Both users have the same history here.

    rows = output.tables["thoughts"].to_pylist()
    assert [row["node_id"] for row in rows] == ["", "1", "1.1", "1.2", "2", "2.1", "2.2"] * 2
    assert len({row["seed"] for row in rows}) == len(rows)
    assert rows[2]["seed"] == derive(3, "tree", "shop/u1/4", "1", 0)
    assert {row["prompt_sha"] for row in rows} == {templates.sha("tree", "v1")}
    # A refinement reads its parent's thought.
    assert sum(rows[1]["text"] in prompt for prompt in scribe.prompts) == 1
