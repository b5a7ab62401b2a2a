"""The peer of packed, batched ranking: the same model in the same deployment, with a sequence for every candidate."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pulse_ray.config import Config
from pulse_ray.ranker.packing import TokenRow
from pulse_ray.serving.app import Encoded, Loaded, Ranker


class SeparateRanker(Ranker):
    """Ranks one request at a time: prompt and candidate K times, as plain transformers with PEFT has it.

    The sequences of a request go through the model one by one or as one padded batch, whichever is faster here.
    """

    def __init__(self, config: Config) -> None:
        # No row is smaller than a token, so every row goes alone, and waits for none.
        alone = config.serve.ranker.model_copy(update={"token_budget": 1, "batch_wait_s": 0.0})
        super().__init__(config.model_copy(update={"serve": config.serve.model_copy(update={"ranker": alone})}))
        self.at_once: int | None = None
        """Sequences in one forward pass; None puts all into one."""

    async def version(self) -> str:
        """Of the model, with the number of sequences in a pass."""
        return f"{self._current().version}, {self.at_once or 'all'} at once"

    async def _warm_up(self, loaded: Loaded) -> None:
        # Its own attention: the packed one is for packed rows.
        loaded.scorer.ranker.model.get_base_model().set_attn_implementation("sdpa")
        taken_s: dict[int | None, float] = {}
        for self.at_once in (1, None):
            await super()._warm_up(loaded)
            assert self._admission.row_s is not None
            taken_s[self.at_once] = self._admission.row_s
        self.at_once = min(taken_s, key=lambda at_once: taken_s[at_once])

    def _score(self, rows: Sequence[Encoded]) -> list[list[float]]:
        return [self._logits(row.tokens, row.loaded) for row in rows]

    @torch.inference_mode()
    def _logits(self, row: TokenRow, loaded: Loaded) -> list[float]:
        sequences = [row.prompt + candidate for candidate in row.candidates]
        step = self.at_once or len(sequences)
        logits: list[float] = []
        model = loaded.scorer.ranker.model
        for start in range(0, len(sequences), step):
            part = [torch.tensor(sequence) for sequence in sequences[start : start + step]]
            tokens = torch.nn.utils.rnn.pad_sequence(part, True, model.get_base_model().config.pad_token_id)
            lengths = torch.tensor([len(sequence) for sequence in part])
            mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).long()
            found = model(input_ids=tokens, attention_mask=mask).logits
            logits += found.squeeze(-1).tolist()
        return logits
