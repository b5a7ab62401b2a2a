"""Packing: one sequence holds the prompts and all candidates of some rows; each candidate sees its prompt and itself.

Every candidate starts at the position that follows its prompt, so its logit is what a sequence of its own would give,
at P + K·s tokens instead of K(P + s). Rows of any length follow each other without padding: of the attention alone,
which is given in parts, some are padded.

Shape suffixes: B rows, P prompt tokens, K candidates, S tokens of one, N candidates of all rows, T tokens of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from pulse_ray.config import RankerConfig
from pulse_ray.ranker.prompts import RankRow, answer, question
from pulse_ray.schema import Item
from pulse_ray.text import control_tokens, history_text, neutralise

PAD = -1
"""The place of what is not there."""

ANSWER_TOKENS = 4
"""Tokens of a candidate beside those of its item's text, at most: what the chat begins and ends an answer with."""

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
    """Rows without padding: first all prompts, then all candidates, of which some rows may have fewer.

    All are int64. `input_ids_T`, `positions_T`: of each token. `prompts_BP`, `candidates_BKS`: the place in T of every
    token, -1 for padding. `slots_T`: the place of every token in those two, laid flat one after the other. `ends_BK`:
    the place of each candidate's last token, -1 for none; `ends_N`: those that are there.
    """

    input_ids_T: torch.Tensor
    positions_T: torch.Tensor
    prompts_BP: torch.Tensor
    candidates_BKS: torch.Tensor
    slots_T: torch.Tensor
    ends_BK: torch.Tensor
    ends_N: torch.Tensor

    def to(self, device: torch.device) -> PackedBatch:
        """The same batch on another device."""
        return PackedBatch(**{name: value.to(device) for name, value in vars(self).items()})


def pack(rows: Sequence[TokenRow]) -> PackedBatch:
    """Rows as one batch."""
    prompt_B, counts_B = (
        np.array(sizes, np.int64) for sizes in zip(*((len(r.prompt), len(r.candidates)) for r in rows), strict=True)
    )
    size_N = np.array([len(candidate) for row in rows for candidate in row.candidates], np.int64)
    assert size_N.all(), "a candidate without tokens has no end"
    row_N = np.repeat(np.arange(len(rows)), counts_B)
    place_N = np.arange(len(size_N)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    sizes = np.concatenate([prompt_B, size_N])
    starts = np.cumsum(sizes) - sizes
    start_N = starts[len(rows) :]
    # In every candidate positions go on from its prompt.
    first = np.concatenate([np.zeros_like(prompt_B), prompt_B[row_N]])
    prompts_BP = _places(starts[: len(rows)], prompt_B)
    candidates_BKS = np.full((len(rows), counts_B.max(), size_N.max(initial=0)), PAD)
    candidates_BKS[row_N, place_N] = _places(start_N, size_N)
    ends_BK = np.full(candidates_BKS.shape[:2], PAD)
    ends_N = start_N + size_N - 1
    ends_BK[row_N, place_N] = ends_N
    padded = np.concatenate([prompts_BP.ravel(), candidates_BKS.ravel()])
    used = np.flatnonzero(padded != PAD)
    slots_T = np.empty_like(used)
    slots_T[padded[used]] = used
    tokens = [*(row.prompt for row in rows), *(candidate for row in rows for candidate in row.candidates)]
    arrays = {
        "input_ids_T": np.concatenate(tokens, dtype=np.int64, casting="unsafe"),
        "positions_T": np.arange(sizes.sum()) + np.repeat(first - starts, sizes),
        "prompts_BP": prompts_BP,
        "candidates_BKS": candidates_BKS,
        "slots_T": slots_T,
        "ends_BK": ends_BK,
        "ends_N": ends_N,
    }
    return PackedBatch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


def _places(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Places of pieces' tokens, padded: [pieces, longest]."""
    offsets = np.arange(sizes.max(initial=0))
    return np.where(offsets < sizes[:, None], starts[:, None] + offsets, PAD)


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


def budgeted(rows: Sequence[TokenRow], token_budget: int) -> Iterator[list[int]]:
    """Batches of row indices, each of at most `token_budget` tokens, or of one row.

    Attention pads the rows of a batch to the longest prompt and the most and longest candidates; with that they are at
    most twice as many tokens, so rows of like shape go together.
    """
    batch: list[int] = []
    used, largest = 0, np.zeros(3, np.int64)
    shapes = [
        (len(row.candidates), max(map(len, row.candidates), default=0), len(row.prompt), row.packed_length)
        for row in rows
    ]
    for index in sorted(range(len(rows)), key=lambda place: shapes[place]):
        *shape, length = shapes[index]
        most, size, prompt = np.maximum(largest, shape)
        padded = (len(batch) + 1) * (prompt + most * size)
        if batch and (used + length > token_budget or padded > 2 * token_budget):
            yield batch
            batch, used, largest = [], 0, np.zeros(3, np.int64)
        batch.append(index)
        used, largest = used + length, np.maximum(largest, shape)
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
