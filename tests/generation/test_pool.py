"""What a dying engine, a killed actor and a deadly shard cost: their own shards, and nothing else."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from shops import example, stage

from pulse_ray.errors import GenerationError
from pulse_ray.generation import pool
from pulse_ray.generation.engine import EngineDeathError, Usage
from pulse_ray.runtime import ShardOutput
from pulse_ray.schema import Reject, table
from pulse_ray.workspace import Part, StageRun

# Ray's workers cannot import the tests.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

PARTS = [f"train-0000-{number:04d}" for number in range(6)]


class Mortal:
    """Writes a thought for the one example of a part. Some parts kill the engine or the process so many times.

    Args:
        deaths: by part, how the first attempts end: `engine` or `process`; the last entry of a list stays.
        folder: every attempt leaves a file here: its part, its number, and who was at work before it ended.
    """

    def __init__(self, run: StageRun, deaths: dict[Part, list[str | None]], folder: Path) -> None:
        self.run, self.deaths, self.folder = run, deaths, folder
        self.engine: Any = SimpleNamespace(start=lambda: None, usage=Usage())
        self.at_work: set[Part] = set()

    async def __call__(self, part: Part) -> ShardOutput:
        attempt = len(list(self.folder.glob(f"{part}.*")))
        self.at_work.add(part)
        note = self.folder / f"{part}.{attempt}"
        note.touch()
        try:
            await asyncio.sleep(0.5)
            if part in self.deaths and attempt == 0:
                await self._company()
            note.write_text(",".join(sorted(self.at_work)))
            plan = self.deaths.get(part, [None])
            match plan[min(attempt, len(plan) - 1)]:
                case "engine":
                    raise EngineDeathError("the engine died", remedy="Run again")
                case "process":
                    os.kill(os.getpid(), signal.SIGKILL)
        finally:
            self.at_work.discard(part)
        self.engine.usage.prompt_tokens += 100
        self.engine.usage.cached_tokens += 60
        row = {
            **dict.fromkeys(("node_id", "text", "finish_reason", "prompt_sha"), ""),
            **dict.fromkeys(("depth", "num_tokens", "seed"), 1),
            "leaf": True,
            "mean_logprob": -1.0,
        }
        (key,) = self.run.input("examples").read(part, ["example_id"]).column(0).to_pylist()
        return ShardOutput(
            tables={"thoughts": table("thoughts", [{**row, "example_id": key}])}, examples=1, figures={"tokens": 1}
        )

    async def _company(self) -> None:
        """Waits a while for others to take along; where all others are done, none will come."""
        for _ in range(60):
            if len(self.at_work) > 1:
                return
            await asyncio.sleep(0.05)


def _generate(
    folder: Path, deaths: dict[Part, list[str | None]], limit: float = 0.5, in_flight: int = 3
) -> tuple[StageRun, dict[str, float]]:
    settings = {"engine": {"max_shard_attempts": 3, "shards_in_flight": in_flight}}
    run = stage("tree", folder, {part: [example(f"u{part[-1]}")] for part in PARTS}, settings)
    (folder / "attempts").mkdir()
    figures = pool.generate(
        run, PARTS, Mortal, run, deaths, folder / "attempts", title="test", max_reject_fraction=limit
    )
    return run, figures


def _attempts(folder: Path, part: Part) -> list[set[Part]]:
    """Who was at work in each attempt before it ended."""
    return [set(note.read_text().split(",")) for note in sorted((folder / "attempts").glob(f"{part}.*"))]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("death", ["engine", "process"])
def test_a_deadly_shard_is_found_out_and_set_aside_and_its_neighbours_are_written(tmp_path: Path, death: str) -> None:
    run, figures = _generate(tmp_path, {PARTS[1]: [death]})
    assert run.rejected() == {"shard failed": 1}
    (reject,) = [row for data in run.rejects.tables() for row in data.to_pylist()]
    assert reject["key"] == "shop/u1/4"
    assert "3 attempts" in reject["detail"]
    assert {"engine": "the engine died", "process": "was killed"}[death] in reject["detail"]
    written = [row["example_id"] for data in run.output("thoughts").tables() for row in data.to_pylist()]
    assert sorted(written) == sorted(f"shop/u{part[-1]}/4" for part in PARTS if part != PARTS[1])
    first, *again = _attempts(tmp_path, PARTS[1])
    assert len(first) > 1, "the first attempt had no company to lose"
    assert again == [{PARTS[1]}] * 2, "a suspect was not alone"
    assert max(len(_attempts(tmp_path, part)) for part in PARTS if part != PARTS[1]) <= 2
    assert figures["tokens"] == len(PARTS) - 1


@pytest.mark.usefixtures("ray_cluster")
def test_an_engine_that_comes_back_costs_no_example(tmp_path: Path) -> None:
    run, figures = _generate(tmp_path, {PARTS[0]: ["engine", "process", None], PARTS[4]: ["engine", None]}, limit=0.0)
    assert run.rejected() == {}
    assert run.output("thoughts").parts() == PARTS
    assert figures["cached_tokens"] == pytest.approx(0.6 * figures["prompt_tokens"])


@pytest.mark.usefixtures("ray_cluster")
def test_too_many_rejects_end_the_run_before_it_is_through(tmp_path: Path) -> None:
    with pytest.raises(GenerationError, match="rejected 1 examples, more than 10%: 1 shard failed"):
        _generate(tmp_path, {PARTS[0]: ["engine"]}, limit=0.1, in_flight=1)
    assert not _attempts(tmp_path, PARTS[-1])


@pytest.mark.usefixtures("ray_cluster")
def test_rejects_of_an_attempt_that_was_killed_are_not_counted_twice(tmp_path: Path) -> None:
    settings = {"engine": {"max_shard_attempts": 1, "shards_in_flight": 1}}
    run = stage("tree", tmp_path, {part: [example(f"u{part[-1]}")] for part in PARTS}, settings)
    (tmp_path / "attempts").mkdir()
    run.reject(PARTS[0], [Reject(key="shop/u0/4", reason="shard failed")])  # The part itself was not written.
    deaths: dict[Part, list[str | None]] = {PARTS[0]: ["engine"]}
    pool.generate(run, PARTS, Mortal, run, deaths, tmp_path / "attempts", title="test", max_reject_fraction=1 / 6)
    assert run.rejected() == {"shard failed": 1}


def test_one_works_alone_and_the_others_side_by_side() -> None:
    async def run() -> None:
        turns, inside, most = pool.Turns(3), set[int](), 0

        async def work(number: int, alone: bool) -> None:
            nonlocal most
            async with turns.take(alone=alone):
                assert not any(other < 0 for other in inside), "somebody was alone"
                assert not (alone and inside)
                inside.add(-number if alone else number)
                most = max(most, len(inside))
                for _ in range(3):
                    await asyncio.sleep(0)
                inside.discard(-number if alone else number)

        kinds = [number % 7 == 0 for number in range(1, 40)]
        await asyncio.wait_for(asyncio.gather(*(work(one, kind) for one, kind in enumerate(kinds, 1))), timeout=20)
        assert most == 3

    asyncio.run(run())


def test_a_ledger_takes_whoever_says_nothing_for_killed() -> None:
    ledger = pool.Ledger()
    ledger.begin("a")
    ledger.begin("a")
    ledger.blame("a", "the engine died")
    assert ledger.failures("a") == [pool.KILLED, "the engine died"]
    ledger.begin("b")
    ledger.end("b")
    assert ledger.failures("b") == []
    assert ledger.failed() == 2
