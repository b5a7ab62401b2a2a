"""From scores to the rows of `metrics.json`: which examples count, which label a number carries, one row a model.

Every model is measured on the same stored candidates of the same examples. An example whose tree was rejected counts
for every model like any other; it is ranked without a reason. The models that can rank a whole catalogue are also
measured on that, in rows of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pulse_ray import metrics, seeding
from pulse_ray.config import BY_BEHAVIOUR, Config

Protocol = Literal["deployable", "oracle"]
BASELINES = ("popularity", "sasrec")
"""Models that every ranker is compared with; they see no text, and can rank a whole catalogue."""

CATALOGUE_RANKS = {model: f"{model}_catalogue_rank" for model in BASELINES}
"""Columns of `candidates` that hold a model's rank of the target in the whole catalogue."""


@dataclass(frozen=True, kw_only=True)
class MetricRow:
    """What one model reached on one domain's split.

    `values` and the ends in `intervals` are keyed as `metrics.GAINS`; all lie between 0 and 1.
    """

    model: str
    protocol: Protocol
    train_domain: str
    domain: str
    split: str
    candidates: int
    """How many were ranked: K, or all items of the domain. What the history holds is ranked in neither case."""
    n: int
    values: Mapping[str, float]
    intervals: Mapping[str, tuple[float, float]]
    catalogue: bool = False
    """Whether all items of the domain were ranked, and not the stored candidates."""

    def to_json(self) -> dict[str, str | int | float]:
        """The row as `metrics.json` holds it: `hr@1`, `hr@1_low`, `hr@1_high`, …"""
        row: dict[str, str | int | float] = {
            "model": self.model,
            "protocol": self.protocol,
            "train_domain": self.train_domain,
            "domain": self.domain,
            "split": self.split,
            "candidates": self.candidates,
            "n": self.n,
        }
        for name, value in self.values.items():
            low, high = self.intervals[name]
            row |= {name: value, f"{name}_low": low, f"{name}_high": high}
        return row


class Tally:
    """Histograms of ranks by domain, split and model: all that is kept of the scores, however many there are.

    `counts` are of the stored candidates, `catalogue` of all items.
    """

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str, str], NDArray[np.int64]] = {}
        self.catalogue: dict[tuple[str, str, str], NDArray[np.int64]] = {}

    def add(self, scores: pa.Table) -> None:
        """Counts a part of the `scores` table; columns example_id, split, variant, logits and rank are read."""
        columns = scores.append_column("size", pc.list_value_length(scores.column("logits")))
        for row in columns.select(["example_id", "split", "variant", "rank", "size"]).to_pylist():
            key = (domain_of(row["example_id"]), row["split"], row["variant"])
            counts = self.counts.setdefault(key, np.zeros(row["size"], dtype=np.int64))
            assert len(counts) == row["size"], f"{row['example_id']} has {row['size']} candidates, others {len(counts)}"
            counts[row["rank"] - 1] += 1

    def add_catalogue(self, candidates: pa.Table, split: str, sizes: Mapping[str, int]) -> None:
        """Counts a part of the `candidates` table; example_id and `CATALOGUE_RANKS` are read.

        Args:
            sizes: items of each domain.
        """
        for row in candidates.select(["example_id", *CATALOGUE_RANKS.values()]).to_pylist():
            domain = domain_of(row["example_id"])
            for model, column in CATALOGUE_RANKS.items():
                key = (domain, split, model)
                if key not in self.catalogue:
                    self.catalogue[key] = np.zeros(sizes[domain], dtype=np.int64)
                self.catalogue[key][row[column] - 1] += 1


def domain_of(example_id: str) -> str:
    """The domain that an example belongs to.

    >>> domain_of("shop/u/17/4")
    'shop'
    """
    return example_id.split("/", 1)[0]


def models(config: Config) -> tuple[str, ...]:
    """Everything that is measured, in the order in which it is shown."""
    return (*BASELINES, *config.ranker.variants)


def main_variant(config: Config) -> str:
    """The method itself, where it was trained; else the last variant."""
    variants = config.ranker.variants
    return "thought_space" if "thought_space" in variants else variants[-1]


def protocol_of(model: str, config: Config) -> Protocol:
    """The protocol under which a model's reasons were selected; only some selectors see behaviours."""
    return config.select.protocol if model in BY_BEHAVIOUR else "deployable"


def metric_rows(tally: Tally, config: Config) -> list[MetricRow]:
    """One row for each domain, split and model, those of a whole catalogue after the others of their split.

    Raises:
        AssertionError: the models were not all measured on the same number of examples.
    """
    rows = []
    for domain, split in sorted({key[:2] for key in tally.counts}, key=lambda key: _place(key, config)):
        whole = {key[2]: counts for key, counts in tally.catalogue.items() if key[:2] == (domain, split)}
        stored = {model: tally.counts[domain, split, model] for model in models(config)}
        sizes = {int(counts.sum()) for counts in (*stored.values(), *whole.values())}
        assert len(sizes) == 1, f"models were measured on different examples of {domain} {split}: {sorted(sizes)}"
        for model, counts in stored.items():
            rows.append(_row((domain, split, model), counts, config, catalogue=False))
        for model, counts in whole.items():
            rows.append(_row((domain, split, model), counts, config, catalogue=True))
    return rows


def _row(key: tuple[str, str, str], counts: NDArray[np.int64], config: Config, *, catalogue: bool) -> MetricRow:
    domain, split, model = key
    seed = seeding.derive(config.seed, "bootstrap", *key, *(["catalogue"] if catalogue else []))
    return MetricRow(
        model=model,
        protocol=protocol_of(model, config),
        train_domain="+".join(domain.name for domain in config.prepare.domains),
        domain=domain,
        split=split,
        candidates=len(counts),
        n=int(counts.sum()),
        values=metrics.means(counts),
        intervals=metrics.intervals(counts, samples=config.evaluate.bootstrap_samples, seed=seed),
        catalogue=catalogue,
    )


def best(rows: Sequence[MetricRow], metric: str) -> float | None:
    """The best value that a model reached without seeing the label; None where there is no such model."""
    return max((row.values[metric] for row in rows if row.protocol == "deployable"), default=None)


def _place(key: tuple[str, str], config: Config) -> tuple[int, int]:
    domain, split = key
    names = [entry.name for entry in config.prepare.domains]
    splits: list[str] = [*config.evaluate.splits]
    return names.index(domain), splits.index(split)
