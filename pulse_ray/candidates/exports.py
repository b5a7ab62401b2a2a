"""What SASRec leaves for others, part by part: item vectors, users' states, and from these an index of each domain."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pulse_ray.candidates.neighbours import UserIndex, newest, write_index
from pulse_ray.candidates.rows import newest_rows
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.candidates.sets import partition_of
from pulse_ray.schema import TABLES
from pulse_ray.workspace import Part, StageRun


def load_model(stage: StageRun) -> Sasrec:
    """The trained SASRec."""
    with tempfile.TemporaryDirectory() as local:
        return Sasrec.load(stage.output("sasrec").download(Path(local)))


def exports(stage: StageRun) -> list[str]:
    """What `ExportWorker` still has to make, as `artefact/part`."""
    wanted = {
        "item_vectors": stage.input("items").parts(),
        "user_states": sorted({partition_of(part) for part in stage.input("examples").parts("train")}),
    }
    return [f"{name}/{part}" for name, parts in wanted.items() for part in stage.todo(parts, (name,))]


class ExportWorker:
    """Writes parts of `item_vectors`, cut as `items` is, and of `user_states`, cut as `interactions` is."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.model = load_model(stage)

    def __call__(self, name: str) -> None:
        artefact, part = name.split("/")
        made = self._item_vectors(part) if artefact == "item_vectors" else self._user_states(part)
        self.stage.output(artefact).write(part, made)

    def _item_vectors(self, part: Part) -> pa.Table:
        data = self.stage.input("items").read(part, ["domain", "item_id"])
        domains, items = (column.to_pylist() for column in data.columns)
        indices = [self.model.index[key] for key in zip(domains, items, strict=True)]
        vectors = self.model.items.weight.detach().float().cpu().numpy()[indices]
        return pa.Table.from_arrays([*data.columns, _lists(vectors)], schema=TABLES["item_vectors"])

    def _user_states(self, partition: Part) -> pa.Table:
        examples = self.stage.input("examples")
        parts = [part for part in examples.parts("train") if partition_of(part) == partition]
        users = list(newest_rows(examples.read(part) for part in parts).values())
        sequences = [[*row.items, row.target] for row in users]
        states = self.model.states(
            [self.model.indices(row.domain, steps) for row, steps in zip(users, sequences, strict=True)]
        )
        columns = [
            pa.array([row.example_id for row in users], pa.string()),
            pa.array([row.domain for row in users], pa.string()),
            pa.array([row.user_id for row in users], pa.string()),
            _lists(states),
            pa.array([newest(reversed(steps)) for steps in sequences], pa.list_(pa.string())),
        ]
        return pa.Table.from_arrays(columns, schema=TABLES["user_states"])


class IndexWorker:
    """Builds the index of a domain's users. A small file, written last, says that it is whole."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage

    def __call__(self, domain: str) -> int:
        config = self.stage.config
        with tempfile.TemporaryDirectory() as local:
            users = write_index(
                Path(local),
                domain,
                lambda: self._users(domain),
                flat_limit=config.candidates.neighbours_flat_limit,
                seed=config.seed,
            )
            self.stage.output("user_index").upload(Path(local))
        self.stage.output("user_index").write_bytes(_mark(domain), json.dumps({"users": users}).encode())
        return users

    def _users(self, domain: str) -> Iterator[pa.Table]:
        for data in self.stage.output("user_states").tables(columns=["domain", "user_id", "state", "items"]):
            own = data.filter(pc.equal(data.column("domain"), domain))
            if own.num_rows:
                yield own


def unindexed(stage: StageRun) -> list[str]:
    """Domains whose users have no index yet."""
    there = stage.output("user_index").files()
    return [domain.name for domain in stage.config.prepare.domains if _mark(domain.name) not in there]


class Users:
    """The indices of all domains that have users."""

    def __init__(self, stage: StageRun) -> None:
        artefact = stage.output("user_index")
        # Where the storage is remote, its files stay here as long as they are mapped.
        self._local = tempfile.TemporaryDirectory()
        folder = artefact.download(Path(self._local.name))
        self.domains = {
            domain.name: UserIndex(folder, domain.name, probes=stage.config.candidates.neighbours_nprobe)
            for domain in stage.config.prepare.domains
            if (folder / f"{domain.name}.faiss").exists()
        }


def _lists(matrix: NDArray[np.float32]) -> pa.ListArray:
    """The rows of a matrix; as Python's lists of numbers they would take eight times the memory."""
    assert matrix.size < 2**31, f"a shard of {len(matrix)} vectors is too large for 32-bit offsets"
    offsets = np.arange(len(matrix) + 1, dtype=np.int32) * matrix.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(matrix.reshape(-1), pa.float32()))


def _mark(domain: str) -> str:
    return f"{domain}.users.json"
