"""Training of the ranker: listwise cross-entropy over each example's stored candidates (Eq. 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from pulse_ray import catalogue
from pulse_ray.config import RankerConfig, Variant
from pulse_ray.metrics import ranks
from pulse_ray.ranker import model
from pulse_ray.ranker.packing import PackedBatch, PromptEncoder, TokenRow, budgeted, pack
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.schema import Split, histories
from pulse_ray.training.task import Read
from pulse_ray.workspace import Artefact, Part

GPU_TOKENS, CPU_TOKENS = 8192, 3072
"""In one forward pass of the validation."""


@dataclass(frozen=True, kw_only=True)
class RankData:
    """Where a ranker's rows come from: tables with the same parts."""

    items: Artefact
    examples: Artefact
    candidates: Artefact
    reasons: Artefact

    @cached_property
    def _reasoned(self) -> frozenset[Part]:
        """Shards that have reasons, listed once: a folder may hold thousands."""
        return frozenset(self.reasons.parts())

    def rows(self, part: Part, variant: Variant, items: catalogue.Catalogue) -> Iterator[tuple[RankRow, int]]:
        """The examples of a part as a variant sees them, with the place of the target among the candidates.

        An example whose tree was rejected has no reason, and is ranked without one.
        """
        reasons: dict[str, str] = {}
        if variant != "none" and part in self._reasoned:
            for row in self.reasons.read(part, ["example_id", "selector", "text"]).to_pylist():
                if row["selector"] == variant:
                    reasons[row["example_id"]] = row["text"]
        drawn = {
            row["example_id"]: row
            for row in self.candidates.read(part, ["example_id", "items", "target_index"]).to_pylist()
        }
        for history in histories(self.examples.read(part)):
            if row := drawn.get(history.example_id):
                known = items[history.domain]
                chosen = tuple(known[item] for item in row["items"])
                reason = reasons.get(history.example_id)
                yield RankRow(history=history, reason=reason, candidates=chosen), int(row["target_index"])


class RankerTask:
    """Trains one variant; validates by HR@1 on the validation split."""

    monitor = "hr@1"
    higher_is_better = True
    validate_first = False
    divisible = True

    def __init__(self, config: RankerConfig, variant: Variant, data: RankData) -> None:
        self.config, self.read = config, Read()
        items = catalogue.load(data.items)
        self.encoder = PromptEncoder(model.tokenizer(config.model), config)
        self.ids: list[str] = []
        self.train, self.targets = self._encode(data, "train", variant, items, None, self.ids)
        limit = config.training.validation_examples
        self.validation, self.validation_targets = self._encode(data, "validation", variant, items, limit, [])

    def _encode(
        self,
        data: RankData,
        split: Split,
        variant: Variant,
        items: catalogue.Catalogue,
        limit: int | None,
        ids: list[str],
    ) -> tuple[list[TokenRow], list[int]]:
        tokens: list[TokenRow] = []
        targets: list[int] = []
        for part in data.examples.parts(split):
            for row, target in data.rows(part, variant, items):
                if limit is not None and len(tokens) >= limit:
                    return tokens, targets
                tokens.append(self.encoder.encode(row, items[row.history.domain]))
                targets.append(target)
                ids.append(row.history.example_id)
        return tokens, targets

    def module(self) -> nn.Module:
        return model.create(self.config)

    def __len__(self) -> int:
        return len(self.train)

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        batch = self._batch(engine, self.train, indices)
        self.read.tokens += len(batch.input_ids_T)
        self.read.places += len(batch.input_ids_T)
        targets_B = torch.tensor([self.targets[index] for index in indices], device=batch.ends_BK.device)
        return F.cross_entropy(engine(batch), targets_B, reduction="none")

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        loss, hits, count = 0.0, 0, 0
        on_gpu = next(engine.parameters()).is_cuda
        batches = list(budgeted(self.validation, GPU_TOKENS if on_gpu else CPU_TOKENS))
        for first in range(0, len(batches), world):
            # Who has none left goes through another's, for nothing: with sharded weights all workers make every pass.
            indices = batches[min(first + rank, len(batches) - 1)]
            logits_BK = engine(self._batch(engine, self.validation, indices)).cpu()
            if first + rank >= len(batches):
                continue
            targets_B = torch.tensor([self.validation_targets[index] for index in indices])
            loss += float(F.cross_entropy(logits_BK, targets_B, reduction="sum"))
            hits += int((ranks(logits_BK.numpy(), targets_B.numpy()) == 1).sum())
            count += len(indices)
        return {"hr@1": (hits, count), "loss": (loss, count)}

    def _batch(self, engine: nn.Module, rows: Sequence[TokenRow], indices: Sequence[int]) -> PackedBatch:
        device = next(engine.parameters()).device
        return pack([rows[index] for index in indices]).to(device)

    def save(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, model.PackedRanker)
        model.save(module, folder, self.config)

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self.ids[index] for index in indices]
