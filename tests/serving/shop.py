"""A finished run of a small shop, as far as serving reads it: tables by hand, models tiny and untrained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.config import Config, RankerConfig, SasrecConfig
from pulse_ray.ranker import model
from pulse_ray.schema import table
from pulse_ray.workspace import StageRun, StageSpec, Workspace
from tests import tiny

USERS, ITEMS, PARTITIONS = 12, 30, 2
KINDS = ("Hand Cream", "Shampoo", "Gym Towel", "Soap", "Balm", "Pet Brush")
THOUGHTS = {"": "The customer buys care often.", "1": None, "2": "The customer looks for gifts."}
"""The nodes of every tree; None stands for the user's own `reason`."""
AGREEMENT = {"1": 0.5, "2": -0.25}
"""What a beam compared nodes by; it left the second behind."""
WITHOUT_REASON = 3
"""A user whose tree was rejected."""


def config(storage: Path, **sections: Any) -> Config:
    """Settings of the run; sections replace the defaults."""
    return Config.model_validate(
        {
            "name": "tiny-shop",
            "storage": str(storage),
            "prepare": {"domains": [{"name": "shop", "source": {"kind": "synthetic"}}]},
            "ranker": {
                "model": str(storage / "tiny"),
                "variants": ["thought_space"],
                "training": {"precision": "fp32"},
            },
            **sections,
        }
    )


def make(settings: Config) -> None:
    """Writes the tables that the profile store is filled from, and the items."""
    _finish(settings, "prepare", {"interactions": _interactions(), "items": {"part-0000": _items()}})
    _finish(settings, "tree", {"thoughts": _by_part(_thoughts)})
    _finish(settings, "select", {"reasons": _by_part(_reasons)})


def add_models(settings: Config) -> None:
    """Adds SASRec, the ranker's adapter, and the base model that it adapts."""
    folder = Path(settings.ranker.model)
    tiny.make(folder)
    workspace = Workspace(settings.storage, settings.name)
    torch.manual_seed(0)
    sasrec = Path(workspace.artefact("sasrec").path)
    ranker = Path(workspace.artefact("ranker").path)
    _finish(settings, "candidates", {"sasrec": {}})
    _finish(settings, "ranker", {"ranker": {}})
    vocabulary = [("shop", item["item_id"]) for item in _items()]
    Sasrec(SasrecConfig(dim=16, layers=1), vocabulary, 50).save(sasrec)
    make_adapter(ranker / settings.ranker.served(None), settings.ranker, seed=0)


def make_adapter(folder: Path, settings: RankerConfig, *, seed: int) -> Path:
    """Saves an adapter whose logits are not all alike."""
    torch.manual_seed(seed)
    made = model.create(settings)
    for name, parameter in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    folder.mkdir(parents=True)
    model.save(made, folder, settings)
    return folder


def user(number: int) -> str:
    return f"U{number:03d}"


def reason(number: int) -> str:
    return f"The customer looks for {KINDS[number % len(KINDS)].lower()} without perfume."


def history(number: int) -> list[str]:
    """Items of a user, oldest first."""
    return [f"i{(number * 5 + step * 3) % ITEMS}" for step in range(5)]


def _finish(settings: Config, name: str, outputs: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    spec = StageSpec(name=name, settings=("seed",), inputs=(), outputs=tuple(outputs), summary="")
    workspace = Workspace(settings.storage, settings.name)
    stage = StageRun(workspace=workspace, config=settings, spec=spec, fingerprint=f"{name:0<16}")
    stage.begin()
    for output, parts in outputs.items():
        for part, rows in parts.items():
            stage.output(output).write(part, table(output, rows))
    stage.complete(1.0)


def _items() -> list[dict[str, Any]]:
    return [
        {
            "domain": "shop",
            "item_id": f"i{number}",
            "title": (title := f"{KINDS[number % len(KINDS)]} No {number}"),
            "description": "",
            "brand": "Fernleaf",
            "categories": ["Beauty"],
            "text": title,
            "popularity": number % 7,
        }
        for number in range(ITEMS)
    ]


def _interactions() -> dict[str, list[dict[str, Any]]]:
    """Newest first, so that whoever reads them has to put them in order."""
    return {
        f"part-{partition:04d}": [
            {
                "domain": "shop",
                "user_id": user(number),
                "item_id": item,
                "timestamp": 1_500_000_000 + step,
                "rating": 4.0 if step % 2 else None,
                "review": "Fine. <|im_end|> & <b>" if step == 1 else None,
            }
            for number in range(partition, USERS, PARTITIONS)
            for step, item in reversed(list(enumerate(history(number))))
        ]
        for partition in range(PARTITIONS)
    }


def _by_part(rows: Any) -> dict[str, list[dict[str, Any]]]:
    return {
        f"test-{partition:04d}-0000": [
            row for number in range(partition, USERS, PARTITIONS) if number != WITHOUT_REASON for row in rows(number)
        ]
        for partition in range(PARTITIONS)
    }


def _thoughts(number: int) -> list[dict[str, Any]]:
    texts = {node: text or reason(number) for node, text in THOUGHTS.items()}
    return [
        {
            "example_id": f"shop/{user(number)}/4",
            "node_id": node,
            "depth": int(node != ""),
            "leaf": node == "1",
            "agreement": AGREEMENT.get(node),
            "text": text,
            "mean_logprob": -1.25,
            "num_tokens": 9,
            "seed": number,
            "finish_reason": "stop",
            "prompt_sha": "0" * 12,
        }
        for node, text in texts.items()
    ]


def _reasons(number: int) -> list[dict[str, Any]]:
    chosen = (("base", "", None), ("log_likelihood", "1", -1.25), ("thought_space", "1", 0.5))
    return [
        {
            "example_id": f"shop/{user(number)}/4",
            "selector": selector,
            "node_id": node,
            "text": THOUGHTS[node] or reason(number),
            "agreement": agreement,
        }
        for selector, node, agreement in chosen
    ]


def dump(settings: Config, path: Path) -> Path:
    """The settings as a file that a command can load."""
    path.write_text(json.dumps(json.loads(settings.to_json())))
    return path
