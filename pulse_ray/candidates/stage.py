"""The `candidates` stage: trains SASRec, exports its vectors, then draws candidate sets and finds similar users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pulse_ray.candidates.exports import ExportWorker, IndexWorker, Users, exports, load_model, unindexed
from pulse_ray.candidates.rows import Row, read_rows
from pulse_ray.candidates.sasrec import SasrecTask
from pulse_ray.candidates.sets import CandidateSets, Touched
from pulse_ray.errors import DataError
from pulse_ray.runtime import ShardOutput, map_parts, run_shards
from pulse_ray.schema import Reject, table
from pulse_ray.seeding import derive
from pulse_ray.training import fitting
from pulse_ray.workspace import Part, StageRun


def run(stage: StageRun) -> dict[str, dict[str, Any]]:
    """Reads interactions, items and examples; writes sasrec, and what comes of it: vectors, neighbours, candidates."""
    config = stage.config.candidates
    record = fitting.fit(
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
        log_interval_s=stage.config.cluster.log_interval_s,
    )
    for todo, worker, title in ((exports, ExportWorker, "vectors"), (unindexed, IndexWorker, "indices of users")):
        for _ in map_parts(stage, todo(stage), worker, stage, pool=config.pool, title=f"candidates: {title}"):
            pass
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
    return {"sasrec": fitting.best_metrics(record)}


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
        self.model = load_model(stage)
        self.sets = CandidateSets(stage, self.model)
        self.touched = Touched(stage)
        self.users = Users(stage)

    def __call__(self, part: Part) -> ShardOutput:
        rows = read_rows(self.stage.input("examples").read(part))
        states = self.model.states([self.model.indices(row.domain, row.items) for row in rows])
        drawn = self.sets.draw(rows, states, self.touched.of(part, rows))
        similar = self._similar(rows, states)
        detail = f"fewer than {self.stage.config.candidates.size - 1} items that the user never touched"
        return ShardOutput(
            tables={
                "candidates": table("candidates", [entry for entry in drawn if entry is not None]),
                "neighbours": table(
                    "neighbours",
                    [
                        {"example_id": row.example_id, "user_ids": users, "items": items}
                        for row, entry, (users, items) in zip(rows, drawn, similar, strict=True)
                        if entry is not None
                    ],
                ),
            },
            examples=len(rows),
            rejects=[
                Reject(key=row.example_id, reason="too few items", detail=detail)
                for row, entry in zip(rows, drawn, strict=True)
                if entry is None
            ],
        )

    def _similar(self, rows: Sequence[Row], states: NDArray[np.float32]) -> list[tuple[list[str], list[str]]]:
        """Similar users and their training items for each row."""
        found: list[tuple[list[str], list[str]]] = [([], [])] * len(rows)
        for domain, index in self.users.domains.items():
            mine = [place for place, row in enumerate(rows) if row.domain == domain]
            users = [rows[place].user_id for place in mine]
            nearest = index.nearest(states[mine], users, self.stage.config.candidates.similar_users) if mine else []
            for place, near in zip(mine, nearest, strict=True):
                found[place] = ([index.user_id(row) for row in near], index.items_of(near))
        return found
