"""What the model reads in Phase I: a history and the item that was chosen after it, and the question why.

This is the only prompt that knows the target. It is written for training examples alone, and shows the target's text
but neither its rating nor its review.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

from pulse_ray import templates
from pulse_ray.schema import Example, Item
from pulse_ray.text import CountTokens, history_text, neutralise

STAGE = "rationales"
"""Whose templates these are."""


def rationale_messages(
    example: Example,
    items: Mapping[str, Item],
    *,
    version: str,
    count: CountTokens,
    max_tokens: int,
    review_words: int,
    special_tokens: Iterable[str] = (),
) -> list[dict[str, str]]:
    """The conversation that asks why the target was chosen.

    Args:
        items: the domain's items by id.
        version: of the template.
        count: tokens of a text.
        max_tokens: budget of the history.
        review_words: words kept of each review.
        special_tokens: control tokens of the model, which no text of others may contain.
    """
    fill = partial(templates.fill, STAGE, version)
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
    content = fill("history", history=lines) + fill("choice", target=target) + fill("instruction")
    return [{"role": "system", "content": fill("system")}, {"role": "user", "content": content}]


def instruction(version: str) -> str:
    """What the model is asked to do: the end of the prompt."""
    return templates.fill(STAGE, version, "instruction")


def opening(version: str) -> str:
    """How every rationale begins."""
    return templates.fill(STAGE, version, "opening")
