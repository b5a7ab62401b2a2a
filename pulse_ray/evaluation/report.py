"""`report.html`: one file with everything a reader needs to judge a run, in light and dark, without assets beside it.

`collect` reads what the run left in its workspace into a `Page`; `render` turns a `Page` into HTML. Text from reviews,
items and models is escaped by the template.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup
from safetensors.numpy import load

from pulse_ray import metrics, seeding
from pulse_ray.config import BY_BEHAVIOUR, Selector
from pulse_ray.evaluation import cases, plots
from pulse_ray.evaluation.cases import Case
from pulse_ray.evaluation.protocol import MetricRow, Protocol, best, main_variant, protocol_of
from pulse_ray.workspace import Artefact, Manifest, StageRun

SELECTORS: dict[Selector, str] = {
    "log_likelihood": "log-likelihood",
    "random": "random leaf",
    "sbert": "SBERT",
    "encoder_base": "untrained encoder",
    "thought_space": "Thought Space",
}
"""What readers see for a selector's name."""

LABELS: dict[str, str] = {
    "popularity": "Popularity",
    "sasrec": "SASRec",
    "none": "Ranker, no reason",
    "base": "Ranker, base reason",
    **{name: f"Ranker, tree + {title}" for name, title in SELECTORS.items()},
}
"""What readers see for a model's name."""


MEASURES = {
    "r@1": "R@1 among {retrieval_pool}, rationale → behaviour",
    "r@1_history_only": "R@1 among {retrieval_pool}, rationale → history without the target",
    "loss": "Contrastive loss",
}
"""What readers see for a measure of the Thought Space, filled in from the encoders' metrics."""


@dataclass(frozen=True, kw_only=True)
class Group:
    """The models' results on one domain's split."""

    domain: str
    split: str
    candidates: int
    n: int
    rows: tuple[MetricRow, ...]
    catalogue: tuple[MetricRow, ...]
    """Results of the models that ranked all items of the domain; not to be compared with `rows`."""
    main: MetricRow
    """The row that the report speaks of first."""
    best: Mapping[str, float | None]
    """Best value by metric, among models that do not see the label."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """How one model was trained."""

    title: str
    protocol: Protocol
    best_step: int
    steps: int
    plot: Markup


@dataclass(frozen=True, kw_only=True)
class Projection:
    """The Thought Space of `examples` held-out examples, and what was measured of it."""

    before: Markup
    after: Markup
    examples: int


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """A measure of the Thought Space on held-out rationales, before and after training."""

    title: str
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Generation:
    """What a language model wrote. `rejects` counts by reason."""

    title: str
    rows: int
    tokens: int
    seconds: float
    rejects: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What a stage made and how long it took, in seconds."""

    stage: str
    outputs: Sequence[Manifest]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Page:
    """All that the report shows."""

    name: str
    created: str
    fingerprint: str
    protocol: Protocol
    seed: int
    engine: str
    ranker: str
    groups: Sequence[Group]
    set_aside: int
    """Examples that had no candidates."""
    dataset: Sequence[Mapping[str, Any]]
    """What each step of the preparation left, by domain: `domain`, `step`, `rows`, `users`, `items`."""
    examples: Mapping[str, int]
    """Examples by split."""
    curves: Sequence[Curve]
    projection: Projection | None
    """None where too few rationales were held out to draw any."""
    retrieval: Sequence[Retrieval]
    cases: Sequence[Case]
    generation: Sequence[Generation]
    timings: Sequence[Timing]
    versions: Mapping[str, str]
    config: str


def collect(stage: StageRun, rows: Sequence[MetricRow], *, seconds: float) -> Page:
    """Reads what the report shows.

    Args:
        stage: the `evaluate` stage, whose scores are written.
        rows: the content of `metrics.json`.
        seconds: time that this stage took so far.

    Raises:
        ArtifactError: something that the report reads is damaged.
    """
    config = stage.config
    manifests = list(_manifests(stage))
    by_name = {manifest.artefact: manifest for manifest in manifests}
    return Page(
        name=config.name,
        created=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        fingerprint=stage.fingerprint,
        protocol=config.select.protocol,
        seed=config.seed,
        engine=config.engine.model,
        ranker=config.ranker.model,
        groups=_groups(rows, main_variant(config)),
        set_aside=sum(stage.rejected().values()),
        dataset=sorted(by_name["interactions"].metrics["steps"], key=lambda step: step["domain"]),
        examples=by_name["examples"].metrics,
        curves=list(_curves(stage)),
        projection=_projection(stage),
        retrieval=_retrieval(by_name["encoders"].metrics),
        cases=cases.collect(stage),
        generation=[
            Generation(
                title=title,
                rows=by_name[name].rows,
                tokens=by_name[name].tokens,
                seconds=by_name[name].seconds,
                rejects=by_name[name].rejects,
            )
            for name, title in (("rationales", "Rationales (Phase I)"), ("thoughts", "Trees of thoughts (Phase II)"))
        ],
        timings=_timings(manifests, stage, seconds),
        versions=by_name["ranker"].versions,
        config=config.to_json(),
    )


def render(page: Page) -> str:
    """The report as one HTML document."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["label"] = LABELS.__getitem__
    environment.filters["selector"] = lambda name: SELECTORS.get(name, name)
    environment.tests["by_behaviour"] = BY_BEHAVIOUR.__contains__
    template = environment.from_string(files("pulse_ray.evaluation").joinpath("report.html").read_text("utf-8"))
    return template.render(page=page, metrics=list(metrics.GAINS))


def _groups(rows: Sequence[MetricRow], main: str) -> list[Group]:
    grouped: dict[tuple[str, str], list[MetricRow]] = {}
    for row in rows:
        grouped.setdefault((row.domain, row.split), []).append(row)
    return [_group(found, main) for found in grouped.values()]


def _group(rows: Sequence[MetricRow], main: str) -> Group:
    stored = tuple(row for row in rows if not row.catalogue)
    return Group(
        domain=stored[0].domain,
        split=stored[0].split,
        candidates=stored[0].candidates,
        n=stored[0].n,
        rows=stored,
        catalogue=tuple(row for row in rows if row.catalogue),
        main=next(row for row in stored if row.model == main),
        best={metric: best(stored, metric) for metric in metrics.GAINS},
    )


def _curves(stage: StageRun) -> Iterator[Curve]:
    trained = [("SASRec", "", "sasrec", ""), ("Thought Space encoders", "", "encoders", "")]
    trained += [(LABELS[variant], variant, "ranker", f"{variant}/") for variant in stage.config.ranker.variants]
    for title, variant, artefact, folder in trained:
        record = json.loads(_content(stage.input(artefact), f"{folder}training.json"))
        yield Curve(
            title=title,
            protocol=protocol_of(variant, stage.config) if variant else "deployable",
            best_step=record["best_step"],
            steps=record["evaluations"][-1]["step"],
            plot=plots.training_curves(record, name=title),
        )


def _projection(stage: StageRun) -> Projection | None:
    content = stage.input("encoders").read_bytes("projection.safetensors")
    if content is None:
        return None
    vectors = load(content)
    seed = seeding.derive(stage.config.seed, "projection")
    return Projection(
        before=plots.thought_space(vectors, "before", seed=seed),
        after=plots.thought_space(vectors, "after", seed=seed),
        examples=len(vectors["before_behaviour"]),
    )


def _retrieval(measured: Mapping[str, Any]) -> list[Retrieval]:
    """Every measure that was taken both before and after training."""
    names = [key.removesuffix("_before") for key in measured if key.endswith("_before")]
    return [
        Retrieval(
            title=MEASURES.get(name, name.replace("_", " ")).format(**measured),
            before=measured[f"{name}_before"],
            after=measured[f"{name}_after"],
        )
        for name in names
    ]


def _content(artefact: Artefact, name: str) -> bytes:
    content = artefact.read_bytes(name)
    assert content is not None, f"{artefact.name} is complete but has no {name}"
    return content


def _manifests(stage: StageRun) -> Iterator[Manifest]:
    for name in stage.inputs:
        manifest = stage.input(name).manifest()
        assert manifest is not None, f"stage {stage.spec.name} runs without {name}"
        yield manifest


def _timings(manifests: Sequence[Manifest], stage: StageRun, seconds: float) -> list[Timing]:
    """In the order of the stages, this one last: its manifests are written after the report."""
    by_stage: dict[str, list[Manifest]] = {}
    for manifest in sorted(manifests, key=lambda manifest: manifest.created):
        by_stage.setdefault(manifest.stage, []).append(manifest)
    made = [Timing(stage=name, outputs=found, seconds=found[0].seconds) for name, found in by_stage.items()]
    return [*made, Timing(stage=stage.spec.name, outputs=(), seconds=seconds)]
