"""A small finished run up to `ranker`, made by hand: what `evaluate` reads, without any model."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from pulse_ray.catalogue import Catalogue
from pulse_ray.config import Config, RankerConfig
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.schema import Reject, table
from pulse_ray.workspace import StageRun, StageSpec, Workspace

USERS, PARTS = 60, 3
MOTIVES = ("fragrance-free", "travel size", "refillable", "gift set")
KINDS = ("Hand Cream", "Body Lotion", "Shampoo Bar", "Lip Balm", "Bath Oil", "Face Mist")
HOSTILE = '</td></table><script>alert("x")</script><img src=x onerror=alert(1)> & "quotes"'
INPUTS = (
    "interactions",
    "items",
    "examples",
    "candidates",
    "neighbours",
    "sasrec",
    "rationales",
    "encoders",
    "thoughts",
    "reasons",
    "ranker",
)
BEAM = {"1": 0.41, "2": 0.38, "3": 0.07}
"""Agreement of a tree's first level, of which the beam left node 3 behind."""
REJECTED_TREE, NO_CANDIDATES = 1, 17
"""Users whose tree, and whose candidates, were rejected."""


class MotiveScorer:
    """Likes candidates whose title names what the reason names; noise of the candidate's name else."""

    def __init__(self, folder: Path, config: RankerConfig, items: Catalogue) -> None:
        self.variant = folder.name
        assert json.loads((folder / "training.json").read_text())["monitor"] == "hr@1"
        assert items["shop"]

    def score(self, rows: Sequence[RankRow], token_budget: int) -> list[np.ndarray]:
        assert token_budget > 0
        return [np.array([self._logit(row, item.title) for item in row.candidates], dtype=np.float32) for row in rows]

    def _logit(self, row: RankRow, title: str) -> float:
        noise = zlib.crc32(f"{self.variant}{row.history.user_id}{title}".encode()) / 2**32
        named = row.reason is not None and any(motive in row.reason and motive in title for motive in MOTIVES)
        return 2 * noise + 1.6 * named


class FirstScorer(MotiveScorer):
    """Likes every candidate as much as any other."""

    def _logit(self, row: RankRow, title: str) -> float:
        return 0.0


def config(storage: Path, **sections: Any) -> Config:
    """A synthetic experiment's configuration; sections replace the defaults."""
    return Config.model_validate(
        {
            "name": "fernleaf-shop",
            "storage": str(storage),
            "prepare": {"domains": [{"name": "shop", "source": {"kind": "synthetic"}}]},
            "evaluate": {"bootstrap_samples": 500},
            **sections,
        }
    )


def make(settings: Config) -> StageRun:
    """Writes everything that `evaluate` reads, and returns that stage, begun."""
    workspace = Workspace(settings.storage, settings.name)
    rng = np.random.default_rng(0)
    items = [f"i{number}" for number in range(len(MOTIVES) * len(KINDS))]
    _finish(
        settings,
        workspace,
        "prepare",
        {"interactions": {}, "items": {"items": _items()}, "examples": _examples(items)},
        7.4,
    )
    _finish(
        settings, workspace, "candidates", {"sasrec": {}, "neighbours": {}, "candidates": _candidates(items, rng)}, 31.0
    )
    _finish(settings, workspace, "rationales", {"rationales": _rationales()}, 52.8)
    _finish(settings, workspace, "thought-space", {"encoders": {}}, 88.1)
    _finish(settings, workspace, "tree", {"thoughts": _thoughts()}, 240.5)
    _finish(settings, workspace, "select", {"reasons": _reasons()}, 9.9)
    _finish(settings, workspace, "ranker", {"ranker": {}}, 190.2)
    spec = StageSpec(
        name="evaluate", settings=("seed", "evaluate"), inputs=INPUTS, outputs=("evaluation", "scores"), summary=""
    )
    stage = StageRun(workspace=workspace, config=settings, spec=spec, fingerprint="5f0c2a9e71b3d846")
    stage.begin()
    return stage


def _finish(
    settings: Config,
    workspace: Workspace,
    name: str,
    outputs: Mapping[str, Mapping[str, list[dict[str, Any]]]],
    seconds: float,
) -> None:
    spec = StageSpec(name=name, settings=("seed",), inputs=(), outputs=tuple(outputs), summary="")
    stage = StageRun(workspace=workspace, config=settings, spec=spec, fingerprint="0" * 16)
    stage.begin()
    for output, parts in outputs.items():
        for part, rows in parts.items():
            stage.output(output).write(part, table(output, rows))
    if name == "tree":
        stage.reject(
            "test-0000-0000", [Reject(key=example_id(REJECTED_TREE), reason="degenerate", detail="1.2: 2 words")]
        )
    if name == "thought-space":
        stage.output("encoders").write_bytes("projection.safetensors", save(_projection()))
        stage.output("encoders").write_bytes("training.json", _training("loss", 1.9, falls=True))
    if name == "candidates":
        stage.output("sasrec").write_bytes("training.json", _training("ndcg@10", 0.2))
    if name == "ranker":
        for place, variant in enumerate(settings.ranker.variants):
            stage.output("ranker").write_bytes(f"{variant}/training.json", _training("hr@1", 0.15 + 0.08 * place))
    stage.complete(seconds, _measured(name))


def _measured(name: str) -> dict[str, dict[str, Any]]:
    steps = [("read", 812, 90, 40), ("unique", 803, 90, 40), ("filtered", 640, USERS, 24), ("kept", 640, USERS, 24)]
    return {
        "prepare": {
            "interactions": {
                "steps": [
                    {"domain": "shop", "step": step, "rows": rows, "users": users, "items": items}
                    for step, rows, users, items in steps
                ]
            },
            "examples": {"train": USERS, "validation": USERS, "test": USERS},
        },
        "thought-space": {
            "encoders": {
                "retrieval_pool": 60,
                "r@1_before": 0.083,
                "r@1_after": 0.417,
                "loss_before": 2.31,
                "loss_after": 0.87,
            }
        },
    }.get(name, {})


def users(part: int) -> range:
    """Numbers of the users whose examples part `part` of the test split holds."""
    return range(part * USERS // PARTS, (part + 1) * USERS // PARTS)


def example_id(user: int) -> str:
    return f"shop/U{user:03d}/6"


def motive(user: int) -> str:
    return MOTIVES[user % len(MOTIVES)]


def target(user: int) -> str:
    return f"i{(user % len(MOTIVES)) * len(KINDS) + user // len(MOTIVES) % len(KINDS)}"


def _by_part(rows: Any, skip: Sequence[int] = ()) -> dict[str, list[dict[str, Any]]]:
    return {
        f"test-{part:04d}-0000": [row for user in users(part) if user not in skip for row in rows(user)]
        for part in range(PARTS)
    }


def _items() -> list[dict[str, Any]]:
    titles = [f"{kind}, {motive}" for motive in MOTIVES for kind in KINDS]
    return [
        {
            "domain": "shop",
            "item_id": f"i{number}",
            "title": title,
            "description": "",
            "brand": "Fernleaf",
            "categories": ["Beauty"],
            "text": title,
            "popularity": (number * 7) % 11,
        }
        for number, title in enumerate(titles)
    ]


def _examples(items: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    reviews = (
        "Lovely, and exactly what I was after.",
        None,
        "A little too strong for my nose, but my sister liked it.",
    )

    def rows(user: int) -> list[dict[str, Any]]:
        history = [
            {
                "item_id": items[(user * 5 + step * 3) % len(items)],
                "timestamp": 1_500_000_000 + 86_400 * 9 * step,
                "rating": float(3 + (user + step) % 3) if step != 2 else None,
                "review": HOSTILE if (user, step) == (0, 1) else reviews[(user + step) % 3],
            }
            for step in range(5)
        ]
        return [
            {
                "example_id": example_id(user),
                "domain": "shop",
                "user_id": f"U{user:03d}",
                "split": "test",
                "history": history,
                "target_item": target(user),
            }
        ]

    return _by_part(rows)


def _candidates(items: Sequence[str], rng: np.random.Generator) -> dict[str, list[dict[str, Any]]]:
    def rows(user: int) -> list[dict[str, Any]]:
        others = [item for item in items if item != target(user)]
        chosen = [str(item) for item in rng.choice(others, size=9, replace=False)]
        place = int(rng.integers(10))
        chosen.insert(place, target(user))
        logits = rng.normal(size=10) + 0.8 * (np.arange(10) == place)
        return [
            {
                "example_id": example_id(user),
                "items": chosen,
                "target_index": place,
                "sampler": "uniform",
                "sasrec_logits": logits.astype(np.float32).tolist(),
                "sasrec_catalogue_rank": 1 + user % 7,
                "popularity_catalogue_rank": 2 + user % 20,
            }
        ]

    return _by_part(rows, skip=[NO_CANDIDATES])


def _written(user: int, text: str) -> dict[str, Any]:
    return {
        "example_id": example_id(user),
        "text": text,
        "prompt_sha": "0" * 12,
        "seed": user,
        "finish_reason": "stop",
        "num_tokens": len(text.split()) + 3,
    }


def _rationales() -> dict[str, list[dict[str, Any]]]:
    return _by_part(lambda user: [{**_written(user, f"They want something {motive(user)}."), "model": "fake"}])


def _thought_texts(user: int) -> dict[str, str]:
    texts = {"": "This person buys body care often, and says in the reviews what they like about each item."}
    for first in "123":
        texts[first] = (
            f"They come back to {KINDS[(user + int(first)) % len(KINDS)].lower()}s, and care for how it is packed."
        )
        for second in "123" if first != "3" else "":
            named = motive(user + (0 if second == "2" else int(first + second)))
            texts[f"{first}.{second}"] = f"They look for something {named}, to use every day and to give to others."
    return texts


def _thoughts() -> dict[str, list[dict[str, Any]]]:
    return _by_part(
        lambda user: [
            {
                **_written(user, text),
                "node_id": node,
                "depth": len(node.split(".")) if node else 0,
                "leaf": "." in node,
                "agreement": BEAM.get(node),
                "mean_logprob": -1.2 - 0.07 * len(text) / 30,
            }
            for node, text in _thought_texts(user).items()
        ],
        skip=[REJECTED_TREE],
    )


def _reasons() -> dict[str, list[dict[str, Any]]]:
    def rows(user: int) -> list[dict[str, Any]]:
        texts = _thought_texts(user)
        chosen: list[tuple[str, str, float | None]] = [("base", "", None), ("log_likelihood", "1.3", -1.41)]
        chosen += [("thought_space", "1.2", 0.63), ("sbert", "2.1", 0.22), ("encoder_base", "1.2", 0.34)]
        chosen += [("random", "2.3", None)]
        return [
            {
                "example_id": example_id(user),
                "selector": selector,
                "node_id": node,
                "text": texts[node],
                "agreement": score,
            }
            for selector, node, score in chosen
        ]

    return _by_part(rows, skip=[REJECTED_TREE])


def _training(monitor: str, start: float, *, falls: bool = False) -> bytes:
    steps = [{"step": step, "loss": 2.3 * 0.985**step, "lr": 1e-4} for step in range(1, 121, 4)]
    sign = -1 if falls else 1
    evaluations = [
        {
            "step": step,
            "epoch": step / 40,
            monitor: start + sign * 0.006 * min(step, 80) - sign * 0.001 * max(0, step - 80),
        }
        for step in range(0, 121, 20)
    ]
    return json.dumps(
        {"monitor": monitor, "steps": steps, "evaluations": evaluations, "best_step": 80, "best": 1.0}
    ).encode()


def _projection() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    n, d = 20, 16
    behaviour = rng.normal(size=(n, d))
    apart = rng.normal(size=d) * 3
    pairs = {
        "before": (behaviour, rng.normal(size=(n, d)) + apart),
        "after": (behaviour, behaviour + 0.35 * rng.normal(size=(n, d))),
    }
    tensors = {}
    for when, (history, rationale) in pairs.items():
        found = {"behaviour": history, "positive": rationale, "negative": np.roll(rationale, 7, axis=0)}
        tensors |= {f"{when}_{kind}": vectors.astype(np.float32) for kind, vectors in found.items()}
    return tensors
