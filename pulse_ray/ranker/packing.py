"""Packing: one sequence holds the prompt and all K candidates; each candidate sees the prompt and itself.

Every candidate starts at the position that follows the prompt, so its logit is what a sequence of its own would give,
at P + K·s tokens instead of K(P + s).

Shape suffixes: B rows, L packed tokens, K candidates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from pulse_ray.config import RankerConfig
from pulse_ray.ranker.prompts import RankRow, answer, question
from pulse_ray.schema import Item
from pulse_ray.text import control_tokens, history_text, neutralise

PROMPT, PAD = 0, -1
REMEMBERED = 65_536
"""Candidates, and lines of histories, whose tokens an encoder remembers: some 60 MB at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenRow:
    """A `RankRow` as tokens: the prompt [P], and each of the K candidates [s_k]."""

    prompt: list[int]
    candidates: list[list[int]]

    @property
    def packed_length(self) -> int:
        """Tokens of the packed sequence: P + Σ s_k."""
        return len(self.prompt) + sum(map(len, self.candidates))


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Packed rows, padded on the right.

    `input_ids_BL`, `positions_BL`: int64. `segments_BL`: 0 for the prompt, k for candidate k = 1 … K, -1 for padding.
    `ends_BK`: the place of each candidate's last token.
    """

    input_ids_BL: torch.Tensor
    positions_BL: torch.Tensor
    segments_BL: torch.Tensor
    ends_BK: torch.Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(
            **{name: value.to(device) for name, value in vars(self).items() if name.endswith(("_BL", "_BK"))}
        )

    @cached_property
    def mask_B1LL(self) -> torch.Tensor:
        """Bool: whether the query (row) may attend to the key (column)."""
        query_BL1, key_B1L = self.segments_BL[:, :, None], self.segments_BL[:, None, :]
        length = self.segments_BL.shape[1]
        causal_LL = torch.ones(length, length, dtype=torch.bool, device=self.segments_BL.device).tril()
        # Padding attends to padding: a row of a softmax without a single key would be NaN.
        return (causal_LL & ((key_B1L == PROMPT) | (key_B1L == query_BL1)))[:, None]


def pack(rows: Sequence[TokenRow], pad_token: int) -> PackedBatch:
    """Rows with the same number of candidates as one batch."""
    length = max(row.packed_length for row in rows)
    shape = (len(rows), length)
    tokens, positions, segments = np.full(shape, pad_token), np.zeros(shape, np.int64), np.full(shape, PAD)
    ends = np.zeros((len(rows), len(rows[0].candidates)), np.int64)
    for place, row in enumerate(rows):
        prompt = len(row.prompt)
        sizes = np.array([len(candidate) for candidate in row.candidates], dtype=np.int64)
        used = prompt + sizes.sum()
        tokens[place, :used] = np.concatenate([row.prompt, *row.candidates])
        segments[place, :used] = np.repeat(np.arange(1 + len(sizes)), [prompt, *sizes])
        starts = prompt + np.cumsum(sizes) - sizes
        # In every candidate positions go on from the prompt: the place less what the candidates before it take.
        positions[place, :used] = np.arange(used) - np.repeat([0, *(starts - prompt)], [prompt, *sizes])
        ends[place] = starts + sizes - 1
    return PackedBatch(
        input_ids_BL=torch.from_numpy(tokens.astype(np.int64)),
        positions_BL=torch.from_numpy(positions),
        segments_BL=torch.from_numpy(segments.astype(np.int64)),
        ends_BK=torch.from_numpy(ends),
    )


def chunks(row: TokenRow, token_budget: int) -> Iterator[TokenRow]:
    """The candidates of a row in order, without the prompt, in pieces of at most `token_budget` tokens or of one."""
    piece: list[list[int]] = []
    used = 0
    for candidate in row.candidates:
        if piece and used + len(candidate) > token_budget:
            yield TokenRow(prompt=[], candidates=piece)
            piece, used = [], 0
        piece.append(candidate)
        used += len(candidate)
    if piece:
        yield TokenRow(prompt=[], candidates=piece)


def budgeted(lengths: Sequence[int], token_budget: int) -> Iterator[list[int]]:
    """Batches of row indices of similar length, each of at most `token_budget` padded tokens, or of one row."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if batch and (len(batch) + 1) * lengths[index] > token_budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class PromptEncoder:
    """Turns `RankRow`s into tokens, within the configured budgets.

    The prompt ends and a candidate begins where the chat template changes turns, so that tokens of the two pieces are
    the tokens of the whole text.

    Args:
        tokenizer: of the ranker's base model.
    """

    def __init__(self, tokenizer: Any, config: RankerConfig) -> None:
        self.tokenizer, self.config = tokenizer, config
        self.special = control_tokens(tokenizer)
        self.pad_token: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        # Many users share items; lines with reviews and items of a large catalogue are kept only as far as they fit.
        self._candidate = lru_cache(REMEMBERED)(self._encode_candidate)
        self._line_tokens = lru_cache(REMEMBERED)(self.count)

    def prompt_text(self, row: RankRow, items: Mapping[str, Item]) -> str:
        """All that stands before a candidate, chat template applied."""
        shown = history_text(
            row.history,
            items,
            count=self._line_tokens,
            max_tokens=self.config.text.history_tokens,
            review_words=self.config.text.review_words,
            special_tokens=self.special,
        )
        reason = self.clip(neutralise(row.reason, self.special), self.config.reason_tokens) if row.reason else None
        content = question(shown, reason)
        if self.tokenizer.chat_template is None:
            return content + "\n"
        messages = [{"role": "user", "content": content}]
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def candidate_text(self, item: Item) -> str:
        """One candidate, cut to its budget."""
        return answer(self._clipped(item.text))

    def encode(self, row: RankRow, items: Mapping[str, Item]) -> TokenRow:
        """The tokens of a row. A prompt above `max_tokens` loses its oldest tokens: the budgets leave room for it."""
        prompt = self._ids(self.prompt_text(row, items), begin=True)[-self.config.max_tokens :]
        return TokenRow(prompt=prompt, candidates=[self._candidate(item.text) for item in row.candidates])

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._ids(text, begin=False))

    def clip(self, text: str, tokens: int) -> str:
        """The beginning of a text that fits into `tokens` tokens."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def _clipped(self, text: str) -> str:
        return self.clip(neutralise(text, self.special), self.config.candidate_tokens)

    def _encode_candidate(self, text: str) -> list[int]:
        return self._ids(answer(self._clipped(text)), begin=False)

    def _ids(self, text: str, *, begin: bool) -> list[int]:
        # A chat template writes the beginning-of-sequence token itself.
        special = begin and self.tokenizer.chat_template is None
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])
