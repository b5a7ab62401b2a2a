"""Scoring with a trained ranker: evaluation, batch and online use this one class."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from pulse_ray import cpu
from pulse_ray.catalogue import Catalogue
from pulse_ray.config import RankerConfig
from pulse_ray.ranker import attention_cpu, model
from pulse_ray.ranker.packing import PackedBatch, PromptEncoder, TokenRow, budgeted, chunks, pack
from pulse_ray.ranker.prompts import RankRow

AT_ONCE = 8
"""Passes under way on a CPU, at most, each in a thread of its own. All wait for Python between their operations."""

PASS_TOKENS = 1536
"""In each of those, if rows are as short: more leave a core's cache."""

SHIFTING = ("longrope", "dynamic")
"""Kinds of rotary embeddings that a forward pass may change."""


class Scorer:
    """A trained ranker, ready to score. On a CPU, its process keeps the memory that it has had (`cpu.keep_memory`).

    Args:
        folder: the PEFT folder of a variant.
        config: the ranker's settings, as it was trained with.
        items: the items that histories refer to.
    """

    def __init__(self, folder: Path, config: RankerConfig, items: Catalogue) -> None:
        self.items = items
        self.encoder = PromptEncoder(model.tokenizer(config.model), config)
        self.ranker = model.load(folder, config)
        self.device = next(self.ranker.parameters()).device
        kinds = (str(getattr(module, "rope_type", "")) for module in self.ranker.modules())
        self.shifting = any(shifting in kind for kind in kinds for shifting in SHIFTING)
        if self.device.type == "cpu":
            cpu.keep_memory()
            attention_cpu.library()  # Compiles here, and not in the first passes all at once.

    def score(self, rows: Sequence[RankRow], token_budget: int) -> list[np.ndarray]:
        """Logits of each row's candidates: [K] float32 each, in the rows' order.

        Args:
            rows: any histories with any number of candidates.
            token_budget: tokens in all forward passes that are under way at once: one on a GPU, several smaller ones on
                a CPU. Of a row that is longer, the prompt is read once and remembered, and the candidates follow in
                chunks; only a prompt or a candidate by itself is never cut.
        """
        return self.score_tokens([self.encode(row) for row in rows], token_budget)

    def encode(self, row: RankRow) -> TokenRow:
        """The tokens of a row. Needs no model, so it may go on beside a forward pass."""
        return self.encoder.encode(row, self.items[row.history.domain])

    def score_tokens(self, tokens: Sequence[TokenRow], token_budget: int) -> list[np.ndarray]:
        """`score`, for rows that are encoded already."""
        scored: list[np.ndarray] = [np.zeros(0, np.float32)] * len(tokens)
        short: list[int] = []
        for place, row in enumerate(tokens):
            if row.candidates and row.packed_length > token_budget:
                scored[place] = self._in_chunks(row, token_budget)
            elif row.candidates:
                short.append(place)

        def batches(places: list[int], budget: int) -> list[list[int]]:
            return [[places[index] for index in batch] for batch in budgeted([tokens[one] for one in places], budget)]

        @torch.inference_mode()  # Of the thread that asks for it.
        def score(places: list[int]) -> None:
            logits_BK = self.ranker(self._pack([tokens[place] for place in places])).cpu().numpy()
            for place, logits_K in zip(places, logits_BK, strict=True):
                scored[place] = logits_K[: len(tokens[place].candidates)]

        if (at_once := self._at_once(max((tokens[one].packed_length for one in short), default=1), token_budget)) > 1:
            passes = batches(short, min(token_budget // at_once, PASS_TOKENS))
            apart = len(passes) // at_once * at_once
            in_threads(score, passes[:apart], at_once)
            short = [place for places in passes[apart:] for place in places]
        for places in batches(short, token_budget):
            score(places)
        return scored

    def _at_once(self, longest: int, token_budget: int) -> int:
        """Passes that go on beside each other: none gets half a thread, and the longest rows fit in together."""
        if self.device.type != "cpu" or self.shifting:
            return 1
        threads = torch.get_num_threads()
        most = max(1, min(AT_ONCE, threads, token_budget // longest))
        return threads // -(-threads // most)

    @torch.inference_mode()
    def _in_chunks(self, row: TokenRow, token_budget: int) -> np.ndarray:
        """Logits of a row that is too long for one forward pass: [K] float32."""
        cache = self.ranker.remember(self._pack([TokenRow(prompt=row.prompt, candidates=[])]))
        pieces = [self.ranker.score_after(cache, self._pack([piece])) for piece in chunks(row, token_budget)]
        logits: np.ndarray = torch.cat(pieces, dim=1)[0].cpu().numpy()
        return logits

    def _pack(self, rows: Sequence[TokenRow]) -> PackedBatch:
        return pack(rows).to(self.device)


def in_threads(work: Callable[[list[int]], None], pieces: Iterable[list[int]], at_once: int) -> None:
    """Does the work, so many pieces at once, each with its share of the threads that this one has for products.

    All threads for one piece after the other would wait for each other at the end of every product.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // at_once))
    try:
        with ThreadPoolExecutor(at_once) as pool:
            for _ in pool.map(work, pieces):
                pass
    finally:
        torch.set_num_threads(threads)
