"""Tables that models learn from: customers of the synthetic shop, with a reason and candidates for each."""

from __future__ import annotations

from typing import Any

import numpy as np
from histories import item_rows

from pulse_ray.config import SyntheticSource
from pulse_ray.data.synthetic import Shop
from pulse_ray.schema import example_id, table
from pulse_ray.workspace import Artefact, Workspace

REASON = "They like it mild."
CANDIDATES = 5


def write(workspace: Workspace, users: int) -> dict[str, Artefact]:
    """Writes items, and of each user's last purchase the example, its rationale, candidates and reason.

    The last two users are in validation. A rationale names the items that were bought, so that it can be told whose it
    is.
    """
    shop = Shop(SyntheticSource(kind="synthetic", users=users, items=40), 1)
    rows = item_rows(shop)
    titles = {row["item_id"]: row["title"] for row in rows}
    histories: dict[str, list[dict[str, Any]]] = {}
    for row in shop.interactions().to_pylist():
        step = {name: row[name] for name in ("item_id", "timestamp", "rating", "review")}
        histories.setdefault(row["user_id"], []).append(step)
    draws = np.random.default_rng(0)
    tables = {name: workspace.artefact(name) for name in ("items", "examples", "rationales", "candidates", "reasons")}
    tables["items"].write("part-0000", table("items", rows))
    for split, chosen in (("train", list(histories)[:-2]), ("validation", list(histories)[-2:])):
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in tables if name != "items"}
        for user in chosen:
            *history, target = histories[user]
            name = {"example_id": example_id("shop", user, len(history))}
            known = {"domain": "shop", "user_id": user, "split": split, "history": history}
            found["examples"].append({**name, **known, "target_item": target["item_id"]})
            text = " and ".join(titles[step["item_id"]] for step in history)
            drawn = {"model": "", "prompt_sha": "", "seed": 0, "finish_reason": "stop", "num_tokens": 0}
            found["rationales"].append({**name, "text": f"They bought {text}.", **drawn})
            bought = {step["item_id"] for step in histories[user]}
            others = draws.permutation([row["item_id"] for row in rows if row["item_id"] not in bought])
            place = int(draws.integers(CANDIDATES))
            items = np.insert(others[: CANDIDATES - 1], place, target["item_id"]).tolist()
            sampled = {"sampler": "uniform", "sasrec_logits": [0.0] * CANDIDATES, "sasrec_catalogue_rank": None}
            found["candidates"].append({**name, "items": items, "target_index": place, **sampled})
            found["reasons"].append({**name, "selector": "base", "node_id": "", "text": REASON, "agreement": None})
        for name, written in found.items():
            tables[name].write(f"{split}-0000-0000", table(name, written))
    return tables
