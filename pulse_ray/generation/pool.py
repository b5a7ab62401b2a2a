"""Writing over a whole table: shards go to a pool of actors with an engine each; too many rejected examples stop it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from pulse_ray import models
from pulse_ray.errors import GenerationError
from pulse_ray.runtime import ShardWorker, run_shards
from pulse_ray.workspace import Part, StageRun


def generate(
    stage: StageRun,
    parts: Sequence[Part],
    worker: Callable[..., ShardWorker],
    *args: Any,
    title: str,
    max_reject_fraction: float,
) -> dict[str, float]:
    """`runtime.run_shards` with the engine's pool, and a check that not too many examples were rejected.

    Args:
        parts: parts of `examples` to write for; those that are committed already are left alone.
        worker: class of the actors' work; called with `*args`.
        title: what the progress line says.
        max_reject_fraction: largest share of the parts' examples that may be rejected.

    Returns:
        The workers' figures added up, over the parts made in this call.

    Raises:
        ArtifactError: the model does not resolve.
        GenerationError: an engine failed, or too many examples were rejected. What was committed stays.
    """
    engine = stage.config.engine
    models.resolve(engine.model)  # Here first, so that a wrong name is one clear error before any actor starts.
    figures = run_shards(stage, parts, worker, *args, pool=engine.pool, in_flight=engine.shards_in_flight, title=title)
    rejected = stage.rejected()
    examples = sum(stage.input("examples").num_rows(part) for part in parts)
    if sum(rejected.values()) > max_reject_fraction * examples:
        reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
        raise GenerationError(
            f"stage '{stage.spec.name}' rejected {sum(rejected.values())} of {examples} examples ({reasons}), "
            f"more than {max_reject_fraction:.0%}",
            remedy=f"Look at {stage.rejects.path}; use a stronger engine.model, more sampling.attempts, "
            "or a higher max_reject_fraction, which keeps what is written",
        )
    return figures
