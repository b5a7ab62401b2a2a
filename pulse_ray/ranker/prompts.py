"""The ranker's prompt: history and reason first, then one candidate. Plain text; `ranker.packing` turns it into tokens.

Everything here takes a `History`: the target of an example cannot reach it except as one of the candidates.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from pulse_ray.schema import History, Item

INSTRUCTION = "What one customer bought and said, oldest first:\n{history}\n"
REASON = "\nReason: {reason}\n"
QUESTION = "\nWhich item does the customer choose next?"
CANDIDATE = "{item}\nFit:"
"""A candidate is read as the assistant's answer; the logit is taken at its last token, which is the same for all."""

TEMPLATE_SHA = hashlib.sha256("\0".join([INSTRUCTION, REASON, QUESTION, CANDIDATE]).encode()).hexdigest()[:12]


@dataclass(frozen=True, kw_only=True, slots=True)
class RankRow:
    """What is ranked: candidates for a history, with the reason found for it, if any."""

    history: History
    reason: str | None
    candidates: tuple[Item, ...]


def question(history_text: str, reason: str | None) -> str:
    """The user's turn: all that stands before a candidate.

    Args:
        history_text: from `text.history_text`.
        reason: the chosen reason; None leaves its line out.
    """
    return INSTRUCTION.format(history=history_text) + (REASON.format(reason=reason) if reason else "") + QUESTION


def answer(item_text: str) -> str:
    """The assistant's turn for one candidate."""
    return CANDIDATE.format(item=item_text)
