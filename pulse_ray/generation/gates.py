"""What a completion must be to be kept, and the draw that tries again with another seed where it is not."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from pulse_ray.config import SamplingConfig
from pulse_ray.generation.engine import Completion

MIN_DISTINCT = 0.6
"""A text whose share of distinct three-word runs is lower repeats itself."""

MAX_COPIED = 0.5
"""A text of which a larger share of three-word runs stands in the instruction copies it."""

_RUN = 3
_WORD = re.compile(r"\w+(?:['’-]\w+)*")
_SENTENCE_END = re.compile(r"[.!?][\"'”’)]?(?=\s|$)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flaw:
    """Why no completion was kept: a short countable reason, and the last text that was refused."""

    reason: str
    detail: str


class Writer(Protocol):
    """The part of `generation.engine.Engine` that a draw needs."""

    def fits(self, prompt: str, sampling: SamplingConfig) -> bool: ...

    async def complete(self, prompt: str, n: int, seed: int, sampling: SamplingConfig) -> list[Completion]: ...


async def draw(
    writer: Writer,
    prompt: str,
    instruction: str,
    sampling: SamplingConfig,
    seed: Callable[[int], int],
    opening: str = "",
    n: int = 1,
) -> list[Completion | Flaw]:
    """`n` completions that pass the gates, or for each that does not, why.

    Args:
        prompt: what the model reads.
        instruction: the part of it that a weak model might repeat instead of following.
        seed: the seed of each attempt, counted from 0; siblings take the seeds that follow it.
        opening: words that the answer begins with; the model goes on from them, and the gates judge what it adds.
    """
    prompt += opening
    if not writer.fits(prompt, sampling):
        return [Flaw(reason="prompt too long", detail=f"{len(prompt)} characters")] * n
    drawn: list[Completion | Flaw] = [Flaw(reason="empty", detail="")] * n
    for attempt in range(sampling.attempts):
        lacking = [place for place, one in enumerate(drawn) if isinstance(one, Flaw)]
        if not lacking:
            break
        completions = await writer.complete(prompt, len(lacking), seed(attempt), sampling)
        for place, completion in zip(lacking, completions, strict=True):
            text = tidy(completion.text, cut=completion.finish_reason == "length", min_words=sampling.min_words)
            reason = fault(text, instruction, sampling.min_words)
            drawn[place] = (
                Flaw(reason=reason, detail=text) if reason else replace(completion, text=f"{opening} {text}".strip())
            )
    return drawn


def tidy(text: str, *, cut: bool, min_words: int) -> str:
    """Text on one line; where the model was `cut` off, up to its last whole sentence, if that leaves enough words.

    >>> tidy(" They like\\n\\ntea. They also like", cut=True, min_words=3)
    'They like tea.'
    >>> tidy("They like 2.5 litres of", cut=True, min_words=3)
    'They like 2.5 litres of'
    """
    text = " ".join(text.split())
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] if cut else []
    whole = text[: ends[-1]] if ends else ""
    return whole if whole and len(_words(whole)) >= min_words else text


def fault(text: str, instruction: str, min_words: int) -> str | None:
    """Why a text is degenerate, or None.

    >>> fault("They want tea.", "Say what they want.", 5)
    'too short'
    >>> fault("they like tea and they like tea and they like tea and", "Say what they want.", 5)
    'repeats itself'
    """
    words = _words(text)
    if not words:
        return "empty"
    if len(words) < min_words:
        return "too short"
    runs = _runs(words)
    if runs and len(set(runs)) < MIN_DISTINCT * len(runs):
        return "repeats itself"
    given = set(_runs(_words(instruction)))
    if runs and sum(run in given for run in runs) > MAX_COPIED * len(runs):
        return "copies the instruction"
    return None


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _runs(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1)]
