"""What a workspace holds, what a run would do and what came out of it, as tables for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel
from rich.table import Table

from pulse_ray.config import OPERATIONAL, Config
from pulse_ray.errors import ArtifactError
from pulse_ray.pipeline import plan
from pulse_ray.workspace import Condition, StageRun, Workspace

METRICS, REPORT = "metrics.json", "report.html"
COLOURS: dict[Condition, str] = {"complete": "green", "partial": "yellow", "stale": "magenta", "missing": "dim"}


def status_table(config: Config) -> Table:
    """Each stage's condition and what its manifests tell: rows, rejects, seconds, tokens.

    A stage that is not complete shows what lies there: parts made so far, or rows made under other settings.
    """
    table = Table(title=f"{config.name} in {config.storage}", title_justify="left")
    for name in ("stage", "condition", "outputs"):
        table.add_column(name)
    for name in ("rejects", "seconds", "tokens"):
        table.add_column(name, justify="right")
    for name, run in plan(config).items():
        condition = run.condition()
        found = [manifest for output in run.spec.outputs if (manifest := run.output(output).manifest())]
        outputs = [_size(run, output) for output in run.spec.outputs]
        figures = (sum(found[0].rejects.values()), found[0].seconds, sum(m.tokens for m in found)) if found else ()
        table.add_row(
            name,
            f"[{COLOURS[condition]}]{condition}[/]",
            ", ".join(filter(None, outputs)),
            *(f"{figure:,.0f}" for figure in figures),
        )
    return table


def plan_table(config: Config, stages: Sequence[str]) -> Table:
    """Which of `stages` would run, and why."""
    table = Table(title=f"Plan for {config.name} in {config.storage}", title_justify="left")
    for name in ("stage", "runs", "why"):
        table.add_column(name)
    runs = plan(config)
    ahead: set[str] = set()
    for name in stages:
        run = runs[name]
        condition = run.condition()
        why = _why(run, condition)
        if condition != "complete" and (lacking := [n for n in _lacking(run) if n not in ahead]):
            why = f"cannot: {', '.join(lacking)} must be made first"
        ahead.update(run.spec.outputs)
        table.add_row(name, "no" if condition == "complete" else "yes", why)
    return table


def steps_table(config: Config) -> Table | None:
    """How many rows, users and items `prepare` kept at each step, and what became of the others."""
    manifest = plan(config)["prepare"].output("interactions").manifest()
    if manifest is None:
        return None
    table = Table(title="Prepared", title_justify="left")
    for name in ("domain", "step"):
        table.add_column(name)
    for name in ("rows", "users", "items"):
        table.add_column(name, justify="right")
    table.add_column("of the rows before")
    accounts = {account["domain"]: account for account in manifest.metrics["accounting"]}
    left_by = {"rated": "below_rating", "unique": "duplicates", "filtered": "filtered", "kept": "sampled_out"}
    for step in manifest.metrics["steps"]:
        account = accounts[step["domain"]]
        name = "rejects" if step["step"] == "read" else left_by[step["step"]]
        gone = f"{account[name]:,} {name.replace('_', ' ')}" if account[name] else ""
        counts = (f"{step[key]:,}" for key in ("rows", "users", "items"))
        table.add_row(step["domain"], step["step"], *counts, gone)
    items = plan(config)["prepare"].output("items").manifest()
    if items is not None:
        what = {"made_titles": "items without a readable title", "without_text": "items that are but an id"}
        for key, title in what.items():
            if count := items.metrics[key]:
                table.add_row("", title, "", "", f"{count:,}")
    for entry in manifest.metrics["mended"]:
        table.add_row(entry["domain"], f"mended: {entry['what']}", f"{entry['rows']:,}")
    return table


def metrics_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """`evaluation/metrics.json` as a table; HR@1 with its 95 % interval. `among`: how many items were ranked."""
    table = Table(title="Metrics", title_justify="left")
    for name in ("model", "protocol", "domain", "split"):
        table.add_column(name)
    for name in ("among", "n", "HR@1 [95 %]", "HR@3", "HR@5", "NDCG@10", "MRR"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["model"],
            "oracle (sees the label)" if row["protocol"] == "oracle" else row["protocol"],
            row["domain"],
            row["split"],
            f"{row['candidates']:,}",
            f"{row['n']:,}",
            rf"{row['hr@1']:.3f} \[{row['hr@1_low']:.3f}, {row['hr@1_high']:.3f}]",
            *(f"{row[name]:.3f}" for name in ("hr@3", "hr@5", "ndcg@10", "mrr")),
        )
    return table


def metrics(config: Config) -> list[dict[str, Any]]:
    """The rows of the run's `evaluation/metrics.json`.

    Raises:
        ArtifactError: there is none.
    """
    content = Workspace(config.storage, config.name).artefact("evaluation").read_bytes(METRICS)
    if content is None:
        raise ArtifactError(f"{config.name} has no evaluation/{METRICS}", remedy="Run stage `evaluate`")
    rows: list[dict[str, Any]] = json.loads(content)
    return rows


def report_address(config: Config) -> str:
    """Where the report lies: a path, or a URI where the storage is one."""
    if "://" in config.storage:
        return f"{config.storage.rstrip('/')}/{config.name}/evaluation/{REPORT}"
    return f"{Workspace(config.storage, config.name).path}/evaluation/{REPORT}"


def _size(run: StageRun, name: str) -> str:
    output = run.output(name)
    manifest = output.manifest()
    if manifest is None:
        parts = len(output.parts())
        return f"{name} {parts:,} parts" if parts else ""
    return f"{name} {manifest.rows:,} rows" if manifest.columns else f"{name} {manifest.bytes / 2**20:,.1f} MiB"


def _why(run: StageRun, condition: Condition) -> str:
    if condition == "complete":
        return "complete"
    if condition == "missing":
        return "never ran"
    if condition == "partial":
        return f"was interrupted; {len(run.output(run.spec.outputs[-1]).parts())} finished parts stay"
    manifest = next((m for name in run.spec.outputs if (m := run.output(name).manifest())), None)
    if manifest is None:
        return "was interrupted under other settings"
    new = run.config.resolved(run.spec.settings)
    keys = [key for key in _differences(manifest.settings, new) if _shapes(key)]
    if keys:
        return f"changed: {', '.join(keys[:3])}" + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
    inputs = [name for name, mark in run.input_fingerprints.items() if manifest.inputs.get(name) != mark]
    return f"made from an earlier {', '.join(inputs)}" if inputs else "its prompts or source files changed"


def _lacking(run: StageRun) -> list[str]:
    """Inputs that are not there as the stage needs them."""
    manifests = {name: run.input(name).manifest() for name in run.inputs}
    return [name for name, m in manifests.items() if m is None or m.fingerprint != run.input_fingerprints[name]]


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    """Dotted keys whose values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted({*old, *new}):
            yield from _differences(old.get(name), new.get(name), f"{key}.{name}".lstrip("."))
    elif old != new:
        yield key


def _shapes(key: str) -> bool:
    """Whether a setting shapes the output; operational ones do not."""
    kind: Any = Config
    for name in key.split("."):
        if not (isinstance(kind, type) and issubclass(kind, BaseModel)) or name not in kind.model_fields:
            break
        if OPERATIONAL in kind.model_fields[name].metadata:
            return False
        kind = kind.model_fields[name].annotation
    return True
