"""Stage `prepare`: the steps of `preparation` over all domains and partitions, as Ray Data maps over numbers."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import ray

from pulse_ray import errors
from pulse_ray.data import preparation
from pulse_ray.data.choosing import choose
from pulse_ray.data.pieces import SCRATCH, Counts
from pulse_ray.errors import DataError, PulseError
from pulse_ray.progress import Bar, ReportGuard
from pulse_ray.runtime import core_cpus
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


STEPS = {
    "read_file": ("reading", "files"),
    "deduplicate": ("removing duplicates", "partitions"),
    "choose": ("choosing what stays", "domains"),
    "split": ("splitting", "partitions"),
    "tally": ("counting items", "domains"),
    "describe": ("describing items", "partitions"),
}
"""What the progress line says of a step, and what its pieces are."""


def run(stage: StageRun) -> dict[str, Metrics]:
    """Makes `interactions`, `items` and `examples`, on Ray.

    Returns:
        Metrics: each domain's rows, users and items step by step; where items' texts came from; examples per split.

    Raises:
        DataError: a file cannot be used, the filter leaves nothing of a domain, or a split has no example.
    """
    cpus = core_cpus(stage.config.cluster)
    made = prepare(stage, lambda step, numbers: _on_ray(stage, step, numbers, cpus))
    for split, count in made["examples"].items():
        if not count:
            raise DataError(
                f"there are no examples for {split}",
                remedy="Leave-two-out needs users with four interactions, temporal ones before and after its cuts: "
                "lower the minima, or change prepare.temporal_shares",
            )
    return made


def prepare(stage: StageRun, each: Each) -> dict[str, Metrics]:
    """The steps in order; `each` decides where they run."""
    scratch = stage.workspace.artefact(SCRATCH)
    scratch.delete()
    domains = range(len(stage.config.prepare.domains))
    try:
        numbers = {domain: preparation.list_files(stage, domain) for domain in domains}
        read = each(preparation.read_file, [(d, file) for d in domains for file in range(numbers[d])])
        _check_read(stage, read)
        unique = each(preparation.deduplicate, _pairs(stage, domains))
        chosen = each(choose, [(d,) for d in domains])
        _check_chosen(stage, chosen)
        _replace(stage)
        cuts = {d: (counts["validation_from"], counts["test_from"]) for d, counts in chosen.items()}
        kept = each(preparation.split, [(*pair, *cuts[pair[0]]) for pair in _pairs(stage, domains)])
        each(preparation.tally, [(d,) for d in domains])
        items = each(preparation.describe, _pairs(stage, domains))
    finally:
        scratch.delete()
    found = {d: read[d] | unique[d] | chosen[d] for d in domains}
    return {
        "interactions": {
            "steps": [step for d in domains for step in _steps(stage, d, found[d], kept[d])],
            "accounting": [_account(stage, d, found[d]) for d in domains],
            "mended": [entry for d in domains for entry in _mended(stage, d, read[d] | items[d])],
            "cuts": [_cuts(stage, d, cuts[d]) for d in domains if stage.config.prepare.split == "temporal"],
        },
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


def _check_read(stage: StageRun, read: Totals) -> None:
    for domain, counts in read.items():
        if not counts["rows"]:
            name = stage.config.prepare.domains[domain].name
            raise DataError(f"domain '{name}' has no interactions", remedy="Check the files in prepare.domains")
        if stage.config.prepare.split == "temporal" and counts.get("in_order"):
            raise DataError(
                f"domain '{_name(stage, domain)}' has ready sequences, which tell no times to cut at",
                remedy="Set prepare.split=leave_two_out",
            )


def _check_chosen(stage: StageRun, chosen: Totals) -> None:
    prepare = stage.config.prepare
    for domain, counts in chosen.items():
        if not counts["kept_rows"]:
            raise DataError(
                f"the filter leaves nothing of domain '{prepare.domains[domain].name}' with min_user_interactions "
                f"{prepare.min_user_interactions} and min_item_interactions {prepare.min_item_interactions}",
                remedy="Lower prepare.min_user_interactions or prepare.min_item_interactions",
            )


def _steps(stage: StageRun, domain: int, found: Counts, kept: Counts) -> Iterator[Metrics]:
    """Rows, users and items after each step."""
    sizes = {"read": (found["rows"], found["users"], found["items"])}
    if stage.config.prepare.min_rating is not None:
        sizes["rated"] = (found["rated"], found["rated_users"], found["rated_items"])
    sizes["unique"] = (found["unique"], found["rated_users"], found["rated_items"])
    sizes["filtered"] = (found["filtered_rows"], found["filtered_users"], found["filtered_items"])
    sizes["kept"] = (kept["rows"], kept["users"], found["kept_items"])
    for step, (rows, users, items) in sizes.items():
        yield {"domain": _name(stage, domain), "step": step, "rows": rows, "users": users, "items": items}


def _account(stage: StageRun, domain: int, found: Counts) -> Metrics:
    """Where every interaction of the files went; it stands in the manifest.

    Raises:
        AssertionError: some are unaccounted for.
    """
    account = {
        "lines": found["rows"] + found.get("rejects", 0),
        "rejects": found.get("rejects", 0),
        "read": found["rows"],
        "below_rating": found["rows"] - found["rated"],
        "duplicates": found["rated"] - found["unique"],
        "filtered": found["unique"] - found["filtered_rows"],
        "sampled_out": found["filtered_rows"] - found["kept_rows"],
        "written": preparation.written(stage, domain),
    }
    out = sum(account[name] for name in ("below_rating", "duplicates", "filtered", "sampled_out", "written"))
    assert account["read"] == out and min(account.values()) >= 0, f"{_name(stage, domain)}: rows were lost: {account}"
    return {"domain": _name(stage, domain), **account}


def _mended(stage: StageRun, domain: int, counts: Counts) -> Iterator[Metrics]:
    for what, rows in sorted(counts.items()):
        if what.startswith("mended "):
            yield {"domain": _name(stage, domain), "what": what.removeprefix("mended "), "rows": rows}


def _cuts(stage: StageRun, domain: int, cuts: tuple[int, int]) -> Metrics:
    return {"domain": _name(stage, domain), "validation_from": cuts[0], "test_from": cuts[1]}


def _name(stage: StageRun, domain: int) -> str:
    return stage.config.prepare.domains[domain].name


def _pairs(stage: StageRun, domains: Iterable[int]) -> list[Numbers]:
    return [(domain, partition) for domain in domains for partition in range(stage.config.prepare.partitions)]


def _on_ray(stage: StageRun, step: Step, numbers: Sequence[Numbers], cpus: float) -> Totals:
    """Runs a step on every tuple of numbers, as a Ray Data map.

    Args:
        cpus: logical CPUs of a task. A task of a step is busy all the time, and often on several threads.

    Raises:
        PulseError: as raised by the step.
    """
    totals: dict[int, Counter[str]] = {domain: Counter() for domain, *_ in numbers}
    rows = [{"numbers": list(entry)} for entry in numbers]
    if step is preparation.read_file:
        cpus = max(cpus, stage.config.prepare.read_cpus)
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    title, unit = STEPS[step.__name__]
    with (
        Bar(f"prepare: {title}", len(rows), unit, stage.config.cluster.log_interval_s) as bar,
        _file_progress(stage, step, numbers, bar),
    ):
        for row in data.map(_guarded, fn_args=(stage, step), num_cpus=cpus).iter_rows():
            if len(row["error"]):
                raise errors.from_values(row["error"])
            totals[row["domain"]].update(dict(zip(row["names"], row["values"], strict=True)))
            bar.advance(1)
    return {domain: dict(counts) for domain, counts in totals.items()}


@contextmanager
def _file_progress(stage: StageRun, step: Step, numbers: Sequence[Numbers], bar: Bar) -> Iterator[None]:
    """Shows how far files are downloaded and read: a single one may take many minutes."""
    if step is not preparation.read_file:
        yield
        return
    ended, guard = threading.Event(), ReportGuard(bar.title)
    started = time.monotonic()

    def show() -> None:
        read = preparation.published(stage, "read", numbers)
        if read:
            left_s = (time.monotonic() - started) * (1 - read) / read
            bar.advance(0, {"read": f"{read:.0%}", "left": f"{left_s:.0f} s"})
        elif downloaded := preparation.published(stage, "downloaded", numbers):
            bar.advance(0, {"downloaded": f"{downloaded:.0%}"})

    def watch() -> None:
        # An interval of 0 would keep a core busy.
        while not ended.wait(max(0.05, stage.config.cluster.report_interval_s)):
            guard.run(show)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def _guarded(row: dict[str, Any], stage: StageRun, step: Step) -> dict[str, Any]:
    numbers = [int(number) for number in row["numbers"]]
    outcome: dict[str, Any] = {"domain": numbers[0], "error": [], "names": [], "values": []}
    try:
        counts = step(stage, *numbers)
    except PulseError as error:
        return outcome | {"error": errors.to_values(error)}
    return outcome | {"names": list(counts), "values": list(counts.values())}
