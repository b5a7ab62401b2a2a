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
KILLS = 3
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
    driver = _start(config, dict(os.environ))
    assert driver.wait(timeout=PATIENCE_S) == 0, config.with_suffix(".log").read_text()
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
    thoughts = _thoughts(load(config))
    random_ = random.Random(seed)
    driver = _start(config, environment)
    for moment in sorted(random_.sample(range(USERS // PART_USERS - 2), KILLS)):
        driver = _wait_for(thoughts, moment, driver, config, environment)
        time.sleep(random_.random())
        victim = random_.choice(VICTIMS)
        before = _files(thoughts)
        _kill(victim, cluster, driver)
        if victim == "driver":
            driver.wait()
            driver = _start(config, environment)
        print(f"{victim} killed with {len(before)} parts committed", file=sys.stderr)
        assert before.items() <= _files(thoughts).items(), "what was committed was made again"
    driver = _wait_for(thoughts, USERS // PART_USERS, driver, config, environment)
    assert driver.wait(timeout=PATIENCE_S) == 0, config.with_suffix(".log").read_text()

    again = sum(map(int, re.findall(r"parts begun again[^:]*: (\d+)", config.with_suffix(".log").read_text())))
    assert again <= KILLS * load(config).engine.pool.max * load(config).engine.shards_in_flight
    assert conditions(load(config))["tree"] == "complete"
    rows = _rows(load(config))
    assert set(Counter(example for example, _ in rows).values()) == {NODES_OF_A_TREE}
    assert len(rows) == USERS * NODES_OF_A_TREE
    assert rows.keys() == undisturbed.keys()
    for key, row in rows.items():
        twin = undisturbed[key]
        assert row.pop("mean_logprob") == pytest.approx(twin["mean_logprob"], abs=1e-4)
        assert row == {name: value for name, value in twin.items() if name != "mean_logprob"}


def _start(config: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    log = config.with_suffix(".log").open("a")
    command = [sys.executable, "-m", "pulse_ray.cli", "tree", str(config)]
    return subprocess.Popen(command, stdout=log, stderr=log, env=environment)


def _wait_for(
    thoughts: Artefact, parts: int, driver: subprocess.Popen[bytes], config: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """Until so many parts are committed. A driver that ended with an error is started again, as a person would."""
    deadline = time.monotonic() + PATIENCE_S
    restarts = 0
    while len(thoughts.parts()) < parts:
        assert time.monotonic() < deadline, config.with_suffix(".log").read_text()
        if driver.poll() not in (None, 0):
            restarts += 1
            assert restarts <= 2, config.with_suffix(".log").read_text()
            driver = _start(config, environment)
        time.sleep(0.1)
    return driver


def _kill(victim: str, cluster: nodes.Nodes, driver: subprocess.Popen[bytes]) -> None:
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


def _rows(config: Config) -> Rows:
    rows = [row for data in _thoughts(config).tables() for row in data.to_pylist()]
    found = {(row["example_id"], row["node_id"]): row for row in rows}
    assert len(found) == len(rows), "a node is there twice"
    return found
