"""What a completion must be to be kept, and the draw that tries again with another seed where it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Protocol

import regex

from pulse_ray.config import SamplingConfig
from pulse_ray.generation.engine import Completion, RequestError
from pulse_ray.generation.language import is_foreign
from pulse_ray.generation.names import ItemNames
from pulse_ray.schema import History, Item
from pulse_ray.text import clip_words, words

MIN_DISTINCT = 0.65
"""A text whose share of distinct three-word runs is lower repeats itself."""

MAX_COPIED = 0.5
"""A text of which a larger share of three-word runs stands in the task, in reviews or in the prompt copies them."""

MAX_KEPT = 0.9
"""A text of which a larger share of three-word runs stands in the thought that it was to improve left it as it was."""

MIN_COPIED_RUNS = 6
"""A text of fewer runs than this, which is one of eight words, may fall together with a line of the prompt."""

_RUN = 3
# A full stop after "St" or "e.g" ends no sentence. Thai and Lao have no mark: what is cut off in them is refused whole.
_ABBREVIATED = r"\b(?:St|Dr|Mr|Mrs|Ms|No|Vol|approx|e\.g|i\.e|vs)"
_SENTENCE_END = regex.compile(
    rf"(?:(?<!{_ABBREVIATED})\.|[!?])[\p{{Pe}}\p{{Pf}}\"']?(?=\s|$)|[。．｡！？؟۔।॥։።။។།][\p{{Pe}}\p{{Pf}}\"']?"
)
_Run = tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Flaw:
    """Why no completion was kept: a short countable reason, and the last text that was refused."""

    reason: str
    detail: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """A prompt, and what of it a completion is judged by.

    Args:
        prompt: what the model reads.
        task: its end: what a weak model might repeat instead of following.
        opening: words that the answer begins with; the model goes on from them, and the gates judge what it adds.
        thought: the one that the completion is to improve; empty where it is the first.
        reviews: of the history.
        titles: of items that a completion may name: the history's, and others that the prompt shows.
        names: what the domain's items are called; None where nobody asks.
        priority: of what waits, the engine reads the lowest number first.
    """

    prompt: str
    task: str
    opening: str = ""
    thought: str = ""
    reviews: tuple[str, ...] = ()
    titles: tuple[str, ...] = ()
    names: ItemNames | None = None
    priority: int = 0


def titles(history: History, items: Mapping[str, Item], more: Iterable[str] = ()) -> tuple[str, ...]:
    """What models see of a history's items, and of `more` items by their ids."""
    ids = (*(step.item_id for step in history.interactions), *more)
    return tuple(items[one].text for one in ids if one in items)


def reviews(history: History, review_words: int) -> tuple[str, ...]:
    """As much of a history's reviews as models see."""
    return tuple(clip_words(step.review, review_words) for step in history.interactions if step.review)


class Writer(Protocol):
    """The part of `generation.engine.Engine` that a draw needs."""

    def fits(self, prompt: str, sampling: SamplingConfig) -> bool: ...

    async def complete(
        self, prompt: str, n: int, seed: int, sampling: SamplingConfig, priority: int = 0
    ) -> list[Completion]: ...


async def draw(
    writer: Writer, request: Request, sampling: SamplingConfig, seed: Callable[[int], int], n: int = 1
) -> list[Completion | Flaw]:
    """`n` completions that pass the gates, or for each that does not, why.

    Args:
        seed: the seed of each attempt, counted from 0; siblings take the seeds that follow it.
    """
    prompt = request.prompt + request.opening
    if not writer.fits(prompt, sampling):
        return [Flaw(reason="prompt too long", detail=f"{len(prompt)} characters")] * n
    drawn: list[Completion | Flaw] = [Flaw(reason="empty", detail="")] * n
    for attempt in range(sampling.attempts):
        lacking = [place for place, one in enumerate(drawn) if isinstance(one, Flaw)]
        if not lacking:
            break
        try:
            completions = await writer.complete(prompt, len(lacking), seed(attempt), sampling, request.priority)
        except RequestError as error:
            for place in lacking:
                drawn[place] = Flaw(reason="request failed", detail=error.message)
            continue
        for place, completion in zip(lacking, completions, strict=True):
            drawn[place] = judge(completion, request, sampling)
        if sampling.temperature == 0:
            break  # Another seed would write the same.
    return drawn


def judge(completion: Completion, request: Request, sampling: SamplingConfig) -> Completion | Flaw:
    """A completion with its text made tidy and its opening before it, or why it is refused."""
    cut = completion.finish_reason == "length"
    text = tidy(completion.text, cut=cut, min_words=sampling.min_words)
    reason = fault(text, request, sampling, cut=cut)
    if reason:
        return Flaw(reason=reason, detail=text)
    return replace(completion, text=f"{request.opening} {text}".strip())


def tidy(text: str, *, cut: bool, min_words: int) -> str:
    """Text on one line; where the model was `cut` off, up to its last whole sentence, if that leaves enough words.

    >>> tidy(" They like\\n\\ntea. They also like", cut=True, min_words=3)
    'They like tea.'
    >>> tidy("They like 2.5 litres of", cut=True, min_words=3)
    'They like 2.5 litres of'
    >>> tidy("They like creams, balms etc. They like St. Ives and", cut=True, min_words=3)
    'They like creams, balms etc.'
    """
    text = " ".join(text.split())
    ends = [match.end() for match in _SENTENCE_END.finditer(text)] if cut else []
    whole = text[: ends[-1]] if ends else ""
    return whole if whole and len(words(whole)) >= min_words else text


def fault(text: str, request: Request, sampling: SamplingConfig, *, cut: bool) -> str | None:
    """The first gate of `sampling.gates` that refuses a text, or None. A text without words is always refused.

    Args:
        text: tidy, without the opening.
        cut: the model was cut off in it.
    """
    if not words(text):
        return "empty"
    checks: dict[str, Callable[[], bool]] = {
        "cut off": lambda: cut and not _is_whole(text),
        "too short": lambda: len(words(text)) < sampling.min_words,
        "repeats itself": lambda: repeats_itself(text),
        "copies the prompt": lambda: copies_prompt(text, request),
        "names an unseen item": lambda: names_unseen_item(text, request),
        "wrong language": lambda: is_wrong_language(text, request, sampling.language),
    }
    return next((gate for gate, refuses in checks.items() if gate in sampling.gates and refuses()), None)


def repeats_itself(text: str) -> bool:
    """Whether a text goes round in circles.

    >>> repeats_itself("they like tea and they like tea and they like tea and")
    True
    """
    runs = _runs(text)
    return len(set(runs)) < MIN_DISTINCT * len(runs)


def copies_prompt(text: str, request: Request) -> bool:
    """Whether a text says over again what stands in its prompt. To name the items that were shown is no copying."""
    runs = _runs(text)
    if _share(runs, (request.thought,)) > MAX_KEPT:
        return True
    named = _all_runs(request.titles)
    own = [run for run in runs if run not in named]
    if _share(own, (request.task,)) > MAX_COPIED:
        return True
    if len(own) >= MIN_COPIED_RUNS and _share(own, request.reviews) > MAX_COPIED:
        return True
    # The prompt of a refinement holds its thought, of which the text may keep a lot.
    kept = _all_runs((request.thought,))
    new = [run for run in own if run not in kept]
    return len(new) >= MIN_COPIED_RUNS and _share(new, (request.prompt,)) > MAX_COPIED


def names_unseen_item(text: str, request: Request) -> bool:
    """Whether a text names an item of the domain that its writer cannot know from the prompt."""
    return request.names is not None and request.names.unseen(text, (request.prompt, *request.titles)) is not None


def is_wrong_language(text: str, request: Request, language: str | None) -> bool:
    """Whether a text, apart from the items that it names, is surely in another language than the one asked for."""
    if language is None:
        return False
    found, named = words(text), _all_runs(request.titles)
    inside = {at for place, run in enumerate(_runs(text)) if run in named for at in range(place, place + _RUN)}
    return is_foreign(" ".join(word for at, word in enumerate(found) if at not in inside), language)


def _is_whole(text: str) -> bool:
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    return bool(ends) and ends[-1] == len(text)


def _runs(text: str) -> list[_Run]:
    found = words(text.casefold())
    return [tuple(found[i : i + _RUN]) for i in range(len(found) - _RUN + 1)]


@lru_cache(maxsize=256)
def _all_runs(texts: tuple[str, ...]) -> frozenset[_Run]:
    # Kept, as a tree's completions are all held against the same texts.
    return frozenset(run for text in texts for run in _runs(text))


def _share(runs: list[_Run], texts: tuple[str, ...]) -> float:
    """Share of `runs` that stand in `texts`."""
    given = _all_runs(texts)
    return sum(run in given for run in runs) / max(1, len(runs))
