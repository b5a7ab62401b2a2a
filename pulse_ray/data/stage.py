"""Stage `prepare`: the steps of `preparation` over all domains and partitions, as Ray Data maps over numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ray

from pulse_ray import errors
from pulse_ray.data import preparation
from pulse_ray.data.pieces import SCRATCH
from pulse_ray.data.preparation import Counts
from pulse_ray.errors import DataError, PulseError
from pulse_ray.progress import Bar
from pulse_ray.schema import SPLITS
from pulse_ray.workspace import StageRun

Step = Callable[..., Counts]
Numbers = tuple[int, ...]
"""What a step is called with beside the stage: the domain's number first."""
Totals = dict[int, dict[str, int]]
"""A step's counts by domain, added up over partitions."""
Each = Callable[[Step, Sequence[Numbers]], Totals]
"""Runs a step on every tuple of numbers."""
Metrics = dict[str, Any]


def run(stage: StageRun) -> dict[str, Metrics]:
    """Makes `interactions`, `items` and `examples`, on Ray.

    Returns:
        Metrics: each domain's rows, users and items step by step; where items' texts came from; examples per split.

    Raises:
        DataError: a file cannot be used, or the filter leaves nothing of a domain.
    """
    with Bar("prepare", None, "pieces") as bar:
        return prepare(stage, lambda step, numbers: _on_ray(stage, step, numbers, bar))


def prepare(stage: StageRun, each: Each) -> dict[str, Metrics]:
    """The steps in order; `each` decides where they run."""
    scratch = stage.workspace.artefact(SCRATCH)
    scratch.delete()
    try:
        domains = range(len(stage.config.prepare.domains))
        steps = [*_read(stage, each, domains), *_filter(stage, each, domains)]
        limits = _limits(stage, each, domains)
        _replace(stage)
        kept = each(preparation.split, [(*pair, limits[pair[0]]) for pair in _pairs(stage, domains)])
        items = each(preparation.describe, _pairs(stage, domains))
    finally:
        scratch.delete()
    return {
        "interactions": {"steps": steps + [_after(stage, "kept", d, kept[d], items[d]["items"]) for d in domains]},
        "items": {key: sum(counts[key] for counts in items.values()) for key in preparation.ITEM_COUNTS},
        "examples": {split: sum(counts[split] for counts in kept.values()) for split in SPLITS},
    }


def _replace(stage: StageRun) -> None:
    """Removes what an earlier run made, now that the files are known to be of use; keeps the rows set aside."""
    # Parts of an attempt that broke off must not stay: an edited file may deal its users out to fewer of them.
    for name in stage.spec.outputs:
        stage.output(name).delete()
    stage.begin()
    aside = preparation.rejects(stage)
    for part in aside.parts():
        stage.rejects.write(part, aside.read(part))


def _read(stage: StageRun, each: Each, domains: Sequence[int]) -> list[Metrics]:
    """Reads every file and removes duplicates."""
    read = each(preparation.read_file, [(d, file) for d in domains for file in preparation.files(stage, d)])
    unique = each(preparation.deduplicate, _pairs(stage, domains))
    items = each(preparation.weigh, [(d,) for d in domains])
    for domain in domains:
        if not read[domain]["rows"]:
            name = stage.config.prepare.domains[domain].name
            raise DataError(f"domain '{name}' has no reviews", remedy="Check the files in prepare.domains")
    steps = []
    for domain in domains:
        raw = unique[domain] | {"rows": read[domain]["rows"]}
        steps.append(_after(stage, "read", domain, raw, items[domain]["items"]))
        steps.append(_after(stage, "unique", domain, unique[domain], items[domain]["items"]))
    return steps


def _filter(stage: StageRun, each: Each, domains: Sequence[int]) -> list[Metrics]:
    """Drops rare users and items: once, or until none is left."""
    prepare = stage.config.prepare
    steps = []
    unsettled = list(domains)
    while unsettled:
        left = each(preparation.thin, _pairs(stage, unsettled))
        items = each(preparation.weigh, [(d,) for d in unsettled])
        for domain in tuple(unsettled):
            if not left[domain]["rows"]:
                raise DataError(
                    f"the filter leaves nothing of domain '{prepare.domains[domain].name}' with min_user_interactions "
                    f"{prepare.min_user_interactions} and min_item_interactions {prepare.min_item_interactions}",
                    remedy="Lower prepare.min_user_interactions or prepare.min_item_interactions",
                )
            if prepare.filter == "single_pass" or not items[domain]["rare"]:
                steps.append(_after(stage, "filtered", domain, left[domain], items[domain]["items"]))
                unsettled.remove(domain)
    return steps


def _limits(stage: StageRun, each: Each, domains: Sequence[int]) -> dict[int, int]:
    """The largest hash of a user that is kept, by domain."""
    if stage.config.prepare.max_users is None:
        return dict.fromkeys(domains, preparation.EVERYONE)
    each(preparation.rank, _pairs(stage, domains))
    return {domain: counts["limit"] for domain, counts in each(preparation.limit, [(d,) for d in domains]).items()}


def _after(stage: StageRun, step: str, domain: int, counts: Counts, items: int) -> Metrics:
    name = stage.config.prepare.domains[domain].name
    return {"domain": name, "step": step, "rows": counts["rows"], "users": counts["users"], "items": items}


def _pairs(stage: StageRun, domains: Iterable[int]) -> list[Numbers]:
    return [(domain, partition) for domain in domains for partition in range(stage.config.prepare.partitions)]


def _on_ray(stage: StageRun, step: Step, numbers: Sequence[Numbers], bar: Bar) -> Totals:
    """Runs a step on every tuple of numbers, as a Ray Data map.

    Raises:
        PulseError: as raised by the step.
    """
    totals: dict[int, Counter[str]] = {domain: Counter() for domain, *_ in numbers}
    rows = [{"numbers": list(entry)} for entry in numbers]
    data = ray.data.from_items(rows, override_num_blocks=len(rows)).map(_guarded, fn_args=(stage, step))
    for row in data.iter_rows():
        if len(row["error"]):
            raise errors.from_values(row["error"])
        totals[row["domain"]].update(dict(zip(row["names"], row["values"], strict=True)))
        bar.advance(1, {"now": step.__name__})
    return {domain: dict(counts) for domain, counts in totals.items()}


def _guarded(row: dict[str, Any], stage: StageRun, step: Step) -> dict[str, Any]:
    numbers = [int(number) for number in row["numbers"]]
    outcome: dict[str, Any] = {"domain": numbers[0], "error": [], "names": [], "values": []}
    try:
        counts = step(stage, *numbers)
    except PulseError as error:
        return outcome | {"error": errors.to_values(error)}
    return outcome | {"names": list(counts), "values": list(counts.values())}
