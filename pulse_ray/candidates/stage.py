"""The `candidates` stage: trains SASRec, then draws candidate sets and finds similar users, part by part."""

from __future__ import annotations

import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np

from pulse_ray import training
from pulse_ray.candidates.neighbours import NeighbourIndex
from pulse_ray.candidates.sampling import draw_negatives, place_target
from pulse_ray.candidates.sasrec import Key, Sasrec, SasrecTask, sequences
from pulse_ray.errors import DataError
from pulse_ray.runtime import ShardOutput, run_shards
from pulse_ray.schema import Example, Reject, examples, table
from pulse_ray.seeding import derive
from pulse_ray.workspace import Part, StageRun


def run(stage: StageRun) -> dict[str, dict[str, Any]]:
    """Reads interactions, items and examples; writes sasrec, neighbours and candidates."""
    config = stage.config.candidates
    record = training.fit(
        SasrecTask,
        config.sasrec,
        stage.input("items"),
        stage.input("examples"),
        stage.config.prepare.max_sequence,
        config=config.sasrec.training,
        seed=derive(stage.config.seed, "sasrec"),
        output=stage.output("sasrec"),
        folder="",
        title="candidates: SASRec",
    )
    run_shards(
        stage,
        stage.input("examples").parts(),
        CandidateWorker,
        stage,
        pool=config.pool,
        outputs=("neighbours", "candidates"),
        title="candidates: sets and neighbours",
    )
    _check_rejects(stage)
    return {"sasrec": training.best_metrics(record)}


def _check_rejects(stage: StageRun) -> None:
    rejected = sum(stage.rejected().values())
    examples_artefact = stage.input("examples")
    total = sum(examples_artefact.num_rows(part) for part in examples_artefact.parts())
    if rejected > stage.config.candidates.max_reject_fraction * total:
        raise DataError(
            f"{rejected} of {total} examples have fewer than {stage.config.candidates.size - 1} items that the user "
            "never touched",
            remedy="Lower candidates.size, or raise candidates.max_reject_fraction",
        )


class CandidateWorker:
    """Draws candidates and finds neighbours for the examples of a part."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.config = stage.config.candidates
        with tempfile.TemporaryDirectory() as local:
            self.model = Sasrec.load(stage.output("sasrec").download(Path(local)))
        places: dict[str, list[int]] = defaultdict(list)
        for (domain, _), index in self.model.index.items():
            places[domain].append(index)
        self.domains = {domain: np.array(indices) for domain, indices in places.items()}
        """Indices of a domain's items, ascending."""
        self.popularity = np.zeros(1 + len(self.model.vocabulary))
        for data in stage.input("items").tables(columns=["domain", "item_id", "popularity"]):
            for domain, item, count in zip(*(column.to_pylist() for column in data.columns), strict=True):
                self.popularity[self.model.index[(domain, item)]] = count
        self.neighbours = self._index_users()

    def __call__(self, part: Part) -> ShardOutput:
        rows = list(examples(self.stage.input("examples").read(part)))
        touched = self._touched(part)
        histories = [[step.item_id for step in row.history.interactions] for row in rows]
        states = self.model.states(
            [self.model.indices(row.history.domain, steps) for row, steps in zip(rows, histories, strict=True)]
        )
        candidates, neighbours, rejects = [], [], []
        similar = self._similar(rows, states)
        for row, state, (users, items) in zip(rows, states, similar, strict=True):
            example_id = row.history.example_id
            drawn = self._draw(row, state, touched[(row.history.domain, row.history.user_id)])
            if drawn is None:
                detail = f"fewer than {self.config.size - 1} items that the user never touched"
                rejects.append(Reject(key=example_id, reason="too few items", detail=detail))
                continue
            candidates.append({"example_id": example_id, "sampler": self.config.sampler, **drawn})
            neighbours.append({"example_id": example_id, "user_ids": users, "items": items})
        return ShardOutput(
            tables={"candidates": table("candidates", candidates), "neighbours": table("neighbours", neighbours)},
            examples=len(rows),
            rejects=rejects,
        )

    def _touched(self, part: Part) -> dict[Key, set[str]]:
        """All items of the users of a part, those after the examples' targets included."""
        found: dict[Key, set[str]] = defaultdict(set)
        # A user's interactions lie in the partition that its examples were cut from.
        partition = f"part-{part.split('-')[1]}"
        data = self.stage.input("interactions").read(partition, ["domain", "user_id", "item_id"])
        for domain, user, item in zip(*(column.to_pylist() for column in data.columns), strict=True):
            found[(domain, user)].add(item)
        return found

    def _draw(self, row: Example, state: np.ndarray, touched: set[str]) -> dict[str, Any] | None:
        domain = row.history.domain
        own = self.domains[domain]
        scores = self.model.logits(state[None])[0]
        target = self.model.index[(domain, row.target_item)]
        rng = np.random.default_rng(derive(self.stage.config.seed, "candidates", row.history.example_id))
        negatives = draw_negatives(
            rng,
            self.config.size - 1,
            len(own),
            set(np.searchsorted(own, self.model.indices(domain, touched | {row.target_item})).tolist()),
            weights=self.popularity[own] if self.config.sampler == "popularity" else None,
            scores=scores[own] if self.config.sampler == "sasrec" else None,
        )
        if negatives is None:
            return None
        chosen, target_index = place_target(rng, target, own[negatives])
        return {
            "items": [self.model.vocabulary[index - 1][1] for index in chosen],
            "target_index": target_index,
            "sasrec_logits": scores[chosen].tolist(),
        }

    def _index_users(self) -> dict[str, NeighbourIndex]:
        """The users' states after their training sequences, by domain."""
        grouped: dict[str, list[tuple[str, list[str]]]] = defaultdict(list)
        for (domain, user), steps in sequences(self.stage.input("examples"), "train", with_target=True).items():
            grouped[domain].append((user, steps))
        return {
            domain: NeighbourIndex(
                [user for user, _ in users],
                self.model.states([self.model.indices(domain, steps) for _, steps in users]),
                [steps for _, steps in users],
            )
            for domain, users in grouped.items()
        }

    def _similar(self, rows: list[Example], states: np.ndarray) -> list[tuple[list[str], list[str]]]:
        """Similar users and their training items for each row."""
        found: list[tuple[list[str], list[str]]] = [([], [])] * len(rows)
        for domain, index in self.neighbours.items():
            mine = [place for place, row in enumerate(rows) if row.history.domain == domain]
            users = [rows[place].history.user_id for place in mine]
            nearest = index.nearest(states[mine], users, self.config.similar_users) if mine else []
            for place, near in zip(mine, nearest, strict=True):
                found[place] = ([index.user_ids[row] for row in near], index.items_of(near))
        return found
