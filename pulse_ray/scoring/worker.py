"""What an actor of the pool does: it understands the users of a shard, finds what they lack, and ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from pulse_ray import catalogue
from pulse_ray.catalogue import Catalogue
from pulse_ray.config import RankerConfig, Variant
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.runtime import ShardOutput
from pulse_ray.schema import Item, Reject, table
from pulse_ray.scoring.reasons import Reasons
from pulse_ray.scoring.users import ShardReader, UserRow, Users, understand
from pulse_ray.workspace import Artefact, Part, StageRun

if TYPE_CHECKING:
    from pulse_ray.candidates.retrieval import Retrieval


class RankScorer(Protocol):
    """A trained ranker: `ranker.scorer.Scorer`, or what stands in for it in a test."""

    def score(self, rows: Sequence[RankRow], token_budget: int) -> list[np.ndarray]:
        """Logits of each row's candidates, [K] each."""
        ...


MakeScorer = Callable[[Path, RankerConfig, Catalogue], RankScorer]
"""Loads the ranker whose adapter lies in a local folder. It travels to the actors: a class or a module's function."""


def trained(folder: Path, config: RankerConfig, items: Catalogue) -> RankScorer:
    """The real one."""
    from pulse_ray.ranker.scorer import Scorer  # torch and transformers load in the actors, not in the driver

    return Scorer(folder, config, items)


class UserWorker:
    """Ranks the users of a shard. Holds the catalogue, one trained ranker and, once needed, reasons and SASRec.

    Args:
        variant: which ranker scores; `none` ranks without reasons.
        version: names the ranker in the output.
    """

    def __init__(self, stage: StageRun, users: Users, variant: Variant, version: str, make_scorer: MakeScorer) -> None:
        self.stage, self.variant, self.version = stage, variant, version
        self.config = stage.config.score
        self.reader = ShardReader(users)
        self.items = catalogue.load(stage.input("items"))
        adapter = Artefact(stage.input("ranker").filesystem, f"{stage.input('ranker').path}/{variant}", variant)
        with tempfile.TemporaryDirectory() as local:
            self.scorer = make_scorer(adapter.download(Path(local)), stage.config.ranker, self.items)

    def __call__(self, part: Part) -> ShardOutput:
        file, start, data = self.reader.read(part)
        domains = [domain.name for domain in self.stage.config.prepare.domains]
        understood = [
            understand(
                row,
                f"{file.name}:{start + place}",
                self.items,
                self.stage.config.prepare.max_sequence,
                domains[0] if len(domains) == 1 else None,
            )
            for place, row in enumerate(data.to_pylist())
        ]
        rejects = [row for row in understood if isinstance(row, Reject)]
        rows = self._with_candidates([row for row in understood if isinstance(row, UserRow)], rejects)
        ranked = self._ranked(rows)
        logits = self.scorer.score(ranked, self.config.token_budget)
        scores = [_scores(user, scored) for user, scored in zip(rows, logits, strict=True)]
        best = [self._best(*one) for one in zip(rows, ranked, logits, strict=True)]
        if self.config.keep_profiles:
            self._keep_profiles(rows, ranked)
        return ShardOutput(
            tables={"user_scores": table("user_scores", scores), "recommendations": table("recommendations", best)},
            examples=len(understood),
            rejects=rejects,
        )

    def _with_candidates(self, rows: Sequence[UserRow], rejects: list[Reject]) -> list[UserRow]:
        """The rows, with candidates retrieved where none were given; who is left without any joins the rejects."""
        found = iter(self._retrieved([row for row in rows if row.candidates is None]))
        complete = [row if row.candidates is not None else replace(row, candidates=next(found)) for row in rows]
        for row in complete:
            if not row.candidates:
                rejects.append(Reject(key=row.row_id, reason="nothing to retrieve", detail="the user touched it all"))
        return [row for row in complete if row.candidates]

    def _retrieved(self, rows: Sequence[UserRow]) -> list[tuple[str, ...]]:
        """Candidates that the users of these rows never touched."""
        if not rows:
            return []
        from pulse_ray.candidates.retrieval import Query

        queries = [
            Query(
                domain=row.history.domain,
                history=[step.item_id for step in row.history.interactions],
                touched={step.item_id for step in row.steps},
            )
            for row in rows
        ]
        return [tuple(items) for items in self._retrieval.nearest(queries, self.config.retrieve_k)]

    def _ranked(self, rows: Sequence[UserRow]) -> list[RankRow]:
        """What the ranker sees of each row, with the reason given, else the one that the run found."""
        reasons = [row.reason for row in rows] if self.variant != "none" else [None] * len(rows)
        if self.variant != "none" and None in reasons:
            known = self._reasons.of([(row.history.domain, row.history.user_id) for row in rows])
            reasons = [given or found for given, found in zip(reasons, known, strict=True)]
        return [
            RankRow(history=row.history, reason=reason, candidates=self._items(row))
            for row, reason in zip(rows, reasons, strict=True)
        ]

    def _items(self, row: UserRow) -> tuple[Item, ...]:
        known = self.items[row.history.domain]
        return tuple(known[item] for item in row.candidates or ())

    def _best(self, user: UserRow, row: RankRow, logits: np.ndarray) -> dict[str, Any]:
        """The row's line in `recommendations`. Ties keep the candidates' order."""
        exponentials = np.exp(logits.astype(np.float64) - logits.max())
        probabilities = exponentials / exponentials.sum()
        places = np.argsort(-logits, kind="stable")[: self.config.top_n]
        return {
            "row_id": user.row_id,
            "domain": user.history.domain,
            "user_id": user.history.user_id,
            "items": [row.candidates[place].item_id for place in places],
            "titles": [row.candidates[place].title for place in places],
            "probabilities": probabilities[places].tolist(),
            "reason": row.reason,
            "model_version": self.version,
        }

    def _keep_profiles(self, users: Sequence[UserRow], ranked: Sequence[RankRow]) -> None:
        """Puts the users' histories into the profile store, with the reasons that they were ranked with.

        A reason that the store holds already stays as it is there, with its agreement and its tree.
        """
        from pulse_ray.serving.filling import opened
        from pulse_ray.serving.store import BATCH, Profile, StoredReason

        with opened(self.stage.config) as store:
            profiles = []
            for user, row in zip(users, ranked, strict=True):
                domain, name = user.history.domain, user.history.user_id
                known = store.get(domain, name)
                reason, tree = (known.reason, known.tree) if known else (None, ())
                if row.reason is not None and (reason is None or reason.text != row.reason):
                    selector = self.variant if user.reason is None else "given"
                    reason, tree = (
                        StoredReason(
                            text=row.reason, agreement=None, selector=selector, node_id="", version=self.version
                        ),
                        (),
                    )
                profiles.append(Profile(domain=domain, user_id=name, history=user.steps, reason=reason, tree=tree))
            store.put(profiles, BATCH)

    # What follows is loaded when the first row asks for it: an input that brings candidates and reasons needs neither.

    @cached_property
    def _retrieval(self) -> Retrieval:
        from pulse_ray.candidates.retrieval import Retrieval

        with tempfile.TemporaryDirectory() as local:
            return Retrieval(self.stage.input("sasrec").download(Path(local)))

    @cached_property
    def _reasons(self) -> Reasons:
        return Reasons(self.stage.input("reasons"), self.variant)


def _scores(user: UserRow, logits: np.ndarray) -> dict[str, Any]:
    """The row's line in `user_scores`."""
    return {
        "row_id": user.row_id,
        "domain": user.history.domain,
        "user_id": user.history.user_id,
        "items": list(user.candidates or ()),
        "logits": logits.tolist(),
    }
