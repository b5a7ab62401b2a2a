"""The stages in order: what each reads and writes, what is complete, and how they are run."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from pulse_ray import templates
from pulse_ray.config import Config
from pulse_ray.data.files import identity
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.ranker.prompts import TEMPLATE_SHA as RANKER_SHA
from pulse_ray.workspace import Condition, StageRun, StageSpec, Workspace


def _tree_inputs(config: Config) -> tuple[str, ...]:
    """A beam compares thoughts in the Thought Space."""
    return ("encoders",) if config.tree.beam_width is not None else ()


def _select_inputs(config: Config) -> tuple[str, ...]:
    return ("encoders",) if "thought_space" in config.select.selectors else ()


STAGES: dict[str, tuple[StageSpec, str]] = {
    spec.name: (spec, module)
    for spec, module in (
        (
            StageSpec(
                name="prepare",
                summary="read, clean, filter, order and split interactions",
                settings=("seed", "prepare"),
                inputs=(),
                outputs=("interactions", "items", "examples"),
                begins_itself=True,
            ),
            "pulse_ray.data.stage",
        ),
        (
            StageSpec(
                name="candidates",
                summary="train SASRec, draw candidate sets, find similar users",
                settings=("seed", "candidates"),
                inputs=("interactions", "items", "examples"),
                outputs=("sasrec", "item_vectors", "user_states", "user_index", "neighbours", "candidates"),
            ),
            "pulse_ray.candidates.stage",
        ),
        (
            StageSpec(
                name="rationales",
                summary="Phase I: write why users chose their targets (training examples only)",
                settings=("seed", "engine", "rationales"),
                inputs=("items", "examples"),
                outputs=("rationales",),
            ),
            "pulse_ray.rationales.stage",
        ),
        (
            StageSpec(
                name="thought-space",
                summary="Phase I: train rationale and history encoders by InfoNCE",
                settings=("seed", "thought_space"),
                inputs=("items", "examples", "rationales"),
                outputs=("encoders",),
            ),
            "pulse_ray.thought_space.stage",
        ),
        (
            StageSpec(
                name="tree",
                summary="grow a tree of thoughts for every history",
                settings=("seed", "engine", "tree"),
                inputs=("items", "examples", "neighbours"),
                inputs_for=_tree_inputs,
                outputs=("thoughts",),
            ),
            "pulse_ray.tree.stage",
        ),
        (
            StageSpec(
                name="select",
                summary="choose the best leaf of every tree",
                # What selectors without trained encoders read of the Thought Space's settings.
                settings=("seed", "select", "thought_space.model", "thought_space.max_tokens", "thought_space.text"),
                inputs=("items", "examples", "thoughts"),
                inputs_for=_select_inputs,
                outputs=("reasons",),
            ),
            "pulse_ray.selection.stage",
        ),
        (
            StageSpec(
                name="ranker",
                summary="Phase II: train a LoRA ranker for each variant",
                settings=("seed", "ranker"),
                inputs=("items", "examples", "candidates", "reasons"),
                outputs=("ranker",),
                constants=(RANKER_SHA,),
            ),
            "pulse_ray.ranker.stage",
        ),
        (
            StageSpec(
                name="evaluate",
                summary="score held-out examples; metrics and report",
                settings=("seed", "evaluate"),
                inputs=(
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
                ),
                outputs=("evaluation", "scores"),
                constants=(RANKER_SHA,),
            ),
            "pulse_ray.evaluation.stage",
        ),
    )
}


@dataclass(frozen=True, kw_only=True)
class Done:
    """How a stage ended: `ran` is False where it was complete before."""

    stage: str
    ran: bool
    seconds: float


def plan(config: Config) -> dict[str, StageRun]:
    """Every stage bound to the configuration's workspace, with the fingerprint that its outputs must carry."""
    workspace = Workspace(config.storage, config.name)
    made_by: dict[str, str] = {}
    runs: dict[str, StageRun] = {}
    for name, (spec, _) in STAGES.items():
        inputs = {artefact: made_by[artefact] for artefact in (*spec.inputs, *spec.inputs_for(config))}
        outside = [identity(domain) for domain in config.prepare.domains] if name == "prepare" else []
        outside += [templates.sha(stage, version) for stage, version in config.templates.items() if name == stage]
        fingerprint = config.fingerprint(spec.settings, [*inputs.values(), *spec.constants, *outside])
        made_by |= dict.fromkeys(spec.outputs, fingerprint)
        runs[name] = StageRun(
            workspace=workspace, config=config, spec=spec, fingerprint=fingerprint, input_fingerprints=inputs
        )
    return runs


def conditions(config: Config) -> dict[str, Condition]:
    """Whether each stage is complete, stale, partial or missing."""
    return {name: run.condition() for name, run in plan(config).items()}


def execute(config: Config, stages: Sequence[str] | None = None) -> Iterator[Done]:
    """Runs stages in order and yields as each ends; a stage that is complete is skipped.

    Args:
        stages: which; unset means all. The inputs of those must be complete.

    Raises:
        ConfigError: there is no stage of that name.
        ArtifactError: a stage's input is not complete.
        PulseError: as raised by a stage.
    """
    runs = plan(config)
    wanted = list(runs) if stages is None else list(stages)
    for name in wanted:
        if name not in runs:
            raise ConfigError(f"no stage '{name}'", remedy=f"Stages are {', '.join(runs)}")
    pending = [name for name in wanted if runs[name].condition() != "complete"]
    if pending:
        runs[pending[0]].workspace.claim()
        check_inputs(runs[pending[0]], runs)  # Before Ray starts, which takes seconds.
    with ExitStack() as stack:
        for name in wanted:
            if name not in pending:
                yield Done(stage=name, ran=False, seconds=0.0)
                continue
            if name == pending[0]:
                from pulse_ray import runtime  # Ray takes seconds to import; a finished run needs none of it.

                stack.enter_context(runtime.cluster(config.cluster))
                for later in pending:
                    runtime.check_resources(config, runs[later].spec.settings)
            run = runs[name]
            check_inputs(run, runs)
            started = time.monotonic()
            if not run.spec.begins_itself:
                run.begin()
            try:
                metrics = importlib.import_module(STAGES[name][1]).run(run)
            except BaseException:
                run.pause(time.monotonic() - started)
                raise
            seconds = time.monotonic() - started
            run.complete(seconds, metrics)
            yield Done(stage=name, ran=True, seconds=seconds)


def check_inputs(run: StageRun, runs: Mapping[str, StageRun]) -> None:
    """Whether what a stage reads is there, made from today's settings.

    Args:
        runs: the plan that makes it.

    Raises:
        ArtifactError: naming the first artefact that is not, and what makes it.
    """
    for artefact, fingerprint in run.input_fingerprints.items():
        manifest = run.input(artefact).manifest()
        if manifest is None or manifest.fingerprint != fingerprint:
            maker = next(name for name, other in runs.items() if artefact in other.spec.outputs)
            condition = "missing" if manifest is None else "stale"
            raise ArtifactError(
                f"stage '{run.spec.name}' needs '{artefact}', which is {condition}",
                remedy=f"Run stage '{maker}' first, or the whole pipeline with `pulse-ray run`",
            )
