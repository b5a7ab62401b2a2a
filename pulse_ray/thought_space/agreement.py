"""Agreement of texts with a behaviour (Eq. 2): cosine of E1(text) and E2(behaviour), the history alone."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import TextConfig
from pulse_ray.schema import History
from pulse_ray.text import behaviour_text
from pulse_ray.thought_space.encoders import Encoders


def behaviour(
    encoders: Encoders, items: Catalogue, text: TextConfig, history: History, target_item: str | None = None
) -> str:
    """A history as the history encoder reads it; with the target for Phase I and the oracle protocol alone."""
    return behaviour_text(
        history,
        items[history.domain],
        target_item,
        count=encoders.counter("history"),
        # A tower cuts what is too long at its end, where the newest interaction stands.
        max_tokens=min(text.history_tokens, encoders.room("history")),
        review_words=text.review_words,
    )


class Agreement:
    """Compares texts with histories while others wait for a language model: to be used from one event loop.

    Args:
        items: of every domain whose histories come.
        text: how a history becomes text.
    """

    def __init__(self, encoders: Encoders, items: Catalogue, text: TextConfig) -> None:
        self.encoders, self.items, self.text = encoders, items, text
        # One thread: tokenizers serve one at a time. And one call for each level of a tree: in a batch with texts of
        # other trees a cosine would change in its last digits, and with it, now and then, which node is the best.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="agreement")

    def of(self, history: History) -> Callable[[Sequence[str]], Awaitable[list[float]]]:
        """A function that gives the cosine of each text with this history's behaviour."""
        anchor_D: np.ndarray | None = None

        def cosines(texts: Sequence[str]) -> list[float]:
            nonlocal anchor_D
            if anchor_D is None:
                [anchor_D] = self.encoders.encode("history", [behaviour(self.encoders, self.items, self.text, history)])
            found: list[float] = (self.encoders.encode("rationale", texts) @ anchor_D).tolist()
            return found

        async def agree(texts: Sequence[str]) -> list[float]:
            return await asyncio.get_running_loop().run_in_executor(self._thread, cosines, texts)

        return agree
