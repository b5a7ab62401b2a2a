"""Rows of `metrics.json` from a fixed set of scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import fake_run
import pytest

from pulse_ray.config import Config, Selector
from pulse_ray.evaluation.protocol import Tally, best, metric_rows, protocol_of
from pulse_ray.schema import table

DOMAINS = [{"name": name, "source": {"kind": "synthetic"}} for name in ("shop", "games")]
RANKS = {"popularity": [4, 4, 3], "sasrec": [2, 1, 4], "none": [1, 4, 2], "thought_space": [1, 1, 2]}
"""Ranks of three examples' targets among four candidates."""


def _config(tmp_path: Path, **sections: Any) -> Config:
    return fake_run.config(tmp_path, **({"ranker": {"variants": ["none", "thought_space"]}} | sections))


def _tally(domain: str = "shop", split: str = "test", models: tuple[str, ...] = tuple(RANKS)) -> Tally:
    tally = Tally()
    for model in models:
        tally.add(
            table(
                "scores",
                [
                    {
                        "example_id": f"{domain}/u{user}/3",
                        "split": split,
                        "variant": model,
                        "items": ["a", "b", "c", "d"],
                        "logits": [0.0] * 4,
                        "target_index": 0,
                        "rank": rank,
                    }
                    for user, rank in enumerate(RANKS[model])
                ],
            )
        )
    return tally


def test_golden_rows(tmp_path: Path) -> None:
    rows = [row.to_json() for row in metric_rows(_tally(), _config(tmp_path))]
    assert [row["model"] for row in rows] == list(RANKS)
    last = rows[-1]
    assert {key: last[key] for key in ("protocol", "train_domain", "domain", "split", "candidates", "n")} == {
        "protocol": "deployable",
        "train_domain": "shop",
        "domain": "shop",
        "split": "test",
        "candidates": 4,
        "n": 3,
    }
    assert last["hr@1"] == pytest.approx(2 / 3)
    assert last["hr@3"] == last["hr@5"] == 1.0
    assert last["ndcg@10"] == pytest.approx((2 + 0.6309297535714575) / 3)
    assert last["mrr"] == pytest.approx(5 / 6)
    assert (last["hr@1_low"], last["hr@1_high"]) == (0.0, 1.0)
    assert [row["hr@1"] for row in rows] == pytest.approx([0, 1 / 3, 1 / 3, 2 / 3])


def test_domains_and_splits_have_rows_of_their_own(tmp_path: Path) -> None:
    config = _config(tmp_path, prepare={"domains": DOMAINS}, evaluate={"splits": ["validation", "test"]})
    tally = _tally("games")
    tally.counts |= _tally("shop", "validation").counts | _tally("shop").counts
    found = metric_rows(tally, config)
    assert [(row.domain, row.split) for row in found[:: len(RANKS)]] == [
        ("shop", "validation"),
        ("shop", "test"),
        ("games", "test"),
    ]
    assert {row.train_domain for row in found} == {"shop+games"}


def _candidates(ranks: dict[str, list[int]], domain: str = "shop") -> Any:
    return table(
        "candidates",
        [
            {
                "example_id": f"{domain}/u{user}/3",
                "items": ["a", "b"],
                "target_index": 0,
                "sampler": "uniform",
                "sasrec_logits": [0.0, 0.0],
                **{f"{model}_catalogue_rank": found[user] for model, found in ranks.items()},
            }
            for user in range(len(ranks["sasrec"]))
        ],
    )


def test_ranks_in_the_whole_catalogue_have_rows_of_their_own(tmp_path: Path) -> None:
    tally, large = _tally(), 1_000_000
    tally.add_catalogue(_candidates({"popularity": [1, large, 9000], "sasrec": [2, 11, 3]}), "test", {"shop": large})
    rows = metric_rows(tally, _config(tmp_path))
    assert [row.model for row in rows] == [*RANKS, "popularity", "sasrec"]
    assert [row.catalogue for row in rows] == [False] * 4 + [True] * 2
    popularity, sasrec = (row.to_json() for row in rows[4:])
    assert (popularity["candidates"], popularity["n"]) == (large, 3)
    assert popularity["mrr"] == pytest.approx((1 + 1 / large + 1 / 9000) / 3)
    assert popularity["hr@5"] == pytest.approx(1 / 3)
    assert sasrec["ndcg@10"] == pytest.approx((0.6309297535714575 + 0.5) / 3)
    assert (sasrec["hr@3_low"], sasrec["hr@3_high"]) == (0.0, 1.0)


def test_a_catalogue_that_lacks_an_example_is_a_defect(tmp_path: Path) -> None:
    tally = _tally()
    tally.add_catalogue(_candidates({"popularity": [1, 2], "sasrec": [2, 1]}), "test", {"shop": 9})
    with pytest.raises(AssertionError, match="different examples"):
        metric_rows(tally, _config(tmp_path))


def test_only_models_that_are_given_reasons_carry_the_label_of_the_selection(tmp_path: Path) -> None:
    oracle = _config(tmp_path, select={"protocol": "oracle"})
    assert {model: protocol_of(model, oracle) for model in RANKS} == {
        "popularity": "deployable",
        "sasrec": "deployable",
        "none": "deployable",
        "thought_space": "oracle",
    }
    labels = {selector: protocol_of(selector, oracle) for selector in get_args(Selector)}
    assert {name for name, label in labels.items() if label == "oracle"} == {"thought_space", "sbert", "encoder_base"}
    rows = metric_rows(_tally(), oracle)
    assert best(rows, "hr@1") == pytest.approx(1 / 3), "a number that saw the label is never the best"


def test_models_measured_on_different_examples_are_a_defect(tmp_path: Path) -> None:
    tally = _tally()
    tally.add(fake_run.table("scores", [_row("shop/u9/3", "sasrec")]))
    with pytest.raises(AssertionError, match="different examples"):
        metric_rows(tally, _config(tmp_path))


def _row(example_id: str, model: str) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "split": "test",
        "variant": model,
        "items": ["a", "b", "c", "d"],
        "logits": [0.0] * 4,
        "target_index": 0,
        "rank": 1,
    }
