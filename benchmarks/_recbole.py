"""RecBole's SASRec in a process and an environment of its own: `python _recbole.py FOLDER MINUTES DIM MAX_LENGTH`.

Reads `FOLDER/games/games.inter`, trains as many epochs as fit into the minutes (one at least) or until RecBole's own
early stopping, and writes of the epoch that was best on the validation targets the test users' states and the items'
embeddings to `peer.npz`, and how each epoch went to `peer.json`. What RecBole brings is left as it is (every prefix of
a sequence is an example; dropout 0.5; Adam at 1e-3) but for the size of a batch: 256 examples instead of 2,048 give it
eight times the optimizer steps in the same epoch.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.model.sequential_recommender import SASRec
from recbole.trainer import Trainer
from recbole.utils import init_seed


class TimeIsOver(Exception):  # noqa: N818
    """Another epoch does not fit into the minutes."""


class Watched(Trainer):  # type: ignore[misc]
    """RecBole's trainer with a clock; its validation does not count against the minutes."""

    def __init__(self, config: Config, model: SASRec, minutes: float) -> None:
        super().__init__(config, model)
        self.left_s = 60 * minutes
        self.course: list[dict[str, float]] = []

    def _train_epoch(self, *args: Any, **settings: Any) -> Any:
        if self.course and self.left_s < self.course[-1]["seconds"]:
            raise TimeIsOver
        started = time.monotonic()
        found = super()._train_epoch(*args, **settings)
        self.course.append({"seconds": round(time.monotonic() - started, 2)})
        self.left_s -= self.course[-1]["seconds"]
        return found

    def _valid_epoch(self, *args: Any, **settings: Any) -> Any:
        score, found = super()._valid_epoch(*args, **settings)
        self.course[-1]["validation_ndcg@10"] = float(score)
        print(f"RecBole: {self.course[-1]}", file=sys.stderr, flush=True)
        return score, found


def settings(folder: Path, dim: int, max_length: int) -> dict[str, Any]:
    """What is not RecBole's default, or what must not depend on it."""
    return {
        "data_path": str(folder),
        "checkpoint_dir": str(folder / "saved"),
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "USER_ID_FIELD": "user_id",
        "ITEM_ID_FIELD": "item_id",
        "TIME_FIELD": "timestamp",
        "MAX_ITEM_LIST_LENGTH": max_length,
        "hidden_size": dim,
        "inner_size": 4 * dim,
        "n_layers": 2,
        "n_heads": 2,
        "loss_type": "CE",
        "train_batch_size": 256,
        "train_neg_sample_args": None,
        "eval_args": {"split": {"LS": "valid_and_test"}, "group_by": "user", "order": "TO", "mode": "full"},
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "use_gpu": False,
        "show_progress": False,
        "epochs": 1000,
    }


def states(model: SASRec, batches: Any, dataset: Any) -> dict[str, np.ndarray]:
    """The state after each test history, and the embedding of each item, with the ids of both."""
    users, found = [], []
    model.eval()
    with torch.no_grad():
        for interaction, *_ in batches:
            found.append(model.forward(interaction["item_id_list"], interaction["item_length"]).numpy())
            users.append(dataset.id2token("user_id", interaction["user_id"].numpy()))
            if len(found) == 1:
                scores = model.full_sort_predict(interaction).numpy()
                same = np.allclose(found[0] @ model.item_embedding.weight.numpy().T, scores, atol=1e-4)
                assert same, "RecBole's scores are not products of states and items"
    items = dataset.id2token("item_id", np.arange(1, dataset.item_num))
    return {
        "users": np.concatenate(users).astype(str),
        "states": np.concatenate(found),
        "item_ids": np.asarray(items).astype(str),
        "items": model.item_embedding.weight.detach().numpy()[1:],
    }


def main(folder: Path, minutes: float, dim: int, max_length: int) -> None:
    """Trains the model, and writes what the other process ranks."""
    config = Config(model="SASRec", dataset="games", config_dict=settings(folder, dim, max_length))
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    train, validation, test = data_preparation(config, dataset)
    model = SASRec(config, train.dataset)
    trainer = Watched(config, model, minutes)
    stopped_early = False
    try:
        trainer.fit(train, validation, saved=True, show_progress=False)
        stopped_early = True
    except TimeIsOver:
        pass
    # It holds more than weights, and was written by this very process.
    saved = torch.load(trainer.saved_model_file, map_location="cpu", weights_only=False)
    model.load_state_dict(saved["state_dict"])
    np.savez(folder / "peer.npz", **states(model, test, dataset))
    described = {"epochs": trainer.course, "examples": len(train.dataset), "stopped_early": stopped_early}
    (folder / "peer.json").write_text(json.dumps(described))


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
