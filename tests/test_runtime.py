"""Work over parts: errors reach the caller as they are, and impossible demands are refused before anything waits."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from ray import cloudpickle
from shops import example, stage

from pulse_ray import runtime
from pulse_ray.config import PoolConfig, load
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.runtime import ShardOutput, check_resources, run_shards
from pulse_ray.schema import Reject, table
from pulse_ray.workspace import Part

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


class Unbuildable:
    """A worker whose model is not there."""

    def __init__(self) -> None:
        raise ArtifactError("the model is gone", remedy="Bring it back")

    def __call__(self, part: Part) -> ShardOutput:
        raise AssertionError(part)


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_of_a_workers_constructor_reaches_the_caller(tmp_path: Path) -> None:
    run = stage("tree", tmp_path, {"train-0000-0000": [example()]}, {})
    with pytest.raises(ArtifactError, match=r"the model is gone\. Bring it back"):
        run_shards(run, ["train-0000-0000"], Unbuildable, pool=PoolConfig(), title="test")


class Counting:
    """A worker that answers with how many parts it has seen, and has no answer to the part `bad`."""

    def __init__(self, first: int) -> None:
        self.seen = first

    def __call__(self, part: Part) -> dict[str, int]:
        if part == "bad":
            raise ArtifactError("the part is gone", remedy="Bring it back")
        self.seen += 1
        return {part: self.seen}


@pytest.mark.usefixtures("ray_cluster")
def test_answers_and_errors_of_actors_reach_the_caller(tmp_path: Path) -> None:
    run = stage("tree", tmp_path, {}, {})
    answers = runtime.map_parts(run, ["a", "b", "bad"], Counting, 4, pool=PoolConfig(), title="test")
    assert [next(answers), next(answers)] == [{"a": 5}, {"b": 6}]
    with pytest.raises(ArtifactError, match=r"the part is gone\. Bring it back"):
        next(answers)
    assert list(runtime.map_parts(run, [], Counting, 4, pool=PoolConfig(), title="test")) == []


@pytest.mark.usefixtures("ray_cluster")
def test_more_parts_than_ray_is_handed_at_once_are_answered(tmp_path: Path) -> None:
    run = stage("tree", tmp_path, {}, {})
    answers = runtime.map_parts(run, ["a", "b", "c"], Counting, 4, pool=PoolConfig(), title="test", parts_at_once=2)
    # The actor of the second round has seen nothing of the first.
    assert list(answers) == [{"a": 5}, {"b": 6}, {"c": 5}]


class Rejecting:
    """A worker that sets aside the one example of each part."""

    def __call__(self, part: Part) -> ShardOutput:
        return ShardOutput(
            tables={"thoughts": table("thoughts", [])},
            examples=1,
            rejects=[Reject(key=part, reason=os.environ["OMP_NUM_THREADS"])],
        )


@pytest.mark.usefixtures("ray_cluster")
def test_more_parts_than_ray_is_handed_at_once_are_made(tmp_path: Path) -> None:
    parts = [f"train-0000-{number:04d}" for number in range(5)]
    run = stage("tree", tmp_path, {}, {})
    assert run_shards(run, parts, Rejecting, pool=PoolConfig(), title="test", parts_at_once=2) == {"examples": 5}
    assert run.output("thoughts").parts() == run.rejects.parts() == parts


@pytest.mark.usefixtures("ray_cluster")
def test_actors_of_a_local_ray_share_its_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setenv("OMP_NUM_THREADS", str(cores))
    parts = ["train-0000-0000", "train-0000-0001"]
    for actors, threads in ((1, cores), (2, max(1, cores // 2))):
        run = stage("tree", tmp_path / str(actors), {}, {})
        run_shards(run, parts, Rejecting, pool=PoolConfig(min=actors, max=actors), title="test")
        assert run.rejected() == {str(threads): 2}


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ("ranker.training.workers.count=999", "ranker.training.workers asks for 999 CPUs"),
        ("evaluate.pool.gpus=999", "evaluate.pool asks for 999 GPUs"),
        ("candidates.sasrec.training.workers.cpus=999", "candidates.sasrec.training.workers asks for 999 CPUs"),
    ],
)
def test_what_a_local_ray_does_not_have_is_refused(change: str, complaint: str) -> None:
    sections = ("seed", "candidates", "ranker", "evaluate")
    check_resources(load(QUICKSTART), sections)
    check_resources(load(QUICKSTART, [change, "cluster.address=auto"]), sections)
    with pytest.raises(ConfigError, match=complaint):
        check_resources(load(QUICKSTART, [change]), sections)
