"""A `tree` stage over the synthetic shop's users, without the stages before it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks._shop import item_rows
from pulse_ray.config import Config, SyntheticSource
from pulse_ray.data.synthetic import Shop
from pulse_ray.pipeline import plan
from pulse_ray.schema import example_id, table
from pulse_ray.workspace import StageRun

PURCHASES = 14
"""Of each user. With reviews of 24 words they fill a history of 320 tokens."""


def tree_stage(folder: Path, users: int, part_users: int, settings: dict[str, Any]) -> StageRun:
    """The stage `tree`, ready to run, over one test example of each user; nobody has similar users."""
    source = {"kind": "synthetic", "users": users, "items": 320, "min_purchases": PURCHASES, "max_purchases": PURCHASES}
    prepare = {"domains": [{"name": "shop", "source": source}]}
    config = Config.model_validate({"name": "run", "storage": str(folder), "prepare": prepare, **settings})
    run = plan(config)["tree"]
    run.workspace.claim()
    shop = Shop(SyntheticSource.model_validate(source), config.seed)
    run.workspace.artefact("items").write("all", table("items", item_rows(shop)))
    examples = list(_examples(shop))
    for start in range(0, len(examples), part_users):
        part, rows = f"test-{start:06}-0000", examples[start : start + part_users]
        run.workspace.artefact("examples").write(part, table("examples", rows))
        near = [{"example_id": row["example_id"], "user_ids": [], "items": []} for row in rows]
        run.workspace.artefact("neighbours").write(part, table("neighbours", near))
    return run


def _examples(shop: Shop) -> Iterator[dict[str, Any]]:
    histories: dict[str, list[dict[str, Any]]] = {}
    for row in shop.interactions().to_pylist():
        step = {name: row[name] for name in ("item_id", "timestamp", "rating", "review")}
        histories.setdefault(row["user_id"], []).append(step)
    for user, steps in sorted(histories.items()):
        *history, target = sorted(steps, key=lambda step: step["timestamp"])
        yield {
            "example_id": example_id("shop", user, len(history)),
            "domain": "shop",
            "user_id": user,
            "split": "test",
            "history": history,
            "target_item": target["item_id"],
        }
