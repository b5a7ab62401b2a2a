"""Fills the profile store from a finished run: whole histories, and the reasons and trees of the test split.

One partition of users is in memory at a time. The mark is set last, so a filling that was interrupted starts again. Who
is served meanwhile finds every user, with the older profile or the newer.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from itertools import groupby
from operator import itemgetter
from typing import Any

import pyarrow.fs as pafs

from pulse_ray.config import Config
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.schema import Interaction, Split
from pulse_ray.serving.store import (
    BATCH,
    Profile,
    ProfileStore,
    StoreDownError,
    StoredReason,
    StoredThought,
    open_store,
)
from pulse_ray.workspace import Artefact, Manifest, Part, Workspace

SPLIT: Split = "test"
"""The split whose reasons saw the most of each user's history."""


def finished(workspace: Workspace, name: str) -> Manifest:
    """The manifest of a complete artefact.

    Raises:
        ArtifactError: the run has not come so far.
    """
    manifest = workspace.artefact(name).manifest()
    if manifest is None:
        raise ArtifactError(
            f"{workspace.path} holds no complete '{name}', which serving needs", remedy="Run `pulse-ray run` first"
        )
    return manifest


def store_address(config: Config) -> str:
    """Where the profiles are: as configured, or a SQLite file in the run's folder.

    Raises:
        ConfigError: the run's storage is remote, where no SQLite file can be.
    """
    if config.serve.store is not None:
        return config.serve.store
    workspace = Workspace(config.storage, config.name)
    if not isinstance(workspace.filesystem, pafs.LocalFileSystem):
        raise ConfigError(
            f"storage '{config.storage}' is remote, and a SQLite file cannot be kept there",
            remedy="Set serve.store to redis://host:port/db, or to sqlite:///path on one machine",
        )
    return f"sqlite:///{workspace.path}/serving/profiles.sqlite"


def connect(config: Config) -> ProfileStore:
    """The configured store. Redis' password comes from the environment of this process.

    Raises:
        ArtifactError: a SQLite file cannot be opened.
        ConfigError: there is no place for it.
    """
    return open_store(store_address(config), config.name, os.environ.get(config.serve.store_password_env))


@contextmanager
def opened(config: Config) -> Iterator[ProfileStore]:
    """The configured store, closed afterwards.

    Raises:
        ArtifactError: it cannot be opened, or does not answer.
        ConfigError: there is no place for it.
    """
    store = connect(config)
    try:
        yield store
    except StoreDownError as error:
        raise ArtifactError(
            f"the profile store {store_address(config)} does not answer: {error}",
            remedy="Start it, or set serve.store to another",
        ) from error
    finally:
        store.close()


def fill(config: Config) -> int:
    """Fills the configured store from the run, unless it is filled from just this run already.

    Returns:
        How many profiles were written; 0 where there was nothing to do.

    Raises:
        ArtifactError: the run is not finished, a table of it is damaged, or the store does not answer.
    """
    workspace, selector = Workspace(config.storage, config.name), config.ranker.served(config.serve.variant)
    needed = ("interactions", "thoughts", "reasons")
    mark = "/".join([selector, *(finished(workspace, name).fingerprint for name in needed)])
    with opened(config) as store:
        if store.mark() == mark:
            return 0
        written = store.put(_profiles(workspace, selector), mark)
        store.retire([mark, BATCH])
        store.set_mark(mark)
        return written


def _profiles(workspace: Workspace, selector: str) -> Iterator[Profile]:
    interactions, reasons = workspace.artefact("interactions"), workspace.artefact("reasons")
    version = f"{selector}@{finished(workspace, 'reasons').fingerprint[:8]}"
    for partition in interactions.parts():
        # Both are named after the users' partition: `part-0003` and `test-0003-0001`.
        parts = [part for part in reasons.parts(SPLIT) if part.split("-")[1] == partition.split("-")[1]]
        chosen, trees = _reasons(reasons, parts, selector, version), _trees(workspace.artefact("thoughts"), parts)
        for (domain, user), rows in _by_user(interactions.read(partition).to_pylist()):
            yield Profile(
                domain=domain,
                user_id=user,
                history=tuple(sorted(rows, key=lambda step: step.timestamp)),
                reason=chosen.get((domain, user)),
                tree=tuple(trees.get((domain, user), ())),
            )


def _by_user(rows: list[dict[str, Any]]) -> Iterator[tuple[tuple[str, str], list[Interaction]]]:
    rows.sort(key=itemgetter("domain", "user_id"))  # Stable: interactions at the same second keep their order.
    for key, found in groupby(rows, key=itemgetter("domain", "user_id")):
        yield (
            key,
            [
                Interaction(**{name: row[name] for name in ("item_id", "timestamp", "rating", "review")})
                for row in found
            ],
        )


def _reasons(reasons: Artefact, parts: list[Part], selector: str, version: str) -> dict[tuple[str, str], StoredReason]:
    return {
        _user(row.pop("example_id")): StoredReason(**row, version=version)
        for part in parts
        for row in reasons.read(part).to_pylist()
        if row["selector"] == selector
    }


def _trees(thoughts: Artefact, parts: list[Part]) -> dict[tuple[str, str], list[StoredThought]]:
    found: dict[tuple[str, str], list[StoredThought]] = defaultdict(list)
    for part in parts:
        for row in thoughts.read(part, ["example_id", *(field.name for field in fields(StoredThought))]).to_pylist():
            found[_user(row.pop("example_id"))].append(StoredThought(**row))
    return found


def _user(example_id: str) -> tuple[str, str]:
    """Domain and user of an example.

    >>> _user("shop/u/17/4")
    ('shop', 'u/17')
    """
    domain, _, rest = example_id.partition("/")
    return domain, rest.rpartition("/")[0]
