"""A finished run to serve: the synthetic shop's items and histories, a real language model, an adapter that learned
nothing. What is ranked does not matter here, only what it costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.config import Config, SasrecConfig, SyntheticSource
from pulse_ray.data.synthetic import Shop
from pulse_ray.ranker import model
from pulse_ray.schema import Interaction, table
from pulse_ray.serving.filling import opened
from pulse_ray.serving.store import Profile, StoredReason
from pulse_ray.workspace import StageRun, StageSpec, Workspace
from tests.histories import item_rows

SOURCE = SyntheticSource(kind="synthetic", users=64, items=320, min_purchases=12, max_purchases=16)
DOMAIN = "shop"
REASON = (
    "The customer returns to products without perfume for sensitive skin, complains where a scent was too strong, and "
    "has lately bought larger packs of what proved mild; a gentle product for daily use in a refill pack fits next."
)


def make(config: Config, seed: int) -> None:
    """Writes what serving reads of a run: items, SASRec, the ranker's adapter and the profile store."""
    shop = Shop(SOURCE, seed)
    _finish(config, "prepare", {"items": item_rows(shop)})
    _finish(config, "candidates", {"sasrec": []})
    _finish(config, "ranker", {"ranker": []})
    workspace = Workspace(config.storage, config.name)
    torch.manual_seed(seed)
    vocabulary = [(DOMAIN, row["item_id"]) for row in shop.items().to_pylist()]
    Sasrec(SasrecConfig(dim=16, layers=1), vocabulary, 50).save(Path(workspace.artefact("sasrec").path))
    made = model.create(config.ranker)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:  # It begins with zeros, and an adapter of zeros could be left out unnoticed.
            torch.nn.init.normal_(parameter, std=0.02)
    folder = Path(workspace.artefact("ranker").path) / config.ranker.served(None)
    folder.mkdir(parents=True)
    model.save(made, folder, config.ranker)
    with opened(config) as store:
        store.put(_profiles(shop), "benchmark")
        store.set_mark("benchmark")


def requests(candidates: int, seed: int) -> list[dict[str, Any]]:
    """One request for each user: items to rank that the history does not hold."""
    shop, random = Shop(SOURCE, seed), np.random.default_rng(seed)
    items = shop.items().column("item_id").to_pylist()
    found = []
    for profile in _profiles(shop):
        seen = {step.item_id for step in profile.history}
        free = [item for item in items if item not in seen]
        chosen = random.choice(len(free), size=candidates, replace=False)
        found.append({"user_id": profile.user_id, "candidates": [free[place] for place in chosen]})
    return found


def _finish(config: Config, name: str, outputs: dict[str, list[dict[str, Any]]]) -> None:
    spec = StageSpec(name=name, settings=("seed",), inputs=(), outputs=tuple(outputs), summary="")
    workspace = Workspace(config.storage, config.name)
    stage = StageRun(workspace=workspace, config=config, spec=spec, fingerprint=f"{name:0<16}")
    stage.begin()
    for output, rows in outputs.items():
        if rows:
            stage.output(output).write("part-0000", table(output, rows))
    stage.complete(0.0)


def _profiles(shop: Shop) -> list[Profile]:
    reason = StoredReason(text=REASON, agreement=0.5, selector="thought_space", node_id="1", version="benchmark")
    histories: dict[str, list[Interaction]] = {}
    for row in shop.interactions().to_pylist():
        step = Interaction(**{name: row[name] for name in ("item_id", "timestamp", "rating", "review")})
        histories.setdefault(row["user_id"], []).append(step)
    return [
        Profile(domain=DOMAIN, user_id=user, history=tuple(steps), reason=reason) for user, steps in histories.items()
    ]
