"""What the model reads when it grows a tree: history first, similar users' items next, the task last.

Everything up to the task is the same, byte for byte, in every prompt of a user's tree: the engine reads it once.
These functions take a `History`: the target is not there to leak.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from pulse_ray import templates
from pulse_ray.schema import History, Item
from pulse_ray.text import CountTokens, history_text, neutralise

STAGE = "tree"
"""Whose templates these are."""


def context(
    history: History,
    items: Mapping[str, Item],
    neighbour_items: Sequence[str],
    *,
    version: str,
    count: CountTokens,
    max_tokens: int,
    review_words: int,
    special_tokens: Iterable[str] = (),
) -> str:
    """What all prompts of a tree begin with: the history, and items that similar users took and this one did not.

    Args:
        items: the domain's items by id.
        neighbour_items: items to show; none leaves that section out.
        version: of the template.
        count: tokens of a text.
        max_tokens: budget of the history.
        review_words: words kept of each review.
        special_tokens: control tokens of the model, which no text of others may contain.
    """
    lines = history_text(
        history, items, count=count, max_tokens=max_tokens, review_words=review_words, special_tokens=special_tokens
    )
    text = templates.fill(STAGE, version, "history", history=lines)
    if neighbour_items:
        shown = (items[one].text if one in items else one for one in neighbour_items)
        listed = "\n".join(f"- {neutralise(line, special_tokens)}" for line in shown)
        text += templates.fill(STAGE, version, "neighbours", items=listed)
    return text


def unseen(history: History, items: Sequence[str], limit: int) -> list[str]:
    """The first `limit` of `items` that the history does not hold."""
    seen = {step.item_id for step in history.interactions}
    return [item for item in items if item not in seen][:limit]


def base_task(version: str) -> str:
    """What asks for the base reason: the end of its prompt."""
    return templates.fill(STAGE, version, "base")


def refine_task(version: str, thought: str, special_tokens: Iterable[str] = ()) -> str:
    """What asks for a refinement of a thought: the end of its prompt."""
    return templates.fill(STAGE, version, "refine", thought=neutralise(thought, special_tokens))


def messages(version: str, context: str, task: str) -> list[dict[str, str]]:
    """The conversation that sets a task in a context."""
    system = templates.fill(STAGE, version, "system")
    return [{"role": "system", "content": system}, {"role": "user", "content": context + task}]


def opening(version: str) -> str:
    """How every thought begins."""
    return templates.fill(STAGE, version, "opening")
