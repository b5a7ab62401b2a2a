"""Candidates where none are given: the items whose SASRec vectors have the highest logit for a history."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import faiss
import numpy as np

from pulse_ray.candidates.sasrec import Sasrec

BATCH = 64
"""Histories that are searched for at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Query:
    """Whom to find items for.

    `history` holds item ids, oldest first, and `touched` those that must not be found; items that SASRec does not know
    are left out of both.
    """

    domain: str
    history: Sequence[str]
    touched: Collection[str]


class Retrieval:
    """Exact search over the item vectors of each domain. SASRec's logit is the inner product that faiss maximises.

    Args:
        folder: a trained SASRec.
    """

    def __init__(self, folder: Path) -> None:
        self.model = Sasrec.load(folder)
        weights = self.model.items.weight.detach().float().cpu().numpy()
        self._items: dict[str, list[str]] = defaultdict(list)
        rows: dict[str, list[int]] = defaultdict(list)
        for (domain, item), index in self.model.index.items():
            self._items[domain].append(item)
            rows[domain].append(index)
        self._indexes = {}
        for domain, places in rows.items():
            self._indexes[domain] = faiss.IndexFlatIP(weights.shape[1])
            self._indexes[domain].add(np.ascontiguousarray(weights[places]))

    def nearest(self, queries: Sequence[Query], count: int) -> list[list[str]]:
        """For each query up to `count` untouched items of its domain, best first; none for a domain without items."""
        found: list[list[str]] = [[] for _ in queries]
        by_domain: dict[str, list[int]] = defaultdict(list)
        for place, query in enumerate(queries):
            by_domain[query.domain].append(place)
        for domain in by_domain.keys() & self._indexes.keys():
            # Those who touched about as much go together: the longest decides how far a batch is searched.
            places = sorted(by_domain[domain], key=lambda place: len(queries[place].touched))
            for start in range(0, len(places), BATCH):
                batch = places[start : start + BATCH]
                for place, items in zip(batch, self._search([queries[place] for place in batch], count), strict=True):
                    found[place] = items
        return found

    def _search(self, queries: Sequence[Query], count: int) -> Iterator[list[str]]:
        domain = queries[0].domain
        items = self._items[domain]
        states = self.model.states([self.model.indices(domain, query.history) for query in queries])
        reach = min(count + max(len(set(query.touched)) for query in queries), len(items))
        _, rows = self._indexes[domain].search(states, reach)
        for query, row in zip(queries, rows.tolist(), strict=True):
            touched = set(query.touched)
            yield [items[place] for place in row if items[place] not in touched][:count]
