"""The real command with a real ranker, killed at a random moment and started again."""

from __future__ import annotations

from pathlib import Path

import audit
import fake_shop
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pulse_ray.config import Config
from pulse_ray.scoring import job as scoring
from pulse_ray.scoring.worker import UserWorker, trained
from tests import tiny
from tests.serving import shop

USERS, SHARD = 180, 6


def _config(folder: Path) -> Config:
    """A finished run with a tiny ranker."""
    base = fake_shop.config(folder / "runs", shard_users=SHARD)
    ranker = {
        "model": str(tiny.make(folder / "tiny")),
        "variants": ["thought_space"],
        "training": {"precision": "fp32"},
    }
    config = Config.model_validate({**base.model_dump(mode="json"), "ranker": ranker})
    return fake_shop.make(config, make_adapter=lambda path, settings: shop.make_adapter(path, settings, seed=0))


@pytest.mark.slow
def test_a_killed_job_gives_each_user_once_and_what_an_undisturbed_one_gives(tmp_path: Path) -> None:
    config = _config(tmp_path)
    (tmp_path / "run.json").write_text(config.to_json())
    rng = np.random.default_rng(USERS)
    drawn = [[f"s{item}" for item in rng.permutation(fake_shop.ITEMS)[: 2 + row % 5]] for row in range(USERS)]
    rows = [
        # Some have candidates, some have them retrieved, and some cannot be ranked.
        fake_shop.user(f"u{row}", history if row % 11 else [], candidates=["s3", "s9", "s27"] if row % 2 else None)
        for row, history in enumerate(drawn)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "users.parquet")
    command = audit.Command(config=tmp_path / "run.json", users=tmp_path / "users.parquet", output=tmp_path / "scored")
    parts = -(-USERS // SHARD)
    at_parts = int(rng.integers(parts // 5, parts * 4 // 5))
    killed = audit.kill(command, at_parts)
    assert at_parts <= len(killed.committed) < parts
    command.finish()
    assert len(command.parts()) == parts
    assert audit.each_once(command)
    assert {part: audit.marks(command, part) for part in killed.committed} == killed.committed

    undisturbed = audit.Command(config=command.config, users=command.users, output=tmp_path / "undisturbed")
    job = scoring.prepare(config, str(command.users), str(undisturbed.output))
    worker = UserWorker(job.stage, job.users, job.variant, job.version, trained)
    for part in job.users.shards(USERS):
        job.stage.output("user_scores").write(part, worker(part).tables["user_scores"])
    assert audit.difference(command, undisturbed) < 1e-4
