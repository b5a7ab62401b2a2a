"""SASRec (Kang and McAuley, 2018): a causal transformer over item ids, with pre-norm blocks and tied item embeddings.

Shape suffixes: B users, L positions, D model dimension, N negatives, V items (index 0 is padding, items are 1 to V).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pulse_ray.config import SasrecConfig
from pulse_ray.metrics import ranks
from pulse_ray.schema import Split, examples
from pulse_ray.workspace import Artefact

PADDING = 0
ENCODE_BATCH = 256
Key = tuple[str, str]
"""Domain and item id."""


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_BLD: torch.Tensor) -> torch.Tensor:
        """[B, L, D] → [B, L, D]; a position sees itself and what precedes it."""
        batch, length, dim = x_BLD.shape
        qkv = self.qkv(self.norm_attention(x_BLD)).view(batch, length, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        # Sequences are padded on the right, so causality alone keeps padding out of every real position.
        mixed = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x_BLD = x_BLD + self.drop(self.out(mixed.transpose(1, 2).reshape(batch, length, dim)))
        out_BLD: torch.Tensor = x_BLD + self.drop(self.feed(self.norm_feed(x_BLD)))
        return out_BLD


class Sasrec(nn.Module):
    """The model with its vocabulary.

    Args:
        vocabulary: domain and id of item 1, 2, …
        max_length: positions; longer histories lose their oldest items.
    """

    def __init__(self, config: SasrecConfig, vocabulary: Sequence[Key], max_length: int) -> None:
        super().__init__()
        self.config, self.max_length = config, max_length
        self.vocabulary = [tuple(key) for key in vocabulary]
        self.index = {key: place + 1 for place, key in enumerate(self.vocabulary)}
        self.items = nn.Embedding(len(vocabulary) + 1, config.dim, padding_idx=PADDING)
        self.positions = nn.Embedding(max_length, config.dim)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)
        nn.init.normal_(self.positions.weight, std=config.dim**-0.5)

    def encode(self, items_BL: torch.Tensor) -> torch.Tensor:
        """States after each position: [B, L] item indices, padded on the right → [B, L, D]."""
        x_BLD = self.items(items_BL) * math.sqrt(self.config.dim)
        x_BLD = self.drop(x_BLD + self.positions.weight[: items_BL.shape[1]])
        for block in self.blocks:
            x_BLD = block(x_BLD)
        states_BLD: torch.Tensor = self.norm(x_BLD)
        return states_BLD

    def forward(self, items_BL: torch.Tensor, negatives_N: torch.Tensor) -> torch.Tensor:
        """Sum over each sequence's positions of the loss of its next item: [B].

        Args:
            items_BL: sequences, inputs and targets alike, padded on the right.
            negatives_N: items shared by the batch; all items make the sampled softmax a full one.
        """
        targets_BL = items_BL[:, 1:]
        real_BL = targets_BL != PADDING
        states_BLD = self.encode(items_BL[:, :-1])
        positive_BL = (states_BLD * self.items(targets_BL)).sum(-1)
        negative_BLN = states_BLD @ self.items(negatives_N).T
        same_BLN = targets_BL.unsqueeze(-1) == negatives_N
        if self.config.loss == "gbce":
            loss_BL = self._gbce(positive_BL, negative_BLN, same_BLN)
        else:
            logits = torch.cat([positive_BL.unsqueeze(-1), negative_BLN.masked_fill(same_BLN, -torch.inf)], dim=-1)
            loss_BL = torch.logsumexp(logits, dim=-1) - positive_BL
        return (loss_BL * real_BL).sum(-1)

    def _gbce(self, positive: torch.Tensor, negative: torch.Tensor, same: torch.Tensor) -> torch.Tensor:
        """Generalised binary cross-entropy (Petrov and Macdonald, 2023, Eq. 16), averaged over 1 + N terms."""
        sampled = negative.shape[-1] / max(1, len(self.vocabulary) - 1)
        t = self.config.gbce_calibration
        beta = sampled * (t * (1 - 1 / sampled) + 1 / sampled)
        rejected = F.logsigmoid(-negative).masked_fill(same, 0.0).sum(-1)
        return -(beta * F.logsigmoid(positive) + rejected) / (1 + negative.shape[-1])

    def pad(self, sequences: Iterable[Sequence[int]], extra: int = 0) -> torch.Tensor:
        """Sequences cut to the newest `max_length + extra` items and padded on the right: [B, L]."""
        cut = [torch.tensor(list(sequence)[-(self.max_length + extra) :], dtype=torch.long) for sequence in sequences]
        return nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=PADDING)

    def states(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """The state after each history: [n, D] float32, batch by batch."""
        pieces = [
            self._states(histories[start : start + ENCODE_BATCH]).float().cpu().numpy()
            for start in range(0, len(histories), ENCODE_BATCH)
        ]
        return np.concatenate(pieces) if pieces else np.zeros((0, self.config.dim), dtype=np.float32)

    @torch.inference_mode()
    def _states(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """The state after each history: [B, D]. An empty history is taken as padding alone."""
        items_BL = self.pad([history or [PADDING] for history in histories]).to(_device(self))
        last = torch.tensor([min(max(len(h), 1), self.max_length) - 1 for h in histories])
        return self.encode(items_BL)[torch.arange(len(histories)), last]

    @torch.inference_mode()
    def logits(self, states: np.ndarray) -> np.ndarray:
        """Logits of all items: [n, D] → [n, 1 + V] float32; padding gets minus infinity."""
        weight = self.items.weight
        logits = torch.from_numpy(states).to(weight) @ weight.T
        logits[:, PADDING] = -torch.inf
        return logits.float().cpu().numpy()

    def indices(self, domain: str, item_ids: Iterable[str]) -> list[int]:
        """Indices of known items; others are left out."""
        return [self.index[(domain, item)] for item in item_ids if (domain, item) in self.index]

    def save(self, folder: Path) -> None:
        """Writes `model.safetensors` and `sasrec.json`."""
        save_file(
            {name: value.detach().float().contiguous().clone() for name, value in self.state_dict().items()},
            folder / "model.safetensors",
        )
        described = {
            "config": self.config.model_dump(mode="json"),
            "vocabulary": self.vocabulary,
            "max_length": self.max_length,
        }
        (folder / "sasrec.json").write_text(json.dumps(described))

    @classmethod
    def load(cls, folder: Path) -> Sasrec:
        """The model in a folder that `save` wrote, ready for inference."""
        described = json.loads((folder / "sasrec.json").read_text())
        config = SasrecConfig.model_validate(described["config"])
        model = cls(config, [tuple(key) for key in described["vocabulary"]], described["max_length"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.eval()


def sequences(examples_artefact: Artefact, split: Split, *, with_target: bool) -> dict[Key, list[str]]:
    """For each domain and user the longest sequence of item ids among the examples of a split.

    With the target, a user's training sequence is what the newest training example saw and led to.
    """
    found: dict[Key, list[str]] = {}
    for data in examples_artefact.tables(split):
        for example in examples(data):
            history = example.history
            steps = [step.item_id for step in history.interactions] + ([example.target_item] if with_target else [])
            key = (history.domain, history.user_id)
            if len(steps) > len(found.get(key, ())):
                found[key] = steps
    return found


class SasrecTask:
    """Trains SASRec on users' training sequences; validates by the rank of the target in the whole catalogue."""

    monitor = "ndcg@10"
    higher_is_better = True
    validate_first = False

    def __init__(self, config: SasrecConfig, items: Artefact, examples_artefact: Artefact, max_length: int) -> None:
        vocabulary = [
            key
            for data in items.tables(columns=["domain", "item_id"])
            for key in zip(data.column(0).to_pylist(), data.column(1).to_pylist(), strict=True)
        ]
        self.config = config
        self.model = Sasrec(config, vocabulary, max_length)
        train = sequences(examples_artefact, "train", with_target=True)
        self.train = [(key, self.model.indices(key[0], steps)) for key, steps in train.items() if len(steps) > 1]
        self.mean_length = float(np.mean([len(steps) - 1 for _, steps in self.train])) if self.train else 1.0
        limit = config.training.validation_examples
        self.validation = [
            (
                self.model.indices(e.history.domain, [s.item_id for s in e.history.interactions]),
                e.history.domain,
                e.target_item,
            )
            for data in examples_artefact.tables("validation")
            for e in examples(data)
        ][:limit]

    def module(self) -> nn.Module:
        return self.model

    def __len__(self) -> int:
        return len(self.train)

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        items_BL = self.model.pad([self.train[index][1] for index in indices], extra=1)
        size = len(self.model.vocabulary)
        if self.config.negatives >= size:
            negatives_N = torch.arange(1, size + 1)
        else:
            negatives_N = torch.randint(1, size + 1, (self.config.negatives,))
        sums_B: torch.Tensor = engine(items_BL.to(_device(engine)), negatives_N.to(_device(engine)))
        # A constant scale makes every position count alike, whichever user it belongs to.
        return sums_B / self.mean_length

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        gain, hits, share = 0.0, 0, self.validation[rank::world]
        model = self.model
        for start in range(0, len(share), ENCODE_BATCH):
            rows = share[start : start + ENCODE_BATCH]
            logits = model.logits(model.states([history for history, _, _ in rows]))
            targets = np.array([model.index[(domain, item)] for _, domain, item in rows])
            found = ranks(logits, targets)
            gain += float((1 / np.log2(1 + found[found <= 10])).sum())
            hits += int((found <= 10).sum())
        return {"ndcg@10": (gain, len(share)), "hr@10": (hits, len(share))}

    def save(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, Sasrec)
        module.save(folder)

    def names(self, indices: Sequence[int]) -> list[str]:
        return ["/".join(self.train[index][0]) for index in indices]


def _device(engine: nn.Module) -> torch.device:
    return next(engine.parameters()).device
