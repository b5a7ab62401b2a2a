"""`pulse-ray submit`: a run or a stage as a job of a Ray cluster, with this very package and configuration.

A job is named after the experiment, the stage and the configuration, so that the same job is not started twice: while
it runs, a second submission finds it. What was sent along is all that the cluster needs beyond the libraries.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pulse_ray
from pulse_ray.config import OPERATIONAL, Config, DomainConfig
from pulse_ray.data.files import addresses, identity
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.pipeline import STAGES
from pulse_ray.progress import console

CONFIGURATION = "PULSE_RAY_CONFIGURATION"
"""The variable that brings the configuration, as JSON. A file would need a `working_dir`: two Ray nodes of one machine
share its folder, and the second to set a job up deletes and unpacks it anew, under the driver that the first one runs.
"""

ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
POLL_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is sent to a cluster."""

    name: str
    """Experiment, stage (or `run`) and fingerprint of the configuration: `quickstart-tree-0123456789abcdef`."""
    entrypoint: str
    config: Config
    """As the cluster sees it."""
    environment: Mapping[str, str]
    """Variables of the driver and of all its workers."""


class Client(Protocol):
    """What is used of `ray.job_submission.JobSubmissionClient`."""

    def list_jobs(self) -> Iterable[Any]: ...
    def submit_job(self, *, entrypoint: str, submission_id: str, runtime_env: dict[str, Any]) -> str: ...
    def get_job_info(self, job_id: str) -> Any: ...
    def tail_job_logs(self, job_id: str) -> Any: ...


def describe(config: Config, stage: str | None, environment: Mapping[str, str]) -> Job:
    """The job that runs a stage, or the whole pipeline.

    Folders and files that are relative to where the command was given are made absolute: every node must reach them
    under that name.

    Args:
        environment: variables of the driver and its workers; `runtime.cluster` adds what workers need anywhere.

    Raises:
        ConfigError: there is no such stage, or a model is named by a relative path.
    """
    if stage is not None and stage not in STAGES:
        raise ConfigError(f"no stage '{stage}'", remedy=f"Stages are {', '.join(STAGES)}")
    for name, path in _model_folders(config):
        # Unlike other paths, these enter fingerprints: made absolute, they would be another run's.
        if not Path(path).expanduser().is_absolute():
            raise ConfigError(f"{name} is the relative path '{path}'", remedy="A job needs an absolute path")
    settings = [name for name, field in Config.model_fields.items() if OPERATIONAL not in field.metadata]
    storage = _absolute(config.storage)
    fingerprint = config.fingerprint(settings, [storage, *map(identity, config.prepare.domains)])
    places = {
        "downloads": _absolute(config.prepare.downloads),
        "domains": tuple(_placed(domain) for domain in config.prepare.domains),
    }
    changes = {
        "storage": storage,
        "prepare": config.prepare.model_copy(update=places),
        "cluster": config.cluster.model_copy(update={"address": "auto"}),
    }
    return Job(
        name=f"{config.name}-{stage or 'run'}-{fingerprint}",
        entrypoint=f"printenv {CONFIGURATION} | python -m pulse_ray.cli {stage or 'run'} /dev/stdin",
        config=config.model_copy(update=changes),
        environment=environment,
    )


def _model_folders(config: Config) -> list[tuple[str, str]]:
    """Settings that name model folders of this machine, with their values."""
    models = {
        "engine.model": config.engine.model,
        "thought_space.model": config.thought_space.model,
        "ranker.model": config.ranker.model,
    }
    models |= {f"engine.adapters.{name}": adapter for name, adapter in config.engine.adapters.items()}
    if "sbert" in config.select.selectors:
        models["select.sbert_model"] = config.select.sbert_model
    # What is no folder here is a name on the model hub.
    return [(name, model) for name, model in models.items() if Path(model).expanduser().is_dir()]


def _placed(domain: DomainConfig) -> DomainConfig:
    """A domain whose files are named by absolute paths."""
    return domain.model_copy(update={"source": domain.source.model_copy(update=dict(addresses(domain).items()))})


def _absolute(folder: str) -> str:
    return folder if "://" in folder else str(Path(folder).expanduser().absolute())


def connect(address: str) -> Client:
    """A client of the cluster's job server, e.g. `http://127.0.0.1:8265`. Sends the cluster's token, if there is one.

    Raises:
        ArtifactError: there is no such cluster, or it does not accept the token.
    """
    # Both are read when Ray is first imported. The address that was asked for counts, and tokens are on.
    for name in ADDRESSES:
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if os.environ["RAY_AUTH_MODE"] == "token" and not _has_token():
        raise ArtifactError(
            "no token for the Ray cluster",
            remedy="Set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; for a cluster without tokens RAY_AUTH_MODE=disabled",
        )
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        client: Client = JobSubmissionClient(address)
    except AuthenticationError as error:
        raise ArtifactError(
            f"the Ray cluster at {address} refused the token",
            remedy="RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token must hold the one it was started with",
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise ArtifactError(
            f"no job server of a Ray cluster at {address}: {error}",
            remedy="Give the dashboard's address, e.g. --address http://127.0.0.1:8265",
        ) from error
    return client


def _has_token() -> bool:
    return any(os.environ.get(name) for name in TOKENS) or (Path.home() / ".ray" / "auth_token").is_file()


def start(client: Client, job: Job, *, again: bool) -> tuple[str, bool]:
    """Starts a job unless it runs, or has succeeded, already.

    After a failure it is started under a new name: the old one with a number.

    Args:
        again: start it also where it has succeeded.

    Returns:
        Its name on the cluster, and whether this call started it.
    """
    known = {entry.submission_id: str(entry.status) for entry in client.list_jobs()}
    over = {"FAILED", "STOPPED", *(["SUCCEEDED"] if again else [])}
    name = next(name for name in _names(job.name) if known.get(name) not in over)
    if name in known:
        return name, False
    try:
        # No resources are asked for the entry point, so that Ray runs it on the head: the loss of another node costs
        # work, the loss of the driver costs the job.
        client.submit_job(
            entrypoint=job.entrypoint,
            submission_id=name,
            runtime_env={
                "py_modules": [str(Path(pulse_ray.__file__).parent)],
                "env_vars": {**job.environment, CONFIGURATION: job.config.model_dump_json()},
            },
        )
    except RuntimeError as error:
        if "already exists" not in str(error):
            raise
        return name, False  # Someone else was faster.
    return name, True


def _names(base: str) -> Iterable[str]:
    yield base
    yield from (f"{base}-{attempt}" for attempt in count(2))


def follow(client: Client, name: str) -> int:
    """Prints a job's log until it ends.

    Returns:
        The exit code of its driver; 1 where it ended without one.

    Raises:
        ArtifactError: the connection broke. The job goes on.
    """
    try:
        asyncio.run(_print_log(client, name))
        while not (info := client.get_job_info(name)).status.is_terminal():
            time.sleep(POLL_S)
    except (OSError, RuntimeError) as error:
        raise ArtifactError(
            f"lost sight of job {name}: {error}", remedy="It goes on; the same command with --follow finds it again"
        ) from error
    if str(info.status) == "SUCCEEDED":
        return 0
    console.print(f"job {name}: {info.status}: {info.message}", highlight=False, markup=False)
    return int(info.driver_exit_code or 1)


async def _print_log(client: Client, name: str) -> None:
    async for piece in client.tail_job_logs(name):
        print(piece, end="", flush=True)
