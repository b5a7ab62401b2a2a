"""Ray's start-up, and the one way in which stages work on parts: a pool of actors that commits each part by itself.

`run_shards` sends part names through Ray Data to an autoscaling pool of actors. An actor reads the part of each input,
makes the part of each output and commits it by rename. Only names and counts pass through the driver. A part that is
committed is never made again, so a job that was killed loses at most the parts that were in flight.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import ray
import ray.data
from pydantic import BaseModel

from pulse_ray.config import ClusterConfig, Config, PoolConfig, WorkersConfig
from pulse_ray.errors import ArtifactError, ConfigError, PulseError, from_values, to_values
from pulse_ray.progress import Bar
from pulse_ray.schema import Reject
from pulse_ray.workspace import Part, StageRun

DEFAULT_LOGICAL_CPUS = 4
"""Least number of logical CPUs of a local Ray: with fewer, a training worker starves the data tasks beside it."""

PARTS_AT_ONCE = 10_000
"""Parts that Ray Data is handed at once. It spends about a millisecond on each before the first one starts, and some
KiB of the driver's memory; the actors start anew for the next so many."""

WORKER_ENVIRONMENT = {
    # Ray would hide GPUs from an actor that asks for none; vLLM and DeepSpeed decide for themselves.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Threads that wait spin only briefly: several processes share the cores.
    "GOMP_SPINCOUNT": "20000",
    # Ray Train's controller looks after its workers so often, and a report waits for its next look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
"""What the processes of a run need in their environment on any machine. What the driver's environment says comes first:
there a cluster, or a job, sets them its own way."""


def _address(config: ClusterConfig) -> str | None:
    """Of the cluster to connect to; None starts a local one."""
    return config.address or os.environ.get("RAY_ADDRESS")


@contextmanager
def cluster(config: ClusterConfig) -> Iterator[None]:
    """Connects to the configured Ray cluster, or starts a local one and ends it afterwards.

    A Ray that the process is already connected to is used as it is, and left running. `RAY_ADDRESS`, which Ray sets for
    the entry point of a job, counts like a configured address.

    Raises:
        ArtifactError: there is no cluster at the configured address.
    """
    if ray.is_initialized():
        yield
        return
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    address = _address(config)
    if address is None:
        _prepare_environment()
        settings |= {
            "address": "local",
            "num_cpus": config.num_cpus or max(DEFAULT_LOGICAL_CPUS, os.cpu_count() or 1),
            "object_store_memory": config.object_store_mb * 2**20,
            "include_dashboard": False,
        }
    else:
        lacking = {name: value for name, value in WORKER_ENVIRONMENT.items() if name not in os.environ}
        settings |= {"address": address, "runtime_env": {"env_vars": lacking}}
    try:
        ray.init(**settings)
    except (ConnectionError, ValueError) as error:
        raise ArtifactError(
            f"no Ray cluster at '{address}'",
            remedy="Start one with `ray start --head`, or unset cluster.address and RAY_ADDRESS",
        ) from error
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # It warns that bars are off.
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()


def check_resources(config: Config, sections: Iterable[str]) -> None:
    """Whether a local Ray has what the pools and workers of some sections ask for: without it they would wait for ever.

    A cluster at an address is not looked at: it may grow.

    Args:
        sections: keys of settings, e.g. `tree` or `candidates.pool`.

    Raises:
        ConfigError: naming the first setting that asks for more.
    """
    if config.cluster.address is not None:
        return
    total = ray.cluster_resources()
    for key, setting in (entry for name in sections for entry in _demands(name, attrgetter(name)(config))):
        count = setting.min if isinstance(setting, PoolConfig) else setting.count
        for resource, share in (("CPU", setting.cpus), ("GPU", setting.gpus)):
            if count * share > total.get(resource, 0):
                raise ConfigError(
                    f"{key} asks for {count * share:g} {resource}s; Ray has {total.get(resource, 0):g} on this machine",
                    remedy=f"Lower {key}, or set cluster.address to a cluster that has them",
                )


def _demands(key: str, value: Any) -> Iterator[tuple[str, PoolConfig | WorkersConfig]]:
    """Pools and workers anywhere in a section, with their keys."""
    if isinstance(value, PoolConfig | WorkersConfig):
        yield key, value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _demands(f"{key}.{name}", getattr(value, name))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def core_cpus(config: ClusterConfig) -> float:
    """Logical CPUs that stand for one core: a local Ray may have more of them than the machine has cores."""
    return 1.0 if _address(config) is not None else max(1.0, ray.cluster_resources().get("CPU", 1.0) / _cores())


def _shared_cores(config: ClusterConfig, actors: int) -> dict[str, Any]:
    """Ray's options for actors that work at once: on a local Ray each gets its share of this machine's cores.

    Threads beyond the cores wait for each other at the end of every product. On a cluster, Ray gives an actor as many
    threads as it takes CPUs, and a number that the environment asks for stays.
    """
    if _address(config) is not None or actors == 1 or os.environ.get("OMP_NUM_THREADS") != str(_cores()):
        return {}
    return {"runtime_env": {"env_vars": {"OMP_NUM_THREADS": str(max(1, _cores() // actors))}}}


def _prepare_environment() -> None:
    """Variables that a local Ray hands down to its workers."""
    for name, value in WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # Ray would give every actor as many threads as it takes logical CPUs; a small machine has one busy actor at a time.
    # Where it has more, `run_shards` divides the cores among them.
    os.environ.setdefault("OMP_NUM_THREADS", str(_cores()))
    cpu = Path("/proc/cpuinfo")
    flags = cpu.read_text().partition("flags")[2].partition("\n")[0].split() if cpu.exists() else []
    if "avx2" in flags and "avx512f" not in flags:
        # MKL takes its slowest path on AMD processors unless it is told what they can do: 63 against 142 GFLOP/s.
        os.environ.setdefault("MKL_ENABLE_INSTRUCTIONS", "AVX2")


@dataclass(frozen=True, kw_only=True)
class ShardOutput:
    """What a worker made of one part.

    `tables` holds one table for each output that `run_shards` makes, all keyed by the stage's `key`, as `rejects` are.
    `examples` is the number of rows that the worker was given. Every one of them must be in each table or among the
    rejects. `figures` are added up over parts and shown as progress, e.g. `{"tokens": 4096}`.
    """

    tables: Mapping[str, pa.Table]
    examples: int
    rejects: Sequence[Reject] = ()
    figures: Mapping[str, float] = field(default_factory=dict)


class ShardWorker(Protocol):
    """An actor's work: built once in each actor with the arguments given to `run_shards`, called once a part."""

    def __call__(self, part: Part) -> ShardOutput | Awaitable[ShardOutput]: ...


class PartWorker(Protocol):
    """An actor's work for `map_parts`: built once in each actor, called once a part. Its answer must fit into JSON."""

    def __call__(self, part: Part, /) -> Any: ...


Follow = Callable[[Mapping[str, float], float], Mapping[str, str]]
"""What the progress line shows beside parts, of the workers' figures added up and the seconds so far. It may raise."""


def rates(totals: Mapping[str, float], seconds: float) -> dict[str, str]:
    """Every figure by the second."""
    return {f"{name}/s": f"{value / seconds:,.1f}" for name, value in totals.items()}


def run_shards(
    stage: StageRun,
    parts: Sequence[Part],
    worker: Callable[..., ShardWorker],
    *args: Any,
    pool: PoolConfig,
    outputs: Sequence[str] | None = None,
    in_flight: int = 1,
    title: str,
    follow: Follow = rates,
    parts_at_once: int = PARTS_AT_ONCE,
) -> dict[str, float]:
    """Makes the parts that the stage's outputs lack.

    Args:
        parts: names of all parts; those that are committed already are left alone.
        worker: class of the actors' work; called with `*args`.
        pool: how many actors, and what each takes of the cluster.
        outputs: what the worker makes; unset means every output. A stage that also writes folders names its tables.
        in_flight: parts that one actor works on at once (for workers whose call is async).
        title: what the progress line says.
        follow: is called after each part.
        parts_at_once: most parts that Ray Data is handed in one dataset.

    Returns:
        The workers' figures added up, over the parts made in this call.

    Raises:
        PulseError: as raised by a worker, or by `follow`.
    """
    outputs = stage.spec.outputs if outputs is None else tuple(outputs)
    todo = stage.todo(parts, outputs)
    totals: Counter[str] = Counter()
    if not todo:
        return {}
    started = time.monotonic()
    with Bar(title, len(parts), "parts", stage.config.cluster.log_interval_s) as bar:
        bar.skip(len(parts) - len(todo))
        for start in range(0, len(todo), parts_at_once):
            chunk, committer = todo[start : start + parts_at_once], (stage, outputs, worker, args)
            made = _through_pool(chunk, _Committer, committer, stage.config.cluster, pool, in_flight)
            for row in made.iter_rows():
                if row["error"] is not None:
                    raise from_values(row["error"])
                totals.update(dict(zip(row["names"], row["values"], strict=True)))
                bar.advance(1, follow(totals, time.monotonic() - started))
    return dict(totals)


def map_parts(
    stage: StageRun,
    parts: Sequence[Part],
    worker: Callable[..., PartWorker],
    *args: Any,
    pool: PoolConfig,
    title: str,
    parts_at_once: int = PARTS_AT_ONCE,
) -> Iterator[Any]:
    """What a pool's actors say of each part, in the order in which they are done with them.

    For work that commits nothing, or for itself.

    Args:
        parts: names that the actors are called with.
        worker: class of the actors' work; called with `*args`.
        pool: how many actors, and what each takes of the cluster.
        title: what the progress line says.
        parts_at_once: as for `run_shards`.

    Raises:
        PulseError: as raised by a worker.
    """
    with Bar(title, len(parts), "parts", stage.config.cluster.log_interval_s) as bar:
        for start in range(0, len(parts), parts_at_once):
            chunk = parts[start : start + parts_at_once]
            for row in _through_pool(chunk, _Caller, (worker, args), stage.config.cluster, pool, 1).iter_rows():
                if row["error"] is not None:
                    raise from_values(row["error"])
                bar.advance()
                yield json.loads(row["answer"])


def _through_pool(
    parts: Sequence[Part],
    actor: Callable[..., Any],
    arguments: tuple[Any, ...],
    config: ClusterConfig,
    pool: PoolConfig,
    in_flight: int,
) -> ray.data.Dataset:
    """The parts through actors of the class `actor`. They start when the rows are asked for."""
    most = min(pool.max, len(parts))
    return ray.data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map(
        actor,
        fn_constructor_args=arguments,
        compute=ray.data.ActorPoolStrategy(
            min_size=min(pool.min, most),
            max_size=most,
            max_tasks_in_flight_per_actor=in_flight,
            max_concurrent_calls_per_actor=in_flight,
        ),
        num_cpus=pool.cpus,
        num_gpus=pool.gpus or None,
        **_shared_cores(config, most),
    )


class _Caller:
    """Calls a worker inside an actor and sends its answer as JSON."""

    def __init__(self, worker: Callable[..., PartWorker], args: Sequence[Any]) -> None:
        self.make_worker: Callable[[], PartWorker] = partial(worker, *args)
        self.worker: PartWorker | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            # Built here, as in `_Committer`.
            self.worker = self.worker or self.make_worker()
            return {"answer": json.dumps(self.worker(str(row["part"]))), "error": None}
        except PulseError as error:
            return {"answer": None, "error": to_values(error)}


class _Committer:
    """Runs a worker inside an actor, checks that no example was lost, and commits the parts that it made."""

    def __init__(
        self, stage: StageRun, outputs: Sequence[str], worker: Callable[..., ShardWorker], args: Sequence[Any]
    ) -> None:
        self.stage = stage
        self.outputs = outputs
        self.make_worker: Callable[[], ShardWorker] = partial(worker, *args)
        self.worker: ShardWorker | None = None

    async def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        part = str(row["part"])
        try:
            # Built here and not above: Ray would take an error in a constructor for a dead actor, and try again.
            self.worker = self.worker or self.make_worker()
            output = self.worker(part)
            if inspect.isawaitable(output):
                output = await output
            self._check(part, output)
            self.stage.reject(part, output.rejects)
            for name in self.outputs:
                self.stage.output(name).write(part, output.tables[name])
        except PulseError as error:
            return {"part": part, "error": to_values(error), "names": [], "values": []}
        figures = {self.stage.spec.rows: output.examples, **output.figures}
        return {"part": part, "error": None, "names": list(figures), "values": [float(v) for v in figures.values()]}

    def _check(self, part: Part, output: ShardOutput) -> None:
        rejected = {entry.key for entry in output.rejects}
        for name in self.outputs:
            kept = set(output.tables[name].column(self.stage.spec.key).to_pylist())
            assert not kept & rejected, f"{self.stage.spec.name}/{part}: a row is both in {name} and rejected"
            assert len(kept) + len(rejected) == output.examples, (
                f"{self.stage.spec.name}/{part}: {output.examples} {self.stage.spec.rows} in, {len(kept)} in {name}, "
                f"{len(rejected)} rejected"
            )
