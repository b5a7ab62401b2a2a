"""Trees for 400 users while whatever can be killed is killed: each is there once, whole, and as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nodes
import psutil
import pytest
import tiny
import yaml
from histories import configure, tree_run

from pulse_ray.config import Config, load
from pulse_ray.pipeline import conditions
from pulse_ray.workspace import Artefact, Workspace

USERS, PART_USERS = 400, 16
BREADTHS = (3, 3)
NODES_OF_A_TREE = 1 + 3 + 9
VICTIMS = ("driver", "engine", "raylet")
PATIENCE_S = 600

Rows = dict[tuple[str, str], dict[str, Any]]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Greedy, so that rounding cannot show; two engines, one for each node."""
    model = str(tiny.make(tmp_path_factory.mktemp("tiny")))
    engine = {"model": model, "dtype": "float32", "max_model_len": 768, "kv_cache_gb": 0.25}
    sampling = {"max_tokens": 8, "temperature": 0.0, "gates": []}
    return {
        "seed": 3,
        "engine": {**engine, "pool": {"min": 2, "max": 2}},
        "tree": {
            "breadths": BREADTHS,
            "sampling": sampling,
            "text": {"history_tokens": 120},
            "max_reject_fraction": 0.0,
        },
    }


def _prepared(folder: Path, settings: dict[str, Any]) -> Path:
    path = folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(configure(folder, USERS, settings)))))
    tree_run(load(path), PART_USERS)
    return path


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    config = _prepared(tmp_path_factory.mktemp("undisturbed"), settings)
    with Driver(config, dict(os.environ)) as driver:
        driver.finish()
    return _rows(load(config))


@pytest.fixture(scope="module")
def cluster() -> Iterator[nodes.Nodes]:
    with nodes.two_nodes() as made:
        yield made


@pytest.mark.chaos
@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_killed_every_tree_is_there_once_and_as_it_would_have_been(
    seed: int, cluster: nodes.Nodes, settings: dict[str, Any], undisturbed: Rows, tmp_path: Path
) -> None:
    config = _prepared(tmp_path, settings)
    environment = {
        **cluster.environment,
        "RAY_ADDRESS": f"127.0.0.1:{cluster.gcs}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    thoughts, engine = _thoughts(load(config)), load(config).engine
    random_, committed, attempts = random.Random(seed), dict[str, int](), _attempts(cluster)
    moments = sorted(random_.sample(range(USERS // PART_USERS - 2), len(VICTIMS)))
    with Driver(config, environment) as driver:
        for moment, victim in zip(moments, random_.sample(VICTIMS, len(VICTIMS)), strict=True):
            driver.wait_for(thoughts, moment)
            time.sleep(random_.random())
            committed |= _files(thoughts)
            _kill(victim, cluster, driver)
            print(f"{victim} killed with {len(committed)} parts committed", file=sys.stderr)
        driver.wait_for(thoughts, USERS // PART_USERS)
        driver.finish()

    begun = _attempts(cluster) - attempts
    lost = len(VICTIMS) * engine.pool.max * engine.shards_in_flight
    print(f"{begun} attempts at {USERS // PART_USERS} parts, {lost} may be lost", file=sys.stderr)
    assert USERS // PART_USERS <= begun <= USERS // PART_USERS + lost, "more was done again than was in flight"
    assert committed.items() <= _files(thoughts).items(), "what was committed was made again"
    assert conditions(load(config))["tree"] == "complete"
    rows = _rows(load(config))
    assert set(Counter(example for example, _ in rows).values()) == {NODES_OF_A_TREE}
    assert len(rows) == USERS * NODES_OF_A_TREE
    assert rows.keys() == undisturbed.keys()
    for key, row in rows.items():
        twin = undisturbed[key]
        assert row.pop("mean_logprob") == pytest.approx(twin["mean_logprob"], abs=1e-4)
        assert row == {name: value for name, value in twin.items() if name != "mean_logprob"}


class Driver:
    """The command, started again where it was killed or ended with an error, as a person would."""

    def __init__(self, config: Path, environment: dict[str, str]) -> None:
        self.path, self.environment = config.with_suffix(".log"), environment
        self.command = [sys.executable, "-m", "pulse_ray.cli", "tree", str(config)]
        self.errors = 0
        self.start()

    def __enter__(self) -> Driver:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()

    def start(self) -> None:
        with self.path.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.start()

    def log(self) -> str:
        return self.path.read_text()

    def wait_for(self, thoughts: Artefact, parts: int) -> None:
        """Until so many parts are committed."""
        deadline = time.monotonic() + PATIENCE_S
        while len(thoughts.parts()) < parts:
            assert time.monotonic() < deadline, self.log()
            if self.process.poll() not in (None, 0):
                self.errors += 1
                assert self.errors <= len(VICTIMS), self.log()
                self.start()
            time.sleep(0.1)

    def finish(self) -> None:
        if self.process.wait(timeout=PATIENCE_S):
            self.start()
        assert self.process.wait(timeout=PATIENCE_S) == 0, self.log()


def _kill(victim: str, cluster: nodes.Nodes, driver: Driver) -> None:
    """With -9, at once. A node that lost its raylet is replaced."""
    if victim == "driver":
        driver.kill()
    elif victim == "engine":
        actors = [actor["pid"] for actor in cluster.actors() if "_Committer" in actor["class_name"]]
        for actor in actors[:1]:
            psutil.Process(actor).kill()
    else:
        (raylet,) = [
            process
            for process in psutil.Process(cluster.processes[-1].pid).children(recursive=True)
            if process.name() == "raylet"
        ]
        raylet.kill()
        cluster.kill_last()
        cluster.join()


def _thoughts(config: Config) -> Artefact:
    return Workspace(config.storage, config.name).artefact("thoughts")


def _files(thoughts: Artefact) -> dict[str, int]:
    """Every committed part, and when it was: one that was made again has another time."""
    return {part: (Path(thoughts.path) / f"{part}.parquet").stat().st_mtime_ns for part in thoughts.parts()}


def _attempts(cluster: nodes.Nodes) -> int:
    """Attempts at parts of all actors so far, as they say in their logs."""
    logs = [path.read_text(errors="replace") for path in cluster.folder.rglob("worker-*.err") if path.is_file()]
    return sum(len(re.findall(r"^test-\d+-\d+: attempt \d+$", log, re.MULTILINE)) for log in logs)


def _rows(config: Config) -> Rows:
    rows = [row for data in _thoughts(config).tables() for row in data.to_pylist()]
    found = {(row["example_id"], row["node_id"]): row for row in rows}
    assert len(found) == len(rows), "a node is there twice"
    return found
