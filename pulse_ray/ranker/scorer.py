"""Scoring with a trained ranker: evaluation, batch and online use this one class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import RankerConfig
from pulse_ray.ranker import model
from pulse_ray.ranker.packing import PackedBatch, PromptEncoder, TokenRow, budgeted, chunks, pack
from pulse_ray.ranker.prompts import RankRow


class Scorer:
    """A trained ranker, ready to score.

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

    def score(self, rows: Sequence[RankRow], token_budget: int) -> list[np.ndarray]:
        """Logits of each row's candidates: [K] float32 each, in the rows' order.

        Args:
            rows: any histories with any number of candidates.
            token_budget: tokens in one forward pass. Of a row that is longer, the prompt is read once and
                remembered, and the candidates follow in chunks; only a prompt or a candidate by itself is never cut.
        """
        return self.score_tokens([self.encode(row) for row in rows], token_budget)

    def encode(self, row: RankRow) -> TokenRow:
        """The tokens of a row. Needs no model, so it may go on beside a forward pass."""
        return self.encoder.encode(row, self.items[row.history.domain])

    @torch.inference_mode()
    def score_tokens(self, tokens: Sequence[TokenRow], token_budget: int) -> list[np.ndarray]:
        """`score`, for rows that are encoded already."""
        scored: list[np.ndarray] = [np.zeros(0, np.float32)] * len(tokens)
        together: list[int] = []
        for place, row in enumerate(tokens):
            if row.packed_length > token_budget:
                scored[place] = self._in_chunks(row, token_budget)
            elif row.candidates:
                together.append(place)
        for batch in budgeted([tokens[place] for place in together], token_budget):
            chosen = [together[index] for index in batch]
            logits_BK = self.ranker(self._pack([tokens[place] for place in chosen])).cpu().numpy()
            for place, logits_K in zip(chosen, logits_BK, strict=True):
                scored[place] = logits_K[: len(tokens[place].candidates)]
        return scored

    def _in_chunks(self, row: TokenRow, token_budget: int) -> np.ndarray:
        """Logits of a row that is too long for one forward pass: [K] float32."""
        if not row.candidates:
            return np.zeros(0, np.float32)
        cache = self.ranker.remember(self._pack([TokenRow(prompt=row.prompt, candidates=[])]))
        pieces = [self.ranker.score_after(cache, self._pack([piece])) for piece in chunks(row, token_budget)]
        logits: np.ndarray = torch.cat(pieces, dim=1)[0].cpu().numpy()
        return logits

    def _pack(self, rows: Sequence[TokenRow]) -> PackedBatch:
        return pack(rows).to(self.device)
