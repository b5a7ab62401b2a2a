"""What the model reads in Phase I: a history and the item that was chosen after it, and the question why.

This is the only prompt that knows the target. It is written for training examples alone, and shows the target's text
but neither its rating nor its review.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from pulse_ray.schema import Example, Item
from pulse_ray.text import CountTokens, history_text, neutralise

SYSTEM = "You explain what shoppers want."

HISTORY = "A customer bought these products, oldest first:\n{history}\n\n"

CHOICE = "Then the customer chose: {target}\n\n"

INSTRUCTION = (
    "Why did the customer choose it? Which feature does it share with the products bought before? "
    "Say in two short sentences what the customer looks for in a product."
)

OPENING = "The customer looks for"
"""How every rationale begins: small models keep to the point when the first words are given."""

TEMPLATE_SHA = hashlib.sha256("\0".join((SYSTEM, HISTORY, CHOICE, INSTRUCTION, OPENING)).encode()).hexdigest()[:12]
"""Names the wording: rationales that were written under another one are stale."""


def rationale_messages(
    example: Example,
    items: Mapping[str, Item],
    *,
    count: CountTokens,
    max_tokens: int,
    review_words: int,
    special_tokens: Iterable[str] = (),
) -> list[dict[str, str]]:
    """The conversation that asks why the target was chosen.

    Args:
        items: the domain's items by id.
        count: tokens of a text.
        max_tokens: budget of the history.
        review_words: words kept of each review.
        special_tokens: control tokens of the model, which no text of others may contain.
    """
    lines = history_text(
        example.history,
        items,
        count=count,
        max_tokens=max_tokens,
        review_words=review_words,
        special_tokens=special_tokens,
    )
    item = items.get(example.target_item)
    target = neutralise(item.text if item else example.target_item, special_tokens)
    content = HISTORY.format(history=lines) + CHOICE.format(target=target) + INSTRUCTION
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": content}]
