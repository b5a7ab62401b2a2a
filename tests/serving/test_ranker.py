"""The ranker's class by itself: batches within the token budget, adapters that change while requests flow."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pulse_ray import catalogue
from pulse_ray.config import Config, RankingConfig, ServeConfig
from pulse_ray.ranker.prompts import RankRow
from pulse_ray.ranker.scorer import Scorer
from pulse_ray.schema import History, Interaction
from pulse_ray.serving.app import BUSY_S, Encoded, Ranker, _ranking
from pulse_ray.serving.backend import BusyError
from pulse_ray.workspace import Workspace
from tests.serving import shop


@pytest.fixture(autouse=True)
def _outside_of_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's batch queue asks its replica for settings, to warn of odd ones."""
    monkeypatch.setattr(
        "ray.serve.batching._BatchQueue._warn_if_max_batch_size_exceeds_max_ongoing_requests", lambda _: None
    )


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    settings = shop.config(tmp_path_factory.mktemp("ranked"), serve={"ranker": {"token_budget": 300}})
    shop.make(settings)
    shop.add_models(settings)
    return settings


def _rows(config: Config) -> list[RankRow]:
    items = catalogue.load(Workspace(config.storage, config.name).artefact("items"))["shop"]
    return [
        RankRow(
            history=History(
                example_id=f"shop/{number}/now",
                domain="shop",
                user_id=str(number),
                interactions=tuple(
                    Interaction(item_id=item, timestamp=place) for place, item in enumerate(shop.history(number))
                ),
            ),
            reason=shop.reason(number),
            # The last row alone is longer than the budget.
            candidates=tuple(list(items.values())[: 30 if number == shop.USERS - 1 else 2 + number % 3]),
        )
        for number in range(shop.USERS)
    ]


def _ranked(answer: tuple[list[float], str] | None) -> tuple[list[float], str]:
    assert answer is not None, "refused"
    return answer


def test_batches_keep_to_the_budget_and_change_nothing(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[list[Encoded]] = []
    score = Ranker._score

    def noted(ranker: Ranker, rows: list[Encoded]) -> list[list[float]]:
        batches.append(list(rows))
        return score(ranker, rows)

    monkeypatch.setattr(Ranker, "_score", noted)
    rows = _rows(config)

    async def ask() -> list[tuple[list[float], str]]:
        ranker = Ranker(config)
        await ranker.reconfigure({"adapter": None})
        batches.clear()  # Those that warm the model up.
        return [_ranked(answer) for answer in await asyncio.gather(*map(ranker.rank, rows))]

    found = asyncio.run(ask())
    folder = Path(Workspace(config.storage, config.name).artefact("ranker").path) / "thought_space"
    items = catalogue.load(Workspace(config.storage, config.name).artefact("items"))
    expected = Scorer(folder, config.ranker, items).score(rows, 4096)
    for (logits, _), wanted in zip(found, expected, strict=True):
        assert logits == pytest.approx(wanted.tolist(), abs=1e-4)
    assert len({version for _, version in found}) == 1
    sizes = [[row.tokens.packed_length for row in batch] for batch in batches]
    assert all(sum(batch) <= 300 for batch in sizes if len(batch) > 1)
    assert max(map(max, sizes)) > 300
    assert max(map(len, batches)) > 1


def test_rows_that_wait_for_the_model_go_together(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    gate = threading.Event()

    def score(ranker: Ranker, rows: list[Encoded]) -> list[list[float]]:
        batches.append(len(rows))
        assert gate.wait(20)
        return [[1.0]] * len(rows)

    rows = _rows(config)[:3]

    async def ask() -> None:
        ranker = Ranker(config.model_copy(update={"serve": ServeConfig(ranker=RankingConfig(max_wait_s=99))}))
        await ranker.reconfigure({"adapter": None})
        monkeypatch.setattr(Ranker, "_score", score)
        asked = [asyncio.create_task(ranker.rank(rows[0]))]
        while not batches:
            await asyncio.sleep(0.001)
        for row in rows:
            asked.append(asyncio.create_task(ranker.rank(row)))
            await asyncio.sleep(0.05)  # Serve would have closed a batch by now.
        gate.set()
        await asyncio.gather(*asked)

    asyncio.run(ask())
    assert batches == [1, 3]


def test_a_new_adapter_takes_over_and_a_broken_one_does_not(config: Config, tmp_path: Path) -> None:
    new = shop.make_adapter(tmp_path / "new", config.ranker, seed=1)
    row = _rows(config)[0]

    async def ask() -> list[tuple[list[float], str]]:
        ranker = Ranker(config)
        await ranker.reconfigure({"adapter": None})
        answers = [_ranked(await ranker.rank(row))]
        for adapter in (str(tmp_path / "missing"), f"file://{new}"):
            await ranker.reconfigure({"adapter": adapter})
            assert ranker._loading is not None
            while not ranker._loading.done():
                answers.append(_ranked(await ranker.rank(row)))
            answers.append(_ranked(await ranker.rank(row)))
            answers.append(([], adapter))
        return answers

    answers = asyncio.run(ask())
    marks = [place for place, (logits, _) in enumerate(answers) if not logits]
    before = {version for _, version in answers[: marks[0]]}
    assert before == {answers[0][1]}
    assert answers[marks[1] - 1][1] != answers[0][1]
    logits = {version: tuple(round(value, 4) for value in found) for found, version in answers if found}
    assert len(logits) == 2
    assert all(logits[version] == pytest.approx(found, abs=1e-3) for found, version in answers if found)


def test_rows_that_would_wait_too_long_are_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    impatient = config.serve.ranker.model_copy(update={"max_wait_s": 0})
    settings = config.model_copy(update={"serve": config.serve.model_copy(update={"ranker": impatient})})
    rows = _rows(config)[:6]

    async def ask() -> tuple[list[bool], list[bool]]:
        ranker = Ranker(settings)
        await ranker.reconfigure({"adapter": None})
        apart = await asyncio.gather(*map(ranker.rank, rows))
        together = await asyncio.gather(*(ranker.rank(row, place) for place, row in enumerate(rows)))
        return [answer is None for answer in apart], [answer is None for answer in together]

    apart, together = asyncio.run(ask())
    assert apart == [False, False, True, True, True, True]
    assert not any(together)


def test_what_the_ranker_refuses_is_refused_for_a_moment_without_asking_it(config: Config) -> None:
    asked: list[int] = []

    def remote(row: RankRow, companions: int) -> Any:
        asked.append(companions)
        return asyncio.sleep(0, None if asked == [0] else ([1.0], "v1"))

    async def ask() -> None:
        handle: Any = SimpleNamespace(rank=SimpleNamespace(remote=remote))
        rank, row = _ranking(handle), _rows(config)[0]
        for _ in range(3):
            with pytest.raises(BusyError, match="the ranker"):
                await rank(row, 0)
        assert await rank(row, 1) == ([1.0], "v1")
        await asyncio.sleep(BUSY_S)
        assert await rank(row, 0) == ([1.0], "v1")

    asyncio.run(ask())
    assert asked == [0, 1, 0]
