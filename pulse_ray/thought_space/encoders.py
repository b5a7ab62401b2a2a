"""The encoders of the Thought Space: E1 reads rationales, E2 reads behaviours. Kept as sentence-transformers folders.

`Encoders` is one module, so that both towers train under one DeepSpeed engine; with a shared tower they are the same
object and its weights are stored once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from torch import nn
from torch.nn import functional as F

from pulse_ray import cpu, models
from pulse_ray.text import CountTokens
from pulse_ray.thought_space import flat

Tower = Literal["rationale", "history"]
Features = list[dict[str, Any]]
"""Of some texts, in pieces that an encoder reads one after the other."""
TOWERS: tuple[Tower, Tower] = ("rationale", "history")
ENCODE_BATCH = 64


class Encoders(nn.Module):
    """Rationale encoder E1 and history encoder E2.

    Args:
        rationale: reads rationales, reasons and thoughts.
        history: reads behaviours; may be the same object.
    """

    def __init__(self, rationale: SentenceTransformer, history: SentenceTransformer) -> None:
        super().__init__()
        self.rationale, self.history = rationale, history
        cpu.quicken(self)
        self._first_positions: dict[Tower, int | None] = {}

    @classmethod
    def create(cls, model: str, max_tokens: int | None, *, shared: bool) -> Encoders:
        """Encoders as a model's name gives them: its own pooling or the mean; unset `max_tokens` leaves its own."""
        rationale = _open(models.resolve(model), max_tokens)
        return cls(rationale, rationale if shared else _open(models.resolve(model), max_tokens))

    @classmethod
    def load(cls, folder: Path) -> Encoders:
        """Encoders in a folder that `save` wrote, ready for inference."""
        rationale = SentenceTransformer(str(folder / "rationale"), device=_device())
        separate = (folder / "history").exists()
        return cls(
            rationale, SentenceTransformer(str(folder / "history"), device=_device()) if separate else rationale
        ).eval()

    def save(self, folder: Path) -> None:
        """Writes `rationale/` and, unless the tower is shared, `history/`."""
        self.rationale.save(str(folder / "rationale"), create_model_card=False)
        if self.history is not self.rationale:
            self.history.save(str(folder / "history"), create_model_card=False)

    def forward(self, rationales: Features, behaviours: Features) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit vectors of both sides: ([B, D], [B, D]). Arguments are what `tokens` gives."""
        return self._embed(self.rationale, rationales), self._embed(self.history, behaviours)

    @staticmethod
    def _embed(tower: SentenceTransformer, features: Features) -> torch.Tensor:
        vectors_BD = torch.cat([tower(dict(piece))["sentence_embedding"] for piece in features])
        return F.normalize(vectors_BD.float(), dim=-1)

    def tokens(self, tower: Tower, texts: Sequence[str]) -> Features:
        """Token features of texts: without padding, each [1, T], or in one piece, padded to the longest, each [B, L].

        The first it is where the tower can read it (`flat.first_position`).
        """
        model: SentenceTransformer = getattr(self, tower)
        if tower not in self._first_positions:
            self._first_positions[tower] = flat.first_position(model)
        given = model.preprocess(list(texts)).items()
        features = {name: value.to(model.device) for name, value in given if isinstance(value, torch.Tensor)}
        first = self._first_positions[tower]
        return [features] if first is None else flat.pieces(features, first)

    def encode(self, tower: Tower, texts: Sequence[str]) -> np.ndarray:
        """Unit vectors of texts: [n, D] float32, batched by length."""
        model: SentenceTransformer = getattr(self, tower)
        if not texts:
            return np.zeros((0, model.get_embedding_dimension() or 0), dtype=np.float32)
        vectors = model.encode(
            list(texts),
            batch_size=ENCODE_BATCH,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_numpy=True,
        )
        return cast(np.ndarray, vectors.astype(np.float32))

    def room(self, tower: Tower) -> int:
        """Tokens that a text may have without being cut."""
        model: SentenceTransformer = getattr(self, tower)
        return int(model.max_seq_length or model.tokenizer.model_max_length) - int(
            model.tokenizer.num_special_tokens_to_add()
        )

    def counter(self, tower: Tower) -> CountTokens:
        """Counts tokens as the tower's tokenizer does."""
        tokenizer = getattr(self, tower).tokenizer
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _open(folder: Path, max_tokens: int | None) -> SentenceTransformer:
    """A sentence-transformers folder as it is, or any transformers encoder with mean pooling on top."""
    if (folder / "modules.json").exists():
        model = SentenceTransformer(str(folder), device=_device())
    else:
        transformer = Transformer(str(folder))
        pooling = Pooling(transformer.get_embedding_dimension(), "mean")
        model = SentenceTransformer(modules=[transformer, pooling], device=_device())
    if max_tokens is not None:
        model.max_seq_length = max_tokens
    return model


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
