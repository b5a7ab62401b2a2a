"""Single users as the report shows them: history, tree of thoughts, chosen reason, ranked candidates."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from pulse_ray import catalogue
from pulse_ray.catalogue import Catalogue
from pulse_ray.evaluation.protocol import Protocol, main_variant, models, protocol_of
from pulse_ray.schema import Example, Split, examples
from pulse_ray.workspace import StageRun


@dataclass(frozen=True, kw_only=True)
class Step:
    """One line of a history."""

    title: str
    date: str
    rating: float | None
    review: str | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A selector that chose a node, and its score of it where it has one."""

    selector: str
    agreement: float | None


@dataclass(frozen=True, kw_only=True)
class Node:
    """A thought, what refines it, and who chose it. `leaf` and `agreement` as in the `thoughts` table."""

    node_id: str
    leaf: bool
    text: str
    mean_logprob: float
    agreement: float | None
    chosen_by: tuple[Choice, ...]
    children: tuple[Node, ...]


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A candidate under the main variant, best first; `ranks` are its places under the other models."""

    title: str
    is_target: bool
    logit: float
    probability: float
    ranks: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One example of the test split."""

    example_id: str
    user_id: str
    domain: str
    history: tuple[Step, ...]
    target: str
    tree: Node | None
    """None where the example's tree was rejected."""
    reason: str | None
    """What the main variant was given."""
    model: str
    """The main variant, which orders `candidates`."""
    protocol: Protocol
    others: tuple[str, ...]
    """The other models, in the order of `Candidate.ranks`."""
    candidates: tuple[Candidate, ...]
    target_rank: int


Rows = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class _Found:
    """An example and its rows of the tables."""

    example: Example
    scores: Rows
    thoughts: Rows
    reasons: Rows

    def items(self) -> Iterator[tuple[str, str]]:
        """Domain and id of every item that is shown."""
        domain = self.example.history.domain
        for step in self.example.history.interactions:
            yield domain, step.item_id
        for row in self.scores:
            for item in row["items"]:
                yield domain, item


def collect(stage: StageRun) -> list[Case]:
    """The first examples of different users, from as few parts of the test split as hold them."""
    found = _find(stage)
    items = catalogue.load(stage.input("items"), wanted={key for one in found for key in one.items()})
    return [_case(stage, items, one) for one in found]


def _find(stage: StageRun) -> list[_Found]:
    found: dict[tuple[str, str], _Found] = {}
    splits = stage.config.evaluate.splits
    split: Split = "test" if "test" in splits else splits[0]
    for part in stage.output("scores").parts(split):
        scores = _grouped(stage.output("scores").read(part).to_pylist())
        thoughts = _grouped(stage.input("thoughts").read(part).to_pylist())
        reasons = _grouped(stage.input("reasons").read(part).to_pylist())
        for example in examples(stage.input("examples").read(part)):
            if len(found) >= stage.config.evaluate.report_users:
                return list(found.values())
            history = example.history
            if scores[history.example_id] and (history.domain, history.user_id) not in found:
                found[history.domain, history.user_id] = _Found(
                    example=example,
                    scores=scores[history.example_id],
                    thoughts=thoughts[history.example_id],
                    reasons=reasons[history.example_id],
                )
    return list(found.values())


def _grouped(rows: Rows) -> Mapping[str, list[Mapping[str, Any]]]:
    grouped: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        grouped[row["example_id"]].append(row)
    return grouped


def _case(stage: StageRun, items: Catalogue, found: _Found) -> Case:
    main = main_variant(stage.config)
    history = found.example.history
    titles = {item_id: item.title for item_id, item in items[history.domain].items()}
    by_model = {row["variant"]: row for row in found.scores}
    chosen: dict[str, list[Choice]] = defaultdict(list)
    for row in found.reasons:
        chosen[row["node_id"]].append(Choice(selector=row["selector"], agreement=row["agreement"]))
    others = tuple(model for model in models(stage.config) if model != main)
    return Case(
        example_id=history.example_id,
        user_id=history.user_id,
        domain=history.domain,
        history=tuple(
            Step(
                title=titles.get(step.item_id, step.item_id),
                date=_date(step.timestamp),
                rating=step.rating,
                review=step.review,
            )
            for step in history.interactions
        ),
        target=titles[found.example.target_item],
        tree=next(_nodes(found.thoughts, chosen), None),
        reason=next((row["text"] for row in found.reasons if row["selector"] == main), None),
        model=main,
        protocol=protocol_of(main, stage.config),
        others=others,
        candidates=_candidates(by_model, main, others, titles),
        target_rank=by_model[main]["rank"],
    )


def _date(timestamp: int) -> str:
    """The day, or nothing where the source counts steps instead of seconds.

    >>> _date(1514764800), _date(3)
    ('2018-01-01', '')
    """
    return datetime.fromtimestamp(timestamp, UTC).date().isoformat() if timestamp > 86400 else ""


def _nodes(thoughts: Rows, chosen: Mapping[str, Sequence[Choice]], parent: str | None = None) -> Iterator[Node]:
    """The children of `parent` with all that hangs below them; the root for None."""
    for row in thoughts:
        if _parent(row["node_id"]) == parent:
            yield Node(
                node_id=row["node_id"],
                leaf=row["leaf"],
                text=row["text"],
                mean_logprob=row["mean_logprob"],
                agreement=row["agreement"],
                chosen_by=tuple(chosen.get(row["node_id"], ())),
                children=tuple(_nodes(thoughts, chosen, row["node_id"])),
            )


def _parent(node_id: str) -> str | None:
    """Id of the node above, None for the root.

    >>> _parent("1.2"), _parent("1"), _parent("")
    ('1', '', None)
    """
    return node_id.rpartition(".")[0] if node_id else None


def _candidates(
    by_model: Mapping[str, Mapping[str, Any]], main: str, others: Sequence[str], titles: Mapping[str, str]
) -> tuple[Candidate, ...]:
    row = by_model[main]
    logits = np.array(row["logits"], dtype=np.float64)
    weights = np.exp(logits - logits.max())
    is_target = np.arange(len(logits)) == row["target_index"]
    places = {model: _places(np.array(by_model[model]["logits"]), is_target) for model in (main, *others)}
    return tuple(
        Candidate(
            title=titles[row["items"][index]],
            is_target=bool(is_target[index]),
            logit=float(logits[index]),
            probability=float(weights[index] / weights.sum()),
            ranks=tuple(int(places[model][index]) for model in others),
        )
        for index in np.argsort(places[main])
    )


def _places(logits: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Place of each candidate, from 1; the target comes after all that it ties with, as its stored rank does.

    >>> _places(np.array([1.0, 2.0, 1.0]), np.array([True, False, False]))
    array([3, 1, 2])
    """
    order = np.lexsort([is_target, -logits])
    return np.argsort(order) + 1
