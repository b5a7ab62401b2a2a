"""Scoring with a trained ranker: evaluation, batch and online use this one class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import RankerConfig
from pulse_ray.ranker import model
from pulse_ray.ranker.packing import PromptEncoder, TokenRow, budgeted, pack
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
            token_budget: padded tokens in one forward pass; a row that is longer goes alone.
        """
        return self.score_tokens([self.encode(row) for row in rows], token_budget)

    def encode(self, row: RankRow) -> TokenRow:
        """The tokens of a row. Needs no model, so it may go on beside a forward pass."""
        return self.encoder.encode(row, self.items[row.history.domain])

    @torch.inference_mode()
    def score_tokens(self, tokens: Sequence[TokenRow], token_budget: int) -> list[np.ndarray]:
        """`score`, for rows that are encoded already."""
        scored: list[np.ndarray] = [np.zeros(0, np.float32)] * len(tokens)
        by_count: dict[int, list[int]] = {}
        for place, row in enumerate(tokens):
            by_count.setdefault(len(row.candidates), []).append(place)
        for places in by_count.values():
            for batch in budgeted([tokens[place].packed_length for place in places], token_budget):
                chosen = [places[index] for index in batch]
                packed = pack([tokens[place] for place in chosen], self.encoder.pad_token).to(self.device)
                for place, logits in zip(chosen, self.ranker(packed).cpu().numpy(), strict=True):
                    scored[place] = logits
        return scored
