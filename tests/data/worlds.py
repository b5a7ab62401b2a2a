"""Worlds to prepare: files in the format of the sources, and the stage `prepare` bound to a folder."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from pulse_ray.config import Config
from pulse_ray.data import files
from pulse_ray.workspace import StageRun, StageSpec, Workspace

SPEC = StageSpec(
    name="prepare",
    summary="",
    settings=("seed", "prepare"),
    inputs=(),
    outputs=("interactions", "items", "examples"),
)


@dataclass(frozen=True)
class Prepared:
    """A finished stage."""

    stage: StageRun
    metrics: dict[str, Any]

    def rows(self, name: str) -> list[dict[str, Any]]:
        tables = list(self.stage.output(name).tables())
        return pa.concat_tables(tables).to_pylist() if tables else []

    def sequences(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for row in self.rows("interactions"):
            found.setdefault(row["user_id"], []).append(row["item_id"])
        return found

    def step(self, name: str, domain: str | None = None) -> tuple[int, int, int]:
        steps = self.metrics["interactions"]["steps"]
        [one] = [s for s in steps if s["step"] == name and domain in (None, s["domain"])]
        return one["rows"], one["users"], one["items"]


Prepare = Callable[..., Prepared]


def bind(storage: Path, settings: dict[str, Any]) -> StageRun:
    """The stage with these settings of its section, in a workspace below `storage`."""
    config = Config.model_validate({"name": "run", "storage": str(storage), "prepare": settings})
    fingerprint = config.fingerprint(SPEC.settings, [files.identity(domain) for domain in config.prepare.domains])
    return StageRun(workspace=Workspace(str(storage), "run"), config=config, spec=SPEC, fingerprint=fingerprint)


def review(user: str, item: str, time: int, **fields: Any) -> dict[str, Any]:
    """A line of a review file."""
    return {"reviewerID": user, "asin": item, "unixReviewTime": time, "overall": 5.0, "reviewText": "Fine.", **fields}


def write_lines(path: Path, rows: Iterable[Any]) -> Path:
    """JSON lines, gzip if the name says so; a row that is a text stays as it is."""
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def amazon(reviews: Path, metadata: Path | None = None, name: str = "shop") -> dict[str, Any]:
    """The settings of a domain that reads these files."""
    source = {"kind": "amazon2018", "interactions": str(reviews), "items": [str(metadata)] if metadata else []}
    return {"name": name, "source": source}


SYNTHETIC = {"name": "shop", "source": {"kind": "synthetic", "users": 60, "items": 60}}
