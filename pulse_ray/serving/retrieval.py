"""Candidates where a request names none: the items whose SASRec vectors have the highest logit for a history."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import faiss
import numpy as np

from pulse_ray.candidates.sasrec import Sasrec


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

    def nearest(self, domain: str, history: Sequence[str], count: int) -> list[str]:
        """Up to `count` items that the history does not hold, best first.

        Args:
            history: item ids, oldest first; items that SASRec does not know are left out.
        """
        if domain not in self._indexes:
            return []
        seen, items = set(history), self._items[domain]
        state = self.model.states([self.model.indices(domain, history)])
        _, found = self._indexes[domain].search(state, min(count + len(seen), len(items)))
        return [items[row] for row in found[0].tolist() if items[row] not in seen][:count]
