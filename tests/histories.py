"""A run in which all that the stage `tree` reads is complete, without the stages that would make it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pulse_ray.config import Config, SyntheticSource
from pulse_ray.data.synthetic import Shop
from pulse_ray.pipeline import plan
from pulse_ray.schema import example_id, table
from pulse_ray.workspace import Part, StageRun

PURCHASES = 14
"""Of each user. With reviews of 24 words they fill a history of 320 tokens."""

Rows = list[dict[str, Any]]


def configure(folder: Path, users: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run below `folder` over the synthetic shop."""
    source = {"kind": "synthetic", "users": users, "items": 320, "min_purchases": PURCHASES, "max_purchases": PURCHASES}
    prepare = {"domains": [{"name": "shop", "source": source}]}
    return {"name": "run", "storage": str(folder), "prepare": prepare, **settings}


def tree_run(config: Config, part_users: int) -> StageRun:
    """The stage `tree`, ready to run over one test example of each user; nobody has similar users.

    Args:
        part_users: examples in a part.
    """
    source = config.prepare.domains[0].source
    assert isinstance(source, SyntheticSource)
    shop = Shop(source, config.seed)
    examples = list(_examples(shop))
    cut = {
        f"test-{start:06}-0000": examples[start : start + part_users] for start in range(0, len(examples), part_users)
    }
    near = {
        part: [{"example_id": row["example_id"], "user_ids": [], "items": []} for row in rows]
        for part, rows in cut.items()
    }
    runs = plan(config)
    runs["tree"].workspace.claim()
    _finish(runs["prepare"], {"items": {"all": item_rows(shop)}, "examples": cut})
    _finish(runs["candidates"], {"neighbours": near})
    return runs["tree"]


def _finish(run: StageRun, tables: Mapping[str, Mapping[Part, Sequence[dict[str, Any]]]]) -> None:
    run.begin()
    for name, parts in tables.items():
        for part, rows in parts.items():
            run.output(name).write(part, table(name, rows))
    run.complete(0.0)


def item_rows(shop: Shop) -> Rows:
    """The shop's items as rows of the table `items`."""
    rows = []
    for raw in shop.items().to_pylist():
        text = f"{raw['title']} ({raw['brand']}), {' › '.join(raw['categories'])}"
        kept = {name: raw[name] for name in ("item_id", "title", "description", "brand", "categories")}
        rows.append({**kept, "domain": "shop", "text": text, "popularity": 1})
    return rows


def _examples(shop: Shop) -> Iterator[dict[str, Any]]:
    histories: dict[str, Rows] = {}
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
