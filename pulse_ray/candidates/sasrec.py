"""SASRec (Kang and McAuley, 2018): a causal transformer over item ids, with pre-norm blocks and tied item embeddings.

Shape suffixes: B users, L positions of a padded sequence, T real positions of a batch, D model dimension, N negatives,
V items (index 0 is padding, items are 1 to V).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from pulse_ray.candidates.losses import FullSoftmax, gbce, sampled_softmax
from pulse_ray.candidates.rows import Key, newest_rows, read_rows
from pulse_ray.config import SasrecConfig
from pulse_ray.metrics import ranks
from pulse_ray.training.task import Read
from pulse_ray.workspace import Artefact

PADDING = 0
ENCODE_BATCH = 256
LOGITS_AT_ONCE = 2**25
"""Logits of all items that exist at once, 128 MiB of them: of a large catalogue only a few examples' are."""
ROTARY_BASE = 10_000.0
GROUP_RATIO = 2
"""Sequences attend in groups; the longest of a group is less than so many times as long as its shortest."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """Sequences of like length, padded to the longest of them when they attend."""

    rows_B: torch.Tensor
    """Their places in the batch."""
    length: int
    slots_t: torch.Tensor
    """Where each of their t real positions lies among the B × L padded ones."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How the T real positions of a batch are laid out: group after group, sequence after sequence.

    Most sequences are much shorter than the longest, and padding would cost what an item costs: only attention sees
    any, and little of it.
    """

    groups: Sequence[Group]
    rows_T: torch.Tensor
    """The sequence of each position."""
    places_T: torch.Tensor
    """The place of each position in its sequence."""

    @classmethod
    def of(cls, lengths_B: torch.Tensor) -> Layout:
        """The layout of sequences of these lengths; those of length 0 have no position."""
        sorted_B, order_B = lengths_B.sort(descending=True, stable=True)
        lengths, start, found = sorted_B.tolist(), 0, []
        while start < len(lengths) and (longest := lengths[start]) > 0:
            end = start + sum(length * GROUP_RATIO > longest for length in lengths[start:])
            real_BL = torch.arange(longest, device=lengths_B.device) < sorted_B[start:end, None]
            slots_t = real_BL.flatten().nonzero()[:, 0]
            found.append(Group(rows_B=order_B[start:end], length=longest, slots_t=slots_t))
            start = end
        return cls(
            groups=found,
            rows_T=torch.cat([group.rows_B[group.slots_t // group.length] for group in found]),
            places_T=torch.cat([group.slots_t % group.length for group in found]),
        )


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.drop = nn.Dropout(dropout)

    def forward(self, x_TD: torch.Tensor, layout: Layout, rotary: bool) -> torch.Tensor:
        """[T, D] → [T, D]; a position sees itself and what precedes it in its sequence."""
        qkv = self.qkv(self.norm_attention(x_TD))
        parts = qkv.split([len(group.slots_t) for group in layout.groups])
        mixed = [self._attend(part, group, rotary) for part, group in zip(parts, layout.groups, strict=True)]
        x_TD = x_TD + self.drop(self.out(torch.cat(mixed)))
        out_TD: torch.Tensor = x_TD + self.drop(self.feed(self.norm_feed(x_TD)))
        return out_TD

    def _attend(self, qkv: torch.Tensor, group: Group, rotary: bool) -> torch.Tensor:
        """Queries, keys and values of a group's real positions [t, 3 D] → what these attend to [t, D]."""
        batch, length, width = len(group.rows_B), group.length, qkv.shape[1]
        padded = qkv.new_zeros(batch * length, width).index_copy(0, group.slots_t, qkv)
        heads = padded.view(batch, length, 3, self.heads, width // 3 // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        if rotary:
            query, key = rotate(query), rotate(key)
        # Sequences are padded on the right, so causality alone keeps padding out of every real position.
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        # Rows are taken as an embedding takes them, whose gradient is summed in parallel.
        return F.embedding(group.slots_t, mixed.transpose(1, 2).reshape(batch * length, width // 3))


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotary positions (Su et al., 2021): turns pairs of the last dimension of [..., L, width] by their place in L."""
    length, width = x.shape[-2:]
    speeds = ROTARY_BASE ** (-torch.arange(0, width, 2, device=x.device) / width)
    angles = torch.arange(length, device=x.device)[:, None] * speeds
    (first, second), cos, sin = x.chunk(2, dim=-1), angles.cos().to(x), angles.sin().to(x)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


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
        self.positions = nn.Embedding(max_length, config.dim) if config.positions == "learned" else None
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config.dim, config.heads, config.dropout) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        nn.init.normal_(self.items.weight, std=config.dim**-0.5)
        if self.positions is not None:
            nn.init.normal_(self.positions.weight, std=config.dim**-0.5)

    def encode(self, items_T: torch.Tensor, layout: Layout) -> torch.Tensor:
        """States after each position: [T] item indices → [T, D]."""
        x_TD = self.items(items_T) * math.sqrt(self.config.dim)
        if self.positions is not None:
            x_TD = x_TD + self.positions(layout.places_T)
        x_TD = self.drop(x_TD)
        for block in self.blocks:
            x_TD = block(x_TD, layout, rotary=self.positions is None)
        states_TD: torch.Tensor = self.norm(x_TD)
        return states_TD

    def forward(self, items_BL: torch.Tensor, negatives_N: torch.Tensor | None = None) -> torch.Tensor:
        """Sum over each sequence's positions of the loss of its next item: [B] fp32.

        Args:
            items_BL: sequences, inputs and targets alike, padded on the right.
            negatives_N: items shared by the batch; the full softmax takes none.
        """
        layout = Layout.of((items_BL != PADDING).sum(1) - 1)
        rows_T, places_T = layout.rows_T, layout.places_T
        states_TD = self.encode(items_BL[rows_T, places_T], layout)
        losses_T = self._loss(states_TD, items_BL[rows_T, places_T + 1], negatives_N)
        return losses_T.new_zeros(len(items_BL)).index_add(0, rows_T, losses_T)

    def _loss(self, states_TD: torch.Tensor, targets_T: torch.Tensor, negatives_N: torch.Tensor | None) -> torch.Tensor:
        """The loss of each position: [T] fp32."""
        if self.config.loss == "full_softmax":
            losses_T: torch.Tensor = FullSoftmax.apply(  # type: ignore[no-untyped-call]
                states_TD, self.items.weight[1:], targets_T - 1
            )
            return losses_T
        assert negatives_N is not None, f"{self.config.loss} needs negatives"
        positive_T = (states_TD * self.items(targets_T)).sum(-1).float()
        negative_TN = (states_TD @ self.items(negatives_N).T).float()
        same_TN = targets_T[:, None] == negatives_N
        if self.config.loss == "sampled_softmax":
            return sampled_softmax(positive_T, negative_TN, same_TN)
        return gbce(
            positive_T,
            negative_TN,
            same_TN,
            items=len(self.vocabulary),
            calibration=self.config.gbce_calibration,
        )

    def pad(self, sequences: Iterable[Sequence[int]], extra: int = 0) -> torch.Tensor:
        """Sequences cut to the newest `max_length + extra` items and padded on the right: [B, L]."""
        cut = [torch.tensor(list(sequence)[-(self.max_length + extra) :], dtype=torch.long) for sequence in sequences]
        return nn.utils.rnn.pad_sequence(cut, batch_first=True, padding_value=PADDING)

    def states(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """The state after each history: [n, D] float32, batch by batch; histories of like length share one."""
        found = np.zeros((len(histories), self.config.dim), dtype=np.float32)
        order = np.argsort([len(history) for history in histories], kind="stable")
        for start in range(0, len(order), ENCODE_BATCH):
            rows = order[start : start + ENCODE_BATCH]
            found[rows] = self._states([histories[row] for row in rows]).float().cpu().numpy()
        return found

    @torch.inference_mode()
    def _states(self, histories: Sequence[Sequence[int]]) -> torch.Tensor:
        """The state after each history: [B, D]. An empty history is taken as padding alone."""
        items_BL = self.pad([history or [PADDING] for history in histories]).to(_device(self))
        lengths_B = torch.tensor([min(max(len(h), 1), self.max_length) for h in histories], device=items_BL.device)
        layout = Layout.of(lengths_B)
        states_TD = self.encode(items_BL[layout.rows_T, layout.places_T], layout)
        last_T = layout.places_T == lengths_B[layout.rows_T] - 1
        found_BD = states_TD.new_empty(len(histories), states_TD.shape[1])
        found_BD[layout.rows_T[last_T]] = states_TD[last_T]
        return found_BD

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


def catalogue_ranks(
    logits: np.ndarray, histories: Sequence[Sequence[int]], targets: Sequence[int]
) -> NDArray[np.int64]:
    """Ranks of targets among all items that are not in the history; ties rank against them: [n].

    Args:
        logits: [n, 1 + V]; those of the histories' items are overwritten.
    """
    rows = np.arange(len(targets))
    wanted = logits[rows, targets]
    seen = np.repeat(rows, [len(history) for history in histories])
    logits[seen, np.concatenate([np.asarray(history, dtype=np.int64) for history in histories])] = -np.inf
    logits[rows, targets] = wanted
    return ranks(logits, targets)


class SasrecTask:
    """Trains SASRec on users' training sequences; validates by the rank of the target among all new items."""

    monitor = "ndcg@10"
    higher_is_better = True
    divisible = True
    validate_first = False

    def __init__(self, config: SasrecConfig, items: Artefact, examples_artefact: Artefact, max_length: int) -> None:
        vocabulary = [
            key
            for data in items.tables(columns=["domain", "item_id"])
            for key in zip(data.column(0).to_pylist(), data.column(1).to_pylist(), strict=True)
        ]
        self.config, self.read = config, Read()
        self.model = Sasrec(config, vocabulary, max_length)
        self.train = [
            (key, self.model.indices(row.domain, [*row.items, row.target]))
            for key, row in newest_rows(examples_artefact.tables("train")).items()
        ]
        self.mean_length = float(np.mean([len(steps) - 1 for _, steps in self.train])) if self.train else 1.0
        limit = config.training.validation_examples
        self.validation = [
            (self.model.indices(row.domain, row.items), row.domain, row.target)
            for data in examples_artefact.tables("validation")
            for row in read_rows(data)
        ][:limit]

    def module(self) -> nn.Module:
        return self.model

    def __len__(self) -> int:
        return len(self.train)

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        items_BL = self.model.pad([self.train[index][1] for index in indices], extra=1).to(_device(engine))
        self.read.tokens += int((items_BL > 0).sum())
        self.read.places += items_BL.numel()
        size, count = len(self.model.vocabulary), self.config.negatives
        # A small catalogue is taken whole: no item twice, and the sampled softmax is the full one.
        negatives_N = torch.arange(1, size + 1) if count >= size else torch.randint(1, size + 1, (count,))
        sums_B: torch.Tensor = engine(items_BL, negatives_N.to(items_BL))
        # A constant scale makes every position count alike, whichever user it belongs to.
        return sums_B / self.mean_length

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        gain, hits, share = 0.0, 0, self.validation[rank::world]
        model = self.model
        step = max(1, min(ENCODE_BATCH, LOGITS_AT_ONCE // len(model.vocabulary)))
        for start in range(0, len(share), step):
            rows = share[start : start + step]
            histories = [history for history, _, _ in rows]
            targets = [model.index[(domain, item)] for _, domain, item in rows]
            found = catalogue_ranks(model.logits(model.states(histories)), histories, targets)
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
