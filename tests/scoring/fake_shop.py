"""A finished run, made by hand: what `pulse-ray score` reads, and a ranker without weights. By default, two domains."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pulse_ray import pipeline
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.catalogue import Catalogue
from pulse_ray.config import Config, RankerConfig
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.schema import table

ITEMS = 30
"""Items of each domain: shop's are s0 to s29, pantry's p0 to p29."""


class NoiseScorer:
    """A logit of history and title alone, one higher for an item that the reason names."""

    def __init__(self, folder: Path, config: RankerConfig, items: Catalogue) -> None:
        assert json.loads((folder / "training.json").read_text()) == {"variant": folder.name}

    def score(self, rows: Sequence[RankRow], token_budget: int) -> list[np.ndarray]:
        assert token_budget > 0
        return [np.array([self._logit(row, item.title) for item in row.candidates], np.float32) for row in rows]

    def _logit(self, row: RankRow, title: str) -> float:
        newest = row.history.interactions[-1].item_id
        noise = zlib.crc32(f"{newest}/{title}".encode()) / 2**32
        return noise + (1.0 if row.reason is not None and title in row.reason else 0.0)


def config(storage: Path, **score: Any) -> Config:
    domains = [{"name": name, "source": {"kind": "synthetic"}} for name in ("shop", "pantry")]
    return Config.model_validate(
        {
            "name": "run",
            "storage": str(storage),
            "prepare": {"domains": domains, "max_sequence": 4},
            "ranker": {"variants": ["none", "thought_space"]},
            "score": {"retrieve_k": 8, "top_n": 3, "shard_users": 5, "max_reject_fraction": 0.5, **score},
        }
    )


CATALOGUE = [
    (domain, f"{domain[0]}{number}", f"Item {domain[0]}{number}")
    for domain in ("shop", "pantry")
    for number in range(ITEMS)
]
"""Domain, id and title of every item."""

REASONS = (
    ("shop/ann/3", "thought_space", "an older one"),
    ("shop/ann/12", "thought_space", "They want Item s7."),
    ("shop/ann/12", "base", "not the one"),
    ("shop/b/ob/2", "thought_space", "They want Item s9."),
)
"""Example, selector and text."""


def make_nameplate(folder: Path, settings: RankerConfig) -> None:
    """What `NoiseScorer` takes for an adapter."""
    folder.mkdir(parents=True)
    (folder / "training.json").write_text(json.dumps({"variant": folder.name}))


def make(
    settings: Config,
    catalogue: Sequence[tuple[str, str, str]] = CATALOGUE,
    reasons: Sequence[tuple[str, str, str]] = REASONS,
    make_adapter: Callable[[Path, RankerConfig], object] = make_nameplate,
) -> Config:
    """Writes items, SASRec, reasons and rankers, all marked as complete.

    Args:
        catalogue: as `CATALOGUE`.
        reasons: as `REASONS`.
        make_adapter: writes a variant's adapter into a folder.
    """
    runs = pipeline.plan(settings)
    for run in runs.values():
        run.begin()
    items = [
        {
            "domain": domain,
            "item_id": item_id,
            "title": title,
            "description": "",
            "brand": "",
            "categories": [],
            "text": title,
            "popularity": number,
        }
        for number, (domain, item_id, title) in enumerate(catalogue)
    ]
    runs["prepare"].output("items").write("all", table("items", items))
    for number, (example, selector, text) in enumerate(reasons):
        row = {"example_id": example, "selector": selector, "node_id": "1", "text": text, "agreement": None}
        runs["select"].output("reasons").write(f"test-{number:04d}-0000", table("reasons", [row]))
    for variant in settings.ranker.variants:
        make_adapter(Path(runs["ranker"].output("ranker").path) / variant, settings.ranker)
    torch.manual_seed(0)
    vocabulary = [(domain, item_id) for domain, item_id, _ in catalogue]
    sasrec = Sasrec(settings.candidates.sasrec, vocabulary, settings.prepare.max_sequence)
    sasrec.save(Path(runs["candidates"].output("sasrec").path))
    for run in runs.values():
        run.complete(1.0)
    return settings


def user(user_id: str | None, history: Any = ("s1", "s2"), domain: str | None = "shop", **more: Any) -> dict[str, Any]:
    """A row of the input."""
    return {"user_id": user_id, "domain": domain, "history": None if history is None else list(history), **more}
