"""The Ray Serve application: ingress, retriever, ranker and, where it is switched on, reasoner.

Each deployment is a thin shell around a plain class, sized by its section of `serve`. Heavy libraries load in the
replicas that need them.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pyarrow.fs as pafs
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponse

from pulse_ray import catalogue, models
from pulse_ray.config import Config, DeploymentConfig, ReasonerConfig, SamplingConfig, ServeConfig, load
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.runtime import cluster
from pulse_ray.schema import History
from pulse_ray.serving import api, guard
from pulse_ray.serving.admission import Admission
from pulse_ray.serving.backend import BusyError, UnavailableError
from pulse_ray.serving.filling import connect, fill, finished
from pulse_ray.serving.recommender import Recommender, Services
from pulse_ray.serving.store import Found
from pulse_ray.workspace import Artefact, Workspace

if TYPE_CHECKING:
    from fastapi import FastAPI

    from pulse_ray.ranker.packing import TokenRow
    from pulse_ray.ranker.scorer import Scorer

NAME = "pulse-ray"
WEIGHTS = "adapter_model.safetensors"

HEALTH_CHECK_PERIOD_S = 2.0
"""A replica that died is missed after so long; Serve's own ten seconds are most of what a recovery would take."""

GRACE_S = 5.0
"""What a replica that is replaced has beyond the time limit of its requests."""

RUN_POLL_S = 5.0
"""How often a service that waits for its run looks for it."""

BUSY_S = 0.25
"""So long after a refusal the ingress refuses by itself: a crowd that is turned away must not keep the ranker busy."""

T = TypeVar("T")
logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A ranker in memory. `version` is the variant and the sha256 of the adapter's weights."""

    scorer: Scorer
    adapter: str | None
    version: str


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """A row on its way to the model. It is scored by the very model that was current when it came."""

    tokens: TokenRow
    size: int
    """Packed tokens, or the budget where that is less: Serve refuses what no batch can hold."""
    loaded: Loaded


class Ranker:
    """Scores rows; those that wait together go together, as far as the token budget reaches.

    A new adapter comes by `user_config`. It is loaded beside the one that ranks, and takes over when it is ready: Serve
    keeps requests from a replica while it reconfigures, so `reconfigure` itself must not wait for the load.
    """

    def __init__(self, config: Config) -> None:
        self.config, self.section = config, config.serve.ranker
        self.workspace, self.variant = (
            Workspace(config.storage, config.name),
            config.ranker.served(config.serve.variant),
        )
        self.items = catalogue.load(self.workspace.artefact("items"))
        self._loaded: Loaded | None = None
        self._loading: asyncio.Task[None] | None = None
        # One thread each: a tokenizer cannot be shared, and two forward passes would only share the cores.
        self._encoding, self._forward = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self._admission = Admission(self.section.max_wait_s)
        self._idle = asyncio.Event()
        self._idle.set()
        self._batched = serve.batch(
            max_batch_size=self.section.token_budget,
            batch_wait_timeout_s=self.section.batch_wait_s,
            batch_size_fn=lambda rows: sum(row.size for row in rows),
        )(self._together)

    async def reconfigure(self, user_config: Mapping[str, Any]) -> None:
        """Loads the adapter that `user_config["adapter"]` names; None is the run's own. Waits for the first alone."""
        if self._loading is not None:
            self._loading.cancel()
        if self._loaded is None:
            loaded = await asyncio.to_thread(self._load, user_config["adapter"])
            await self._warm_up(loaded)
            self._loaded = loaded
        else:
            self._loading = asyncio.create_task(self._replace(user_config["adapter"]))

    async def version(self) -> str:
        """Of the model that ranks now."""
        return self._current().version

    async def rank(self, row: RankRow, companions: int = 0) -> tuple[list[float], str] | None:
        """One logit for each candidate, and the version of the model; None where too many rows wait already.

        Args:
            companions: rows of the same request that were sent before this one.
        """
        loaded = self._current()
        loop = asyncio.get_running_loop()
        try:
            with self._admission.place(companions):
                tokens = await loop.run_in_executor(self._encoding, loaded.scorer.encode, row)
                # Serve closes a batch some milliseconds after its first row, also while another one runs: many small
                # ones would stand in line. Rows that wait here for the model go together.
                await self._idle.wait()
                scored: list[float] = await self._batched(self._encoded(tokens, loaded))
        except BusyError:
            return None  # Serve would log an exception with its whole stack, and this one is no news.
        return scored, loaded.version

    def _encoded(self, tokens: TokenRow, loaded: Loaded) -> Encoded:
        return Encoded(tokens=tokens, size=min(tokens.packed_length, self.section.token_budget), loaded=loaded)

    async def _together(self, rows: list[Encoded]) -> list[list[float]]:
        self._idle.clear()
        started = time.monotonic()
        try:
            scored = await asyncio.get_running_loop().run_in_executor(self._forward, self._score, rows)
        finally:
            self._idle.set()
        self._admission.took(len(rows), time.monotonic() - started)
        return scored

    async def _warm_up(self, loaded: Loaded) -> None:
        """Two passes over a long row: the first takes longer than any later one, and the second tells a row's time."""
        from pulse_ray.ranker.packing import TokenRow

        section = self.config.ranker
        candidate = [0] * section.candidate_tokens
        tokens = TokenRow(prompt=[0] * section.max_tokens, candidates=[candidate] * self.config.serve.retrieve_k)
        for _ in range(2):
            self._admission.row_s = None
            await self._together([self._encoded(tokens, loaded)])

    def _score(self, rows: Sequence[Encoded]) -> list[list[float]]:
        scored: dict[int, list[float]] = {}
        for loaded in {id(row.loaded): row.loaded for row in rows}.values():
            places = [place for place, row in enumerate(rows) if row.loaded is loaded]
            logits = loaded.scorer.score_tokens([rows[place].tokens for place in places], self.section.token_budget)
            scored |= {place: values.tolist() for place, values in zip(places, logits, strict=True)}
        return [scored[place] for place in range(len(rows))]

    async def _replace(self, adapter: str | None) -> None:
        try:
            self._loaded = await asyncio.to_thread(self._load, adapter)
        except Exception:
            # Rankings go on with the model that is there; the answers name its version.
            logger.exception("The adapter %s cannot be loaded; %s stays", adapter, self._current().version)

    def _load(self, adapter: str | None) -> Loaded:
        from pulse_ray.ranker.scorer import Scorer

        with tempfile.TemporaryDirectory() as local:
            folder = self._folder(adapter).download(Path(local))
            digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
            scorer = Scorer(folder, self.config.ranker, self.items)
        return Loaded(scorer=scorer, adapter=adapter, version=f"{self.variant}@{digest[:12]}")

    def _folder(self, adapter: str | None) -> Artefact:
        if adapter is None:
            return Artefact(
                self.workspace.filesystem, f"{self.workspace.artefact('ranker').path}/{self.variant}", self.variant
            )
        if "://" in adapter:
            filesystem, path = pafs.FileSystem.from_uri(adapter)
            return Artefact(filesystem, path, self.variant)
        return Artefact(pafs.LocalFileSystem(), str(Path(adapter).expanduser().absolute()), self.variant)

    def _current(self) -> Loaded:
        assert self._loaded is not None, "Serve calls `reconfigure` before it sends a request"
        return self._loaded


class Retriever:
    """Finds candidates with SASRec."""

    def __init__(self, config: Config) -> None:
        from pulse_ray.candidates.retrieval import Retrieval

        sasrec = Workspace(config.storage, config.name).artefact("sasrec")
        with tempfile.TemporaryDirectory() as local:
            self._retrieval = Retrieval(sasrec.download(Path(local)))

    async def retrieve(self, domain: str, history: Sequence[str], touched: Sequence[str], count: int) -> list[str]:
        """Up to `count` items that the user never touched, best first."""
        from pulse_ray.candidates.retrieval import Query

        query = Query(domain=domain, history=history, touched=touched)
        [found] = await asyncio.to_thread(self._retrieval.nearest, [query], count)
        return found


class Reasoner:
    """Grows trees with a vLLM engine of its own, and selects as the served variant does."""

    async def __init__(self, config: Config) -> None:  # type: ignore[misc]  # Serve awaits it.
        from pulse_ray.generation.engine import Engine
        from pulse_ray.serving import reasoning

        workspace, engine = Workspace(config.storage, config.name), Engine(config.engine)
        items = catalogue.load(workspace.artefact("items"))
        self._reasoning = reasoning.load(config, engine, items, workspace.artefact("encoders"))
        # The engine starts with its first completion: the replica is not ready before.
        await engine.complete("Hello", 1, 0, SamplingConfig(max_tokens=1))

    async def reason(self, history: History) -> Found | str:
        """A reason with its tree, or why there is none."""
        return await self._reasoning.reason(history)


class Ingress:
    """The FastAPI application, its store and catalogue, and handles to the other deployments."""

    def __init__(
        self,
        config: Config,
        digests: Sequence[str],
        retriever: DeploymentHandle[Any],
        ranker: DeploymentHandle[Any],
        reasoner: DeploymentHandle[Any] | None,
    ) -> None:
        self._config, self._digests = config, digests
        self._backend = Recommender(
            config,
            catalogue.load(Workspace(config.storage, config.name).artefact("items")),
            connect(config),
            Services(
                retrieve=_service(retriever.retrieve, "the retriever"),
                rank=_ranking(ranker),
                reason=_service(reasoner.reason, "the reasoner") if reasoner is not None else None,
                version=_service(ranker.version, "the ranker"),
            ),
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        replica = serve.get_replica_context().replica_id.unique_id
        return api.create(self._backend, self._config.serve, self._digests, replica)


def _service(method: Any, name: str) -> Callable[..., Awaitable[Any]]:
    """A method of a handle, with Ray's errors as refusals."""

    async def ask(*values: Any) -> Any:
        async with _refusals(name):
            response: DeploymentResponse[Any] = method.remote(*values)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()  # Nobody waits any more: the replica need not go on.
                raise

    return ask


def _ranking(ranker: DeploymentHandle[Any]) -> Callable[[RankRow, int], Awaitable[tuple[list[float], str]]]:
    """`Ranker.rank`, with a refusal in place of None. For a moment after one, the ranker is not even asked."""
    ask = _service(ranker.rank, "the ranker")
    busy_until = 0.0

    async def rank(row: RankRow, companions: int) -> tuple[list[float], str]:
        nonlocal busy_until
        found: tuple[list[float], str] | None = None
        # Rows whose companions are let in already are not turned away here.
        if companions or time.monotonic() >= busy_until:
            found = await ask(row, companions)
            if found is None:
                busy_until = time.monotonic() + BUSY_S
        if found is None:
            raise BusyError("too many requests wait for the ranker")
        return found

    return rank


@asynccontextmanager
async def _refusals(name: str) -> AsyncIterator[None]:
    try:
        yield
    except BackPressureError as error:
        raise BusyError(f"too many requests wait for {name}") from error
    except (RayError, RayServeException) as error:
        logger.warning("%s failed", name, exc_info=True)
        raise UnavailableError(f"{name} does not answer") from error


def application(config: Config, ranker_class: type[Ranker] = Ranker) -> serve.Application:
    """The deployments of a configuration, bound to each other.

    Args:
        ranker_class: what ranks; another one is measured against ours.

    Raises:
        ArtifactError: the run lacks something that serving needs.
        ConfigError: a token file cannot be read, or there are no tokens for another host than this machine.
    """
    section = config.serve
    digests = guard.token_digests(section)
    guard.check_host(section.host, digests)
    workspace = Workspace(config.storage, config.name)
    compares = config.ranker.served(section.variant) == "thought_space" or config.tree.beam_width is not None
    for name in ("items", "sasrec", "ranker", *(("encoders",) if section.reasoner.enabled and compares else ())):
        finished(workspace, name)
    models.resolve(config.ranker.model)
    if section.reasoner.enabled and (encoder := config.model_of(config.ranker.served(section.variant))):
        models.resolve(encoder)
    retriever = _deployment(Retriever, section.retriever, section).bind(config)
    ranker = _deployment(ranker_class, section.ranker, section, user_config={"adapter": section.ranker.adapter}).bind(
        config
    )
    reasoner = None
    if section.reasoner.enabled:
        reasoner = _deployment(Reasoner, section.reasoner, section).bind(config)
    ingress = _deployment(serve.ingress(None)(Ingress), section.ingress, section)
    return ingress.bind(config, digests, retriever, ranker, reasoner)


def _deployment(kind: type, section: DeploymentConfig, common: ServeConfig, **more: Any) -> serve.Deployment:
    replicas = section.replicas
    if replicas.max > replicas.min:
        more["autoscaling_config"] = {
            "min_replicas": replicas.min,
            "max_replicas": replicas.max,
            "target_ongoing_requests": section.target_ongoing_requests,
        }
    else:
        more["num_replicas"] = replicas.min
    return serve.deployment(
        name=kind.__name__,
        ray_actor_options={"num_cpus": replicas.cpus, "num_gpus": replicas.gpus},
        max_ongoing_requests=section.max_ongoing_requests,
        max_queued_requests=section.max_queued_requests,
        health_check_period_s=HEALTH_CHECK_PERIOD_S,
        backpressure_config={"status_code": BusyError.status, "retry_after_s": common.retry_after_s},
        # A replica that is replaced ends its requests, however long they may take.
        graceful_shutdown_timeout_s=GRACE_S
        + (section.time_limit_s if isinstance(section, ReasonerConfig) else common.timeout_s),
        **more,
    )(kind)


def build(args: dict[str, Any]) -> serve.Application:
    """The application builder for `serve deploy` and `serve run`.

    The store is filled first, unless it is filled from this run already.

    Args:
        args: `config`, the path of a YAML file, and optionally `set`, a list of `section.key=value`, and `wait_s`:
            seconds to wait for a run that is not finished, as where a job and the service start together.

    Raises:
        ConfigError: an argument is missing or unknown, or the configuration is wrong.
        ArtifactError: the run is not finished, or the store does not answer.
    """
    if unknown := sorted(set(args) - {"config", "set", "wait_s"}):
        raise ConfigError(
            f"unknown argument '{unknown[0]}' of the application", remedy="Give `config`, `set` and `wait_s` alone"
        )
    if "config" not in args:
        raise ConfigError("the application has no `config`", remedy="Add the path of a YAML file to its args")
    config = load(args["config"], args.get("set") or ())
    guard.check_host(config.serve.host, guard.token_digests(config.serve))
    _wait_for_run(config, float(args.get("wait_s", 0)))
    fill(config)
    return application(config)


def _wait_for_run(config: Config, wait_s: float) -> None:
    """Waits for the last stage that serving needs, as long as it may."""
    workspace, deadline = Workspace(config.storage, config.name), time.monotonic() + wait_s
    while workspace.artefact("ranker").manifest() is None and time.monotonic() < deadline:
        time.sleep(min(RUN_POLL_S, wait_s))


@contextmanager
def serving(config: Config, ranker_class: type[Ranker] = Ranker) -> Iterator[str]:
    """Serves a configuration until the context ends. Yields the address.

    Args:
        ranker_class: as for `application`.

    Raises:
        ConfigError: another host without tokens, or the port is taken.
        ArtifactError: the run is not finished, or the application does not start.
    """
    section = config.serve
    app = application(config, ranker_class)
    _check_port(section.host, section.port)
    logger.setLevel(logging.WARNING)  # This process's own lines; `quiet` is for those of the replicas.
    with cluster(config.cluster):
        quiet = {"log_level": "WARNING", "enable_access_log": False}
        try:
            serve.start(
                proxy_location="HeadOnly",
                http_options={"host": section.host, "port": section.port},
                logging_config=quiet,
            )
            serve.run(app, name=NAME, route_prefix="/", logging_config=quiet)
        except RuntimeError as error:
            serve.shutdown()
            raise ArtifactError(
                f"the application does not start: {str(error).strip().splitlines()[-1]}",
                remedy="The cause stands in the logs of the Ray session, in logs/serve",
            ) from error
        try:
            host = f"[{section.host}]" if ":" in section.host else section.host
            yield f"http://{host}:{section.port}"
        finally:
            serve.shutdown()


def _check_port(host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(
                f"cannot serve on {host}:{port}: {error.strerror}", remedy="Choose another with --port or --host"
            ) from error
