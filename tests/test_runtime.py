"""Work over parts: errors reach the caller as they are, and impossible demands are refused before anything waits."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ray import cloudpickle
from shops import example, stage

from pulse_ray.config import PoolConfig, load
from pulse_ray.errors import ArtifactError, ConfigError
from pulse_ray.runtime import ShardOutput, check_resources, run_shards
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
