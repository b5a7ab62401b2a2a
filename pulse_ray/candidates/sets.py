"""What is drawn for each example: its candidate set and, on held-out splits, the target's rank in the whole catalogue.

Shape suffixes: n examples, V items of a domain, D model dimension.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pulse_ray.candidates.rows import Key, Row
from pulse_ray.candidates.sampling import HARD_POOL, draw_hard, draw_negatives, hardest, place_target
from pulse_ray.candidates.sasrec import LOGITS_AT_ONCE, Sasrec
from pulse_ray.errors import DataError
from pulse_ray.seeding import derive
from pulse_ray.workspace import Part, StageRun


def partition_of(part: Part) -> Part:
    """The part of `interactions` that holds the users of a part of `examples`.

    >>> partition_of("train-0003-0001")
    'part-0003'
    """
    return f"part-{part.split('-')[1]}"


class Touched:
    """All items of users, those after the examples' targets included. Keeps the partition that was read last."""

    def __init__(self, stage: StageRun) -> None:
        self._artefact = stage.input("interactions")
        self._partition: Part | None = None
        self._table: pa.Table | None = None

    def of(self, part: Part, rows: Sequence[Row]) -> dict[Key, set[str]]:
        """Item ids by domain and user, for the users of a part of examples."""
        if self._partition != partition_of(part):
            self._partition = partition_of(part)
            self._table = self._artefact.read(self._partition, ["domain", "user_id", "item_id"])
        assert self._table is not None
        mine = self._table.filter(pc.is_in(self._table.column("user_id"), pa.array({row.user_id for row in rows})))
        found: dict[Key, set[str]] = defaultdict(set)
        for domain, user, item in zip(*(column.to_pylist() for column in mine.columns), strict=True):
            found[(domain, user)].add(item)
        return found


class _Domain:
    """A domain's items by place: 0 to V - 1, in the order of the model's vocabulary."""

    def __init__(self, indices: NDArray[np.int64], vectors_VD: NDArray[np.float32], popularity: NDArray[np.int64]):
        self.indices = indices
        self.vectors_VD = vectors_VD
        self.popularity = popularity
        # One unseen purchase keeps every item possible.
        self.cumulative = np.cumsum(popularity + 1)
        self.ascending = np.sort(popularity)

    def __len__(self) -> int:
        return len(self.indices)

    def popularity_rank(self, target: int, history: NDArray[np.int64]) -> int:
        """Rank of the target by popularity among all items outside the history, ties against it."""
        least = self.popularity[target]
        as_good = len(self) - int(np.searchsorted(self.ascending, least, side="left"))
        return as_good - int((self.popularity[history] >= least).sum())

    @staticmethod
    def sasrec_rank(logits_V: NDArray[np.float32], target: int, history: NDArray[np.int64]) -> int:
        """Rank of the target by logit among all items outside the history, ties against it."""
        as_good = int(np.count_nonzero(logits_V >= logits_V[target]))
        return as_good - int((logits_V[history] >= logits_V[target]).sum())


class CandidateSets:
    """Draws candidate sets with a trained model. Holds the item vectors and popularity of every domain.

    Raises:
        DataError: the model's item vectors are not finite.
    """

    def __init__(self, stage: StageRun, model: Sasrec) -> None:
        self.seed = stage.config.seed
        self.config = stage.config.candidates
        self.model = model
        vectors = model.items.weight.detach().float().cpu().numpy()
        _check_finite(vectors)
        popularity = np.zeros(len(vectors), dtype=np.int64)
        for data in stage.input("items").tables(columns=["domain", "item_id", "popularity"]):
            for domain, item, count in zip(*(column.to_pylist() for column in data.columns), strict=True):
                popularity[model.index[(domain, item)]] = count
        places: dict[str, list[int]] = defaultdict(list)
        for (domain, _), index in model.index.items():
            places[domain].append(index)
        self.domains = {
            domain: _Domain(own := np.array(sorted(found)), _rows_of(vectors, own), popularity[own])
            for domain, found in places.items()
        }

    def draw(
        self, rows: Sequence[Row], states_nD: NDArray[np.float32], touched: Mapping[Key, set[str]]
    ) -> list[dict[str, Any] | None]:
        """Each example's row of `candidates`, or None where the user has touched too much.

        Args:
            states_nD: the model's state after each history.
            touched: all items of each user, by domain and user.

        Raises:
            DataError: a state is not finite.
        """
        _check_finite(states_nD)
        drawn: list[dict[str, Any] | None] = [None] * len(rows)
        by_domain: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(rows):
            by_domain[row.domain].append(place)
        for domain, places in by_domain.items():
            own = self.domains[domain]
            whole = {place for place in places if self.config.sampler == "sasrec" or rows[place].split != "train"}
            for place in places:
                if place not in whole:
                    drawn[place] = self._draw(own, rows[place], states_nD[place], touched, None)
            for place, logits_V in _logits(own, states_nD, sorted(whole)):
                drawn[place] = self._draw(own, rows[place], states_nD[place], touched, logits_V)
        return drawn

    def _draw(
        self,
        own: _Domain,
        row: Row,
        state_D: NDArray[np.float32],
        touched: Mapping[Key, set[str]],
        logits_V: NDArray[np.float32] | None,
    ) -> dict[str, Any] | None:
        target = int(self._places(own, row.domain, [row.target])[0])
        ranks: dict[str, int | None] = dict.fromkeys(("sasrec_catalogue_rank", "popularity_catalogue_rank"))
        if logits_V is not None and row.split != "train":
            history = self._places(own, row.domain, set(row.items) - {row.target})
            ranks["sasrec_catalogue_rank"] = own.sasrec_rank(logits_V, target, history)
            ranks["popularity_catalogue_rank"] = own.popularity_rank(target, history)
        excluded = self._places(own, row.domain, touched[(row.domain, row.user_id)] | {row.target}).tolist()
        rng = np.random.default_rng(derive(self.seed, "candidates", row.example_id))
        count = self.config.size - 1
        if self.config.sampler == "sasrec":
            assert logits_V is not None
            negatives = draw_hard(rng, count, hardest(logits_V, excluded, HARD_POOL * count))
        else:
            cumulative = own.cumulative if self.config.sampler == "popularity" else None
            negatives = draw_negatives(rng, count, len(own), excluded, cumulative=cumulative)
        if negatives is None:
            return None
        chosen, target_index = place_target(rng, target, negatives)
        return {
            "example_id": row.example_id,
            "items": [self.model.vocabulary[index - 1][1] for index in own.indices[chosen]],
            "target_index": target_index,
            "sampler": self.config.sampler,
            "sasrec_logits": (own.vectors_VD[chosen] @ state_D).tolist(),
            **ranks,
        }

    def _places(self, own: _Domain, domain: str, items: Sequence[str] | set[str]) -> NDArray[np.int64]:
        """Places of items, ascending for a set: the order of a set of texts changes from process to process."""
        indices = self.model.indices(domain, items)
        return np.searchsorted(own.indices, np.sort(np.array(indices, dtype=np.int64)))


def _logits(
    own: _Domain, states_nD: NDArray[np.float32], places: Sequence[int]
) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """The logits of all items of the domain for each of the examples at `places`, a chunk of examples at a time."""
    step = max(1, LOGITS_AT_ONCE // len(own))
    for start in range(0, len(places), step):
        chunk = places[start : start + step]
        logits_nV = states_nD[chunk] @ own.vectors_VD.T
        yield from zip(chunk, logits_nV, strict=True)


def _rows_of(vectors: NDArray[np.float32], ascending: NDArray[np.int64]) -> NDArray[np.float32]:
    """Rows of a matrix; a view where they follow one another, as the items of a single domain do."""
    first, last = int(ascending[0]), int(ascending[-1])
    return vectors[first : last + 1] if last - first + 1 == len(ascending) else vectors[ascending]


def _check_finite(values: NDArray[np.float32]) -> None:
    if not np.isfinite(values).all():
        raise DataError(
            "SASRec's vectors are not all finite numbers", remedy="It diverged: lower candidates.sasrec.training.lr"
        )
