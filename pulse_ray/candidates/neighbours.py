"""Similar users: the nearest training states by cosine, exact search with faiss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import faiss
import numpy as np

MAX_NEIGHBOUR_ITEMS = 30


class NeighbourIndex:
    """The users of one domain by the state that follows their training sequence.

    Args:
        user_ids: [n] one per row of `states`.
        states: [n, dim] float32 SASRec states.
        items: [n] each user's training items, oldest first.
    """

    def __init__(self, user_ids: Sequence[str], states: np.ndarray, items: Sequence[Sequence[str]]) -> None:
        self.user_ids = list(user_ids)
        self.items = list(items)
        vectors = _normalised(states)
        self._index = faiss.IndexFlatIP(vectors.shape[1])
        self._index.add(vectors)

    def nearest(self, states: np.ndarray, user_ids: Sequence[str], count: int) -> list[list[int]]:
        """For each query, up to `count` rows of the index, nearest first; never the querying user itself.

        Args:
            states: [q, dim] states of the histories.
            user_ids: [q] whose they are.
        """
        _, found = self._index.search(_normalised(states), min(count + 1, len(self.user_ids)))
        return [
            [row for row in rows.tolist() if row >= 0 and self.user_ids[row] != user][:count]
            for rows, user in zip(found, user_ids, strict=True)
        ]

    def items_of(self, rows: Iterable[int]) -> list[str]:
        """Training items of these users, nearest user first, each user's newest first, without repeats."""
        seen: dict[str, None] = {}
        for row in rows:
            seen.update(dict.fromkeys(reversed(self.items[row])))
        return list(seen)[:MAX_NEIGHBOUR_ITEMS]


def _normalised(states: np.ndarray) -> np.ndarray:
    vectors = np.array(states, dtype=np.float32, order="C")
    faiss.normalize_L2(vectors)
    return vectors
