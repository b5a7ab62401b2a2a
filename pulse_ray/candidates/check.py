"""`pulse-ray candidates --check`: whether the stored candidate sets are what the stage promises, row by row.

Every part is checked against examples, interactions and catalogue, and drawn again. A draw that gives the stored row
in another process shows that neither the number of workers nor the order of parts had a say in it.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.special import chdtrc  # type: ignore[import-untyped]

from pulse_ray.candidates.exports import load_model
from pulse_ray.candidates.rows import Key, Row, read_rows
from pulse_ray.candidates.sets import CandidateSets, Touched
from pulse_ray.config import CandidatesConfig
from pulse_ray.errors import ArtifactError, DataError
from pulse_ray.runtime import map_parts
from pulse_ray.workspace import Artefact, Part, StageRun

Stored = Mapping[str, Any]

PROPERTIES = {
    "rows": "every example has one row, or was set aside",
    "members": "K different items of the example's domain",
    "target": "the target stands at target_index",
    "untouched": "no other item that the user ever touched",
    "redrawn": "a fresh draw gives the stored row",
}
LEAST_P = 1e-6
"""Targets that are spread so unevenly do not come about by chance."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """How a property fared: rows that were checked, rows that violate it, and an example among those."""

    title: str
    checked: int
    violations: int
    first: str | None


def require_complete(stage: StageRun) -> None:
    """Whether there is something to check.

    Raises:
        ArtifactError: the stage is not complete.
    """
    if (condition := stage.condition()) != "complete":
        raise ArtifactError(
            f"stage 'candidates' is {condition}: there is nothing to check", remedy="Run `pulse-ray candidates` first"
        )


def check(stage: StageRun) -> list[Finding]:
    """Checks a finished stage, part by part on its pool."""
    config = stage.config.candidates
    parts = sorted({*stage.input("examples").parts(), *stage.output("candidates").parts()})
    return summarise(map_parts(stage, parts, CheckWorker, stage, pool=config.pool, title="candidates: check"), config)


def summarise(answers: Iterable[Mapping[str, Any]], config: CandidatesConfig) -> list[Finding]:
    """One finding for each property, and one for the places of the targets.

    Args:
        answers: what `CheckWorker` found, in any order.
    """
    checked: Counter[str] = Counter()
    violating: dict[str, list[tuple[Part, str]]] = defaultdict(list)
    violations: Counter[str] = Counter()
    places: Counter[int] = Counter()
    for answer in answers:
        checked.update(answer["checked"])
        places.update({int(place): count for place, count in answer["places"].items()})
        for name, (count, first) in answer["violations"].items():
            violations[name] += count
            violating[name].append((answer["part"], first))
    found = [
        Finding(
            title=title,
            checked=checked[name],
            violations=violations[name],
            first=min(violating[name])[1] if violations[name] else None,
        )
        for name, title in PROPERTIES.items()
    ]
    return [*found, _spread(places, config.size)]


def complain(findings: Sequence[Finding], stage: StageRun) -> None:
    """Nothing where every property holds.

    Raises:
        DataError: naming those that do not.
    """
    broken = [finding for finding in findings if finding.violations]
    if broken:
        first = next((finding.first for finding in broken if finding.first), None)
        raise DataError(
            "the stored candidates do not keep: "
            + "; ".join(f"{finding.title} ({finding.violations:,} of {finding.checked:,})" for finding in broken)
            + (f"; for one, {first}" if first else ""),
            remedy=f"Delete {stage.output('candidates').path}; `pulse-ray candidates` makes it again",
        )


class _Parts:
    """The parts of an artefact as they were listed once: one that is missing is read as none."""

    def __init__(self, artefact: Artefact) -> None:
        self._artefact, self._there = artefact, set(artefact.parts())

    def read(self, part: Part) -> list[pa.Table]:
        return [self._artefact.read(part)] if part in self._there else []


class CheckWorker:
    """Checks the rows of a part."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.size = stage.config.candidates.size
        self.model = load_model(stage)
        self.sets = CandidateSets(stage, self.model)
        self.touched = Touched(stage)
        self.examples = _Parts(stage.input("examples"))
        self.candidates = _Parts(stage.output("candidates"))
        self.rejects = _Parts(stage.rejects)

    def __call__(self, part: Part) -> dict[str, Any]:
        rows = [row for data in self.examples.read(part) for row in read_rows(data)]
        stored = [row for data in self.candidates.read(part) for row in data.to_pylist()]
        aside = Counter(key for data in self.rejects.read(part) for key in data.column("key").to_pylist())
        touched = self.touched.of(part, rows) if rows else {}
        checked: Counter[str] = Counter()
        broken: dict[str, list[str]] = defaultdict(list)

        def judge(name: str, key: str, holds: bool) -> None:
            checked[name] += 1
            if not holds:
                broken[name].append(key)

        counts = Counter(row["example_id"] for row in stored)
        by_id = {row.example_id: row for row in rows}
        for key in (*by_id, *(counts.keys() - by_id.keys())):
            judge("rows", key, key in by_id and counts[key] + aside[key] == 1)
        for entry in stored:
            if row := by_id.get(entry["example_id"]):
                own = touched[(row.domain, row.user_id)]
                judge("members", row.example_id, self._members(row, entry))
                judge("target", row.example_id, _target(row, entry))
                judge("untouched", row.example_id, _untouched(row, entry, own))
        for row, fresh in self._draw(rows, touched):
            for entry in (entry for entry in stored if entry["example_id"] == row.example_id):
                judge("redrawn", row.example_id, fresh is not None and _same(fresh, entry))
            if aside[row.example_id]:
                judge("redrawn", row.example_id, fresh is None)
        return {
            "part": part,
            "checked": checked,
            "violations": {name: (len(keys), keys[0]) for name, keys in broken.items()},
            "places": Counter(entry["target_index"] for entry in stored),
        }

    def _members(self, row: Row, entry: Stored) -> bool:
        items = entry["items"]
        return len(items) == self.size == len(set(items)) and all((row.domain, i) in self.model.index for i in items)

    def _draw(
        self, rows: Sequence[Row], touched: Mapping[Key, set[str]]
    ) -> Iterator[tuple[Row, dict[str, Any] | None]]:
        states = self.model.states([self.model.indices(row.domain, row.items) for row in rows])
        return zip(rows, self.sets.draw(rows, states, touched), strict=True)


def _target(row: Row, entry: Stored) -> bool:
    items, place = entry["items"], entry["target_index"]
    return bool(0 <= place < len(items) and items[place] == row.target)


def _untouched(row: Row, entry: Stored, touched: set[str]) -> bool:
    """False also where the interactions lack what the example itself tells of the user."""
    return not touched & (set(entry["items"]) - {row.target}) and touched >= {*row.items, row.target}


def _same(fresh: Stored, stored: Stored) -> bool:
    """Logits, and the ranks that come of them, may differ as they do from one processor to another."""
    exact = ("items", "target_index", "sampler", "popularity_catalogue_rank")
    if any(fresh[name] != stored[name] for name in exact):
        return False
    one, other = fresh["sasrec_catalogue_rank"], stored["sasrec_catalogue_rank"]
    if (one is None) != (other is None) or len(fresh["sasrec_logits"]) != len(stored["sasrec_logits"]):
        return False
    return bool(
        np.allclose(fresh["sasrec_logits"], stored["sasrec_logits"], rtol=1e-3, atol=1e-3)
        and (one is None or np.isclose(one, other, rtol=0.01, atol=2))
    )


def _spread(places: Mapping[int, int], size: int) -> Finding:
    """Pearson's test of the targets' places, in bins of neighbouring ones that expect 5 targets or more."""
    total = sum(places.values())
    bins = min(size, total // 5, 100)
    if bins < 2:
        return Finding(
            title="targets take every place alike (too few to tell)", checked=total, violations=0, first=None
        )
    seen = np.zeros(bins)
    for place, count in places.items():
        seen[min(max(place, 0), size - 1) * bins // size] += count
    expected = np.bincount(np.arange(size) * bins // size, minlength=bins) / size * total
    p = float(chdtrc(bins - 1, ((seen - expected) ** 2 / expected).sum()))
    title = f"targets take every place alike (p = {p:.3g})"
    return Finding(title=title, checked=total, violations=int(p < LEAST_P), first=None)
