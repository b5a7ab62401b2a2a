"""Writing over a whole table: shards go to a pool of actors with an engine each, and no failure is more than a shard's.

An engine that dies is started again, an actor that is gone is replaced, and the shards that it was writing are written
anew, each by itself: so the one that does the killing is found out. After `engine.max_shard_attempts` its examples are
rejected, and the run goes on until too many are.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pulse_ray import models
from pulse_ray.errors import GenerationError
from pulse_ray.generation.engine import Engine, Usage
from pulse_ray.progress import console
from pulse_ray.runtime import ShardOutput, run_shards
from pulse_ray.schema import Reject, table
from pulse_ray.workspace import Part, StageRun

GIVEN_UP = "shard failed"
KILLED = "the process that wrote it was killed"


class ShardWriter(Protocol):
    """A stage's work inside an actor: built once in each with the arguments given to `generate`, called once a part."""

    engine: Engine

    async def __call__(self, part: Part) -> ShardOutput: ...


def generate(
    stage: StageRun,
    parts: Sequence[Part],
    worker: Callable[..., ShardWriter],
    *args: Any,
    title: str,
    max_reject_fraction: float,
) -> dict[str, float]:
    """`runtime.run_shards` with the engine's pool, which outlives its engines and knows when to stop.

    Args:
        parts: parts of `examples` to write for; those that are committed already are left alone.
        worker: class of the actors' work; called with `*args`.
        title: what the progress line says.
        max_reject_fraction: largest share of the parts' examples that may be rejected.

    Returns:
        Of the parts made in this call: `tokens` written, `prompt_tokens` sent, and `cached_tokens` of those that the
        engines' prefix caches held.

    Raises:
        ArtifactError: a model does not resolve.
        GenerationError: an engine cannot start, or too many examples were rejected. What was committed stays.
    """
    settings = stage.config.engine
    models.resolve(settings.model)  # Here first, so that a wrong name is one clear error before any actor starts.
    for adapter in settings.adapters.values():
        models.resolve(adapter, models.ADAPTER)
    allowed = max_reject_fraction * sum(stage.input("examples").num_rows(part) for part in parts)
    todo = set(stage.todo(parts, stage.spec.outputs))  # Of which an attempt that was killed may have left rejects.
    before = sum(stage.rejects.num_rows(part) for part in stage.rejects.parts() if part not in todo)

    def follow(totals: Mapping[str, float], seconds: float) -> dict[str, str]:
        if before + totals.get("rejects", 0) > allowed:
            raise _too_many(stage, max_reject_fraction)
        return {
            f"{stage.spec.rows}/s": f"{totals[stage.spec.rows] / seconds:,.2f}",
            "tokens/s": f"{totals['tokens'] / seconds:,.0f}",
            "of prompts cached": f"{totals['cached_tokens'] / max(1, totals['prompt_tokens']):.0%}",
        }

    ledger = _ledger()
    figures = run_shards(
        stage,
        parts,
        _Persistent,
        stage,
        worker,
        args,
        ledger,
        pool=settings.pool,
        in_flight=settings.shards_in_flight,
        title=title,
        follow=follow,
    )
    if failed := ray.get(ledger.failed.remote()):
        console.print(f"attempts at parts that failed, as an engine died or was killed: {failed}")
    if sum(stage.rejected().values()) > allowed:
        raise _too_many(stage, max_reject_fraction)
    return {name: figures.get(name, 0) for name in ("tokens", "prompt_tokens", "cached_tokens")}


def _too_many(stage: StageRun, limit: float) -> GenerationError:
    rejected = stage.rejected()
    reasons = ", ".join(f"{count} {reason}" for reason, count in rejected.items())
    return GenerationError(
        f"stage '{stage.spec.name}' rejected {sum(rejected.values())} examples, more than {limit:.0%}: {reasons}",
        remedy=f"Look at {stage.rejects.path}; use a stronger engine.model, more sampling.attempts, "
        "or a higher max_reject_fraction, which keeps what is written",
    )


class Ledger:
    """Which shards were begun, and how those attempts failed. It ends with its driver: a new run is a new try."""

    def __init__(self) -> None:
        self._failures: dict[Part, list[str]] = defaultdict(list)

    def failures(self, part: Part) -> list[str]:
        """Why each earlier attempt came to nothing."""
        return self._failures[part]

    def begin(self, part: Part) -> None:
        """An attempt begins. Whoever is killed in it cannot say so any more, so that is what it is taken for."""
        self._failures[part].append(KILLED)

    def end(self, part: Part) -> None:
        """The attempt that began last was none of the failures."""
        self._failures[part].pop()

    def blame(self, part: Part, cause: str) -> None:
        """The attempt that began last failed of this."""
        self._failures[part][-1] = cause

    def failed(self) -> int:
        """Attempts that failed, at all shards."""
        return sum(map(len, self._failures.values()))


def _ledger() -> Any:
    """A ledger beside the driver, so that no other node's loss takes it along."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(Ledger).options(num_cpus=0, scheduling_strategy=here).remote()


class _Persistent:
    """Writes shards with a stage's worker, through its engine's deaths."""

    def __init__(self, stage: StageRun, worker: Callable[..., ShardWriter], args: Sequence[Any], ledger: Any) -> None:
        self.stage, self.ledger = stage, ledger
        self.worker = worker(*args)
        self.turns = Turns(stage.config.engine.shards_in_flight)
        self._told, self._started = Usage(), False

    async def __call__(self, part: Part) -> ShardOutput:
        while True:
            failures = await self.ledger.failures.remote(part)
            if len(failures) >= self.stage.config.engine.max_shard_attempts:
                return self._give_up(part, failures)
            async with self.turns.take(alone=bool(failures)):
                print(f"{part}: attempt {len(failures) + 1}", file=sys.stderr, flush=True)
                await self.ledger.begin.remote(part)
                try:
                    self.worker.engine.start()
                    self._started = True
                    output = await self.worker(part)
                except GenerationError as error:
                    # It died, or does not come up again; that it never ran is its settings' fault.
                    if not self._started:
                        raise
                    await self.ledger.blame.remote(part, error.message)
                    continue
                await self.ledger.end.remote(part)
            return self._with_usage(output)

    def _give_up(self, part: Part, failures: Sequence[str]) -> ShardOutput:
        detail = f"part {part}, {len(failures)} attempts: {'; '.join(dict.fromkeys(failures))}"
        keys = self.stage.input("examples").read(part, [self.stage.spec.key]).column(0).to_pylist()
        return self._with_usage(
            ShardOutput(
                tables={name: table(name, []) for name in self.stage.spec.outputs},
                examples=len(keys),
                rejects=[Reject(key=key, reason=GIVEN_UP, detail=detail) for key in keys],
                figures={"tokens": 0},
            )
        )

    def _with_usage(self, output: ShardOutput) -> ShardOutput:
        """With the prompt tokens since the last shard that told: shards share an engine, and its counts."""
        usage, told = self.worker.engine.usage, self._told
        self._told = dataclasses.replace(usage)
        figures = {
            **output.figures,
            "prompt_tokens": usage.prompt_tokens - told.prompt_tokens,
            "cached_tokens": usage.cached_tokens - told.cached_tokens,
            "rejects": len(output.rejects),
        }
        return dataclasses.replace(output, figures=figures)


class Turns:
    """Lets some work side by side, and one alone."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._free = asyncio.Semaphore(width)
        self._door = asyncio.Lock()

    @asynccontextmanager
    async def take(self, *, alone: bool) -> AsyncIterator[None]:
        """A turn beside others, or, once those are done, `alone`."""
        places = self._width if alone else 1
        async with self._door:  # One after another: two that each hold half of the places would wait for ever.
            for _ in range(places):
                await self._free.acquire()
        try:
            yield
        finally:
            for _ in range(places):
                self._free.release()
