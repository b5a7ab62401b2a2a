"""Whether every example that went into a finished run is in each table, once, or among the rejects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow as pa

from pulse_ray.schema import SPLITS
from pulse_ray.workspace import Workspace

KEYS = {
    "candidates": ("example_id",),
    "neighbours": ("example_id",),
    "rationales": ("example_id",),
    "thoughts": ("example_id", "node_id"),
    "reasons": ("example_id", "selector"),
    "scores": ("example_id", "variant"),
}
"""What names a row of each table."""

MADE_BY = {
    "candidates": ("candidates", SPLITS),
    "neighbours": ("candidates", SPLITS),
    "rationales": ("rationales", ("train",)),
    "thoughts": ("tree", SPLITS),
    "scores": ("evaluate", ("test",)),
}
"""The stage that makes a table of examples, and the splits that it takes. Reasons are made of thoughts."""


def rows(workspace: Workspace, table: str) -> list[dict[str, Any]]:
    """All rows of a table."""
    return pa.concat_tables(list(workspace.artefact(table).tables())).to_pylist()


def check(workspace: Workspace) -> None:
    """Rows in are rows out and rejects, in every table, and no row is there twice."""
    tables = {name: rows(workspace, name) for name in KEYS}
    for name, key in KEYS.items():
        counts = Counter(tuple(row[column] for column in key) for row in tables[name])
        assert max(counts.values()) == 1, f"{name} holds a row twice"
    kept = {name: {row["example_id"] for row in found} for name, found in tables.items()}
    examples = {row["example_id"]: row["split"] for row in rows(workspace, "examples")}
    for name, (stage, splits) in MADE_BY.items():
        rejected = [row["key"] for data in workspace.rejects(stage).tables() for row in data.to_pylist()]
        assert len(rejected) == len(set(rejected)), name
        assert kept[name] | set(rejected) == {key for key, split in examples.items() if split in splits}, name
        assert not kept[name] & set(rejected), name
    assert kept["reasons"] == kept["thoughts"]
