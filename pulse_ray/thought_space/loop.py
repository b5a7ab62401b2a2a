"""Training of the Thought Space: rationale and behaviour pairs, InfoNCE, and retrieval accuracy on held-out users."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from pulse_ray import catalogue
from pulse_ray.config import ThoughtSpaceConfig
from pulse_ray.schema import Example, examples
from pulse_ray.seeding import derive
from pulse_ray.text import behaviour_text
from pulse_ray.thought_space import gathering
from pulse_ray.thought_space.encoders import Encoders, Features
from pulse_ray.thought_space.loss import Labels, allowed_negatives, info_nce, sample_negatives
from pulse_ray.training.task import Read
from pulse_ray.workspace import Artefact

HELD_OUT_OF = 5
"""One user in so many is held out of training, to measure retrieval on."""
RETRIEVAL_POOL = 100
LOSS_BATCH = 32
LEAST_TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """A training example and the rationale written for it."""

    example: Example
    rationale: str

    @property
    def user(self) -> str:
        """Names the user across domains."""
        return f"{self.example.history.domain}/{self.example.history.user_id}"

    @property
    def target(self) -> str:
        """Names the target across domains."""
        return f"{self.example.history.domain}/{self.example.target_item}"


def pairs(examples_artefact: Artefact, rationales: Artefact) -> Iterator[Pair]:
    """Training examples with their rationales, in order of parts; rejected ones are not among them."""
    for part in rationales.parts("train"):
        written = rationales.read(part, ["example_id", "text"]).to_pylist()
        texts = {row["example_id"]: row["text"] for row in written}
        for example in examples(examples_artefact.read(part)):
            if example.history.example_id in texts:
                yield Pair(example=example, rationale=texts[example.history.example_id])


def held_out(pair: Pair, seed: int) -> bool:
    """Whether a user is kept for measurement. A property of the user's name, so all of its examples go together."""
    return derive(seed, "held out", pair.user) % HELD_OUT_OF == 0


class Behaviours:
    """Behaviour texts for a history encoder, within its token budget."""

    def __init__(self, config: ThoughtSpaceConfig, encoders: Encoders, items: catalogue.Catalogue) -> None:
        self.config, self.items = config, items
        self.count = encoders.counter("history")
        self._known: dict[tuple[str, bool], str] = {}

    def text(self, example: Example, *, with_target: bool) -> str:
        """b_u of Eq. 1, or the history alone."""
        key = (example.history.example_id, with_target)
        if key not in self._known:
            self._known[key] = behaviour_text(
                example.history,
                self.items[example.history.domain],
                example.target_item if with_target else None,
                count=self.count,
                max_tokens=self.config.text.history_tokens,
                review_words=self.config.text.review_words,
            )
        return self._known[key]


class Towers(nn.Module):
    """Both encoders and the temperature of their similarities: what is trained.

    Args:
        learned: whether the temperature is trained as well, from `temperature` on (as CLIP's, and bounded like it).
    """

    def __init__(self, encoders: Encoders, temperature: float, *, learned: bool) -> None:
        super().__init__()
        self.encoders = encoders
        # Of one element, as DeepSpeed cannot take parameters without a dimension.
        self.log_temperature = nn.Parameter(torch.tensor([temperature]).log(), requires_grad=learned)

    def forward(self, **features: Features) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Unit vectors of rationales and behaviours, and the temperature: [B, D], [B, D], []."""
        rationales_BD, behaviours_BD = self.encoders(**features)
        return rationales_BD, behaviours_BD, self.log_temperature[0].exp().clamp(min=LEAST_TEMPERATURE)


def _labels(pairs: Sequence[Pair], device: torch.device) -> Labels:
    def codes(names: Iterable[str]) -> torch.Tensor:
        return torch.tensor([derive(0, name) for name in names], device=device)

    return Labels(
        examples=codes(pair.example.history.example_id for pair in pairs),
        users=codes(pair.user for pair in pairs),
        targets=codes(pair.target for pair in pairs),
        domains=codes(pair.example.history.domain for pair in pairs),
    )


class ThoughtSpaceTask:
    """Trains both encoders; validates by loss and by retrieval of one's own history among `RETRIEVAL_POOL`."""

    monitor = "loss"
    higher_is_better = False
    validate_first = True
    divisible = False  # The others of a batch are its negatives.

    def __init__(
        self, config: ThoughtSpaceConfig, items: Artefact, examples_artefact: Artefact, rationales: Artefact, seed: int
    ) -> None:
        self.config, self.seed, self.read = config, seed, Read()
        self.encoders = Encoders.create(config.model, config.max_tokens, shared=config.shared_tower)
        self.behaviours = Behaviours(config, self.encoders, catalogue.load(items))
        both: dict[bool, list[Pair]] = {True: [], False: []}
        for pair in pairs(examples_artefact, rationales):
            both[held_out(pair, seed)].append(pair)
        self.held, self.train = both[True], both[False]

    def module(self) -> nn.Module:
        return Towers(self.encoders.float(), self.config.temperature, learned=self.config.learned_temperature)

    def __len__(self) -> int:
        return len(self.train)

    def losses(self, engine: nn.Module, indices: Sequence[int]) -> torch.Tensor:
        chosen = [self.train[index] for index in indices]
        dropped = (torch.rand(len(chosen)) < self.config.drop_target).tolist()
        texts = [self.behaviours.text(p.example, with_target=not drop) for p, drop in zip(chosen, dropped, strict=True)]
        return self._losses(engine, chosen, texts, training=True)

    def _losses(self, engine: nn.Module, chosen: list[Pair], texts: list[str], *, training: bool) -> torch.Tensor:
        """In training against sampled negatives of all workers' batches, else against all of this batch."""
        rationales = self.encoders.tokens("rationale", [pair.rationale for pair in chosen])
        behaviours = self.encoders.tokens("history", texts)
        if training:
            for piece in (*rationales, *behaviours):
                places = piece["input_ids"].numel()
                self.read.places += places
                self.read.tokens += int(piece["attention_mask"].sum()) if "attention_mask" in piece else places
        rationales_BD, behaviours_BD, temperature = engine(rationales=rationales, behaviours=behaviours)
        labels = _labels(chosen, rationales_BD.device)
        rank, sizes = 0, [len(chosen)]
        if training:
            rank, sizes = gathering.workers()[0], gathering.sizes(len(chosen), rationales_BD.device)
        columns = Labels(**{name: gathering.gathered(getattr(labels, name), sizes) for name in labels.__slots__})
        similar_BN = behaviours_BD @ gathering.gathered(rationales_BD, sizes).T
        allowed_BN = allowed_negatives(labels, columns)
        if training:
            negatives_BN = sample_negatives(
                allowed_BN,
                self.config.negatives,
                other_domain_BN=labels.domains[:, None] != columns.domains,
                inter_domain=self.config.inter_domain,
                similar_BN=similar_BN.detach(),
                hard=self.config.hard_negatives,
            )
        else:
            negatives_BN = allowed_BN
        positives_B = sum(sizes[:rank]) + torch.arange(len(chosen), device=similar_BN.device)
        return info_nce(similar_BN, positives_B, negatives_BN, temperature)

    def validate(self, engine: nn.Module, rank: int, world: int) -> dict[str, tuple[float, int]]:
        total, count = 0.0, 0
        # Cut before they are dealt out, or a batch's negatives would depend on the number of workers.
        for start in range(rank * LOSS_BATCH, len(self.held), world * LOSS_BATCH):
            chosen = self.held[start : start + LOSS_BATCH]
            count += len(chosen)
            texts = [self.behaviours.text(pair.example, with_target=True) for pair in chosen]
            total += float(self._losses(engine, chosen, texts, training=False).sum())
        share = self.held[rank::world]
        hits = {
            name: self._retrieved(share, with_target=with_target)
            for name, with_target in (("r@1", True), ("r@1_history_only", False))
        }
        return {"loss": (total, count), **{name: (found, len(share)) for name, found in hits.items()}}

    def _retrieved(self, queries: list[Pair], *, with_target: bool) -> int:
        """Held-out rationales whose own behaviour is nearest among `RETRIEVAL_POOL` behaviours of distinct users."""
        if not queries:
            return 0
        pool = self._pool()
        texts = [self.behaviours.text(pair.example, with_target=with_target) for pair in pool]
        pool_ND = self.encoders.encode("history", texts)
        place = {pair.example.history.example_id: row for row, pair in enumerate(pool)}
        rationales = self.encoders.encode("rationale", [pair.rationale for pair in queries])
        rng = np.random.default_rng(derive(self.seed, "retrieval"))
        found = 0
        for pair, vector in zip(queries, rationales, strict=True):
            own = place[pair.example.history.example_id]
            others = np.array([row for row, other in enumerate(pool) if other.user != pair.user])
            rivals = rng.permutation(others)[: RETRIEVAL_POOL - 1]
            found += int(pool_ND[own] @ vector > (pool_ND[rivals] @ vector).max(initial=-np.inf))
        return found

    def _pool(self) -> list[Pair]:
        """Held-out pairs, filled up with training pairs as distractors where there are too few."""
        return self.held + self.train[: max(0, RETRIEVAL_POOL - len(self.held))]

    def save(self, module: nn.Module, folder: Path) -> None:
        assert isinstance(module, Towers)
        module.encoders.save(folder)

    def names(self, indices: Sequence[int]) -> list[str]:
        return [self.train[index].example.history.example_id for index in indices]
