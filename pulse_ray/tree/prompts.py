"""What the model reads when it grows a tree: history first, similar users' items next, the task last.

Everything up to the task is the same, byte for byte, in every prompt of a user's tree: the engine reads it once.
These functions take a `History`: the target is not there to leak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from pulse_ray.schema import History, Item
from pulse_ray.text import CountTokens, history_text, neutralise

SYSTEM = "You explain what shoppers want."

HISTORY = "A customer bought these products, oldest first:\n{history}\n\n"

NEIGHBOURS = "Customers with similar taste also bought:\n{items}\n\n"

BASE = (
    "Which feature do the products that this customer liked share? "
    "Say in two short sentences what the customer looks for in a product and will want next."
)

REFINE = (
    "Another reader guessed: {thought}\n\n"
    "Improve this guess. Which feature do the words of the products and reviews show? "
    "Say in two short sentences what the customer looks for in a product and will want next."
)

OPENING = "The customer looks for"
"""How every thought begins: small models keep to the point when the first words are given."""

TEMPLATE_SHA = hashlib.sha256("\0".join((SYSTEM, HISTORY, NEIGHBOURS, BASE, REFINE, OPENING)).encode()).hexdigest()[:12]
"""Names the wording: a tree that was grown under another one is stale."""


def context(
    history: History,
    items: Mapping[str, Item],
    neighbour_items: Sequence[str],
    *,
    count: CountTokens,
    max_tokens: int,
    review_words: int,
    special_tokens: Iterable[str] = (),
) -> str:
    """What all prompts of a tree begin with: the history, and items that similar users took and this one did not.

    Args:
        items: the domain's items by id.
        neighbour_items: items to show; none leaves that section out.
        count: tokens of a text.
        max_tokens: budget of the history.
        review_words: words kept of each review.
        special_tokens: control tokens of the model, which no text of others may contain.
    """
    lines = history_text(
        history, items, count=count, max_tokens=max_tokens, review_words=review_words, special_tokens=special_tokens
    )
    text = HISTORY.format(history=lines)
    if neighbour_items:
        shown = (items[one].text if one in items else one for one in neighbour_items)
        text += NEIGHBOURS.format(items="\n".join(f"- {neutralise(line, special_tokens)}" for line in shown))
    return text


def unseen(history: History, items: Sequence[str], limit: int) -> list[str]:
    """The first `limit` of `items` that the history does not hold."""
    seen = {step.item_id for step in history.interactions}
    return [item for item in items if item not in seen][:limit]


def base_messages(context: str) -> list[dict[str, str]]:
    """The conversation that asks for the base reason."""
    return _messages(context + BASE)


def refine_messages(context: str, thought: str, special_tokens: Iterable[str] = ()) -> list[dict[str, str]]:
    """The conversation that asks for a refinement of a thought."""
    return _messages(context + REFINE.format(thought=neutralise(thought, special_tokens)))


def _messages(content: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
