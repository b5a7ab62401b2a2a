"""Candidates for users who come without any: SASRec over the whole catalogue of a domain, less what they touched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.scoring.users import UserRow

BATCH = 64
"""Users whose logits over the catalogue are held at once."""


class Retriever:
    """Finds the items that SASRec ranks highest.

    Args:
        folder: the `sasrec` artefact, on this machine.
        count: items to find for each user.
    """

    def __init__(self, folder: Path, count: int) -> None:
        self.model = Sasrec.load(folder)
        self.count = count
        domains = np.array(["", *(domain for domain, _ in self.model.vocabulary)])
        self._own = {str(domain): domains == domain for domain in np.unique(domains[1:])}

    def find(self, users: Sequence[UserRow]) -> list[tuple[str, ...]]:
        """Ids of up to `count` items of each user's domain that the user never touched, best first."""
        return [items for start in range(0, len(users), BATCH) for items in self._find(users[start : start + BATCH])]

    def _find(self, users: Sequence[UserRow]) -> list[tuple[str, ...]]:
        histories = [
            self.model.indices(user.history.domain, [step.item_id for step in user.history.interactions])
            for user in users
        ]
        logits = self.model.logits(self.model.states(histories))
        return [self._best(row, user) for row, user in zip(logits, users, strict=True)]

    def _best(self, logits: np.ndarray, user: UserRow) -> tuple[str, ...]:
        allowed = self._own[user.history.domain].copy()
        allowed[self.model.indices(user.history.domain, user.touched)] = False
        places = np.flatnonzero(allowed)
        if len(places) > self.count:
            places = places[np.argpartition(-logits[places], self.count - 1)[: self.count]]
        ranked = places[np.argsort(-logits[places], kind="stable")]
        return tuple(self.model.vocabulary[place - 1][1] for place in ranked)
