"""Leak canaries: what a user takes last reaches no prompt, reason or ranker input but as a candidate and in Phase I.

Every user ends with three items that nobody else touches, each titled with a word of its own: the targets of the
user's train, validation and test example. All stages run with their real workers; only the language model is replaced,
by one that repeats what it was shown, so that a word that enters anywhere is carried on to everything that follows.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pulse_ray import catalogue
from pulse_ray.candidates.exports import ExportWorker, IndexWorker, exports, unindexed
from pulse_ray.candidates.sasrec import Sasrec
from pulse_ray.candidates.stage import CandidateWorker
from pulse_ray.config import Config, SamplingConfig
from pulse_ray.data.stage import prepare
from pulse_ray.generation.engine import Completion
from pulse_ray.pipeline import plan
from pulse_ray.ranker import model
from pulse_ray.ranker.loop import RankData
from pulse_ray.ranker.packing import PromptEncoder
from pulse_ray.rationales.stage import RationaleWorker
from pulse_ray.runtime import ShardOutput
from pulse_ray.schema import Example, examples
from pulse_ray.selection.stage import SelectWorker
from pulse_ray.text import CountTokens
from pulse_ray.thought_space.encoders import Encoders, Tower
from pulse_ray.tree.stage import TreeWorker
from pulse_ray.workspace import StageRun

USERS, COMMON, SPLITS = 12, 20, ("train", "validation", "test")


def canary(user: int, split: str) -> str:
    return f"zq{split[:2]}{user:02d}xv"


class Parrot:
    """Stands in for the engine: keeps every prompt, and answers with the end of it."""

    special_tokens = ("<|im_end|>",)

    def __init__(self) -> None:
        self.prompts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        return "\n".join(message["content"] for message in messages)

    def fits(self, prompt: str, sampling: SamplingConfig) -> bool:
        return True

    async def complete(self, prompt: str, n: int, seed: int, sampling: SamplingConfig) -> list[Completion]:
        self.prompts.append(prompt)
        words = random.Random(seed).sample(sorted(set(prompt.split())), k=min(60, len(set(prompt.split()))))
        return [
            Completion(text=" ".join(words), mean_logprob=-1.0, num_tokens=60, finish_reason="stop", seed=one)
            for one in range(seed, seed + n)
        ]


class Spy:
    """Encodes as the encoders do, and keeps every text."""

    def __init__(self, encoders: Encoders) -> None:
        self.encoders = encoders
        self.texts: list[str] = []

    def encode(self, tower: Tower, texts: Sequence[str]) -> np.ndarray:
        self.texts.extend(texts)
        return self.encoders.encode(tower, texts)

    def room(self, tower: Tower) -> int:
        return 10**6  # So that nothing of a history is cut.

    def counter(self, tower: Tower) -> CountTokens:
        return lambda text: 0


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StageRun]:
    """A workspace in which every stage up to `select` has run."""
    folder = tmp_path_factory.mktemp("canaries")
    config = Config.model_validate(
        {
            "name": "canaries",
            "storage": str(folder / "runs"),
            "prepare": {
                "domains": [{"name": "shop", "source": _world(folder)}],
                "min_item_interactions": 1,
                "shard_examples": 5,
                "partitions": 2,
            },
            "candidates": {"size": 5, "similar_users": 3},
            "rationales": {"sampling": {"gates": []}},
            "tree": {
                "breadths": [3, 1],
                "beam_width": 2,
                "neighbour_items": 30,
                "text": {"history_tokens": 400},
                "sampling": {"gates": []},
            },
            "select": {"selectors": ["thought_space", "log_likelihood", "sbert", "encoder_base", "random"]},
            "ranker": {"reason_tokens": 150, "max_tokens": 600},
        }
    )
    runs = plan(config)
    for run in runs.values():
        run.begin()
    _prepare(runs["prepare"])
    _candidates(runs["candidates"])
    folder = Path(runs["thought-space"].output("encoders").path)
    Encoders.create(config.thought_space.model, 256, shared=True).save(folder)
    return runs


def test_no_stage_shows_a_target(stages: dict[str, StageRun]) -> None:
    _rationales(stages["rationales"])
    _tree(stages["tree"])
    _select(stages["select"])
    _ranker(stages["ranker"])


def _rationales(stage: StageRun) -> None:
    """Phase I sees the train target, and nothing of what is held out."""
    worker = RationaleWorker(stage)
    worker.engine = parrot = Parrot()  # type: ignore[assignment]
    for part in stage.input("examples").parts("train"):
        for example in examples(stage.input("examples").read(part)):
            parrot.prompts.clear()
            asyncio.run(worker._write(example))
            _check(parrot.prompts, example, allowed=[("train", _user(example))])
            assert all(canary(_user(example), "train") in prompt for prompt in parrot.prompts)


def _tree(stage: StageRun) -> None:
    # Under the protocol that shows selectors the label: a beam must not see it even then.
    select = stage.config.select.model_copy(update={"protocol": "oracle"})
    worker = TreeWorker(replace(stage, config=stage.config.model_copy(update={"select": select})))
    worker.engine = parrot = Parrot()  # type: ignore[assignment]
    assert worker.agreement is not None
    worker.agreement.encoders = spy = Spy(worker.agreement.encoders)  # type: ignore[assignment]
    shown = compared = 0
    for part in stage.input("examples").parts():
        output: ShardOutput = asyncio.run(worker(part))
        assert not output.rejects
        stage.output("thoughts").write(part, output.tables["thoughts"])
        by_user: dict[int, list[str]] = {}
        for row in output.tables["thoughts"].to_pylist():
            by_user.setdefault(int(row["example_id"].split("/")[1][1:]), []).append(row["text"])
        for example in examples(stage.input("examples").read(part)):
            mine = [prompt for prompt in parrot.prompts if f"- own{_user(example):02d} | rated" in prompt]
            assert mine
            _check([*mine, *by_user[_user(example)]], example)
            shown += sum("similar taste" in prompt for prompt in mine)
            read = [text for text in spy.texts if f"- own{_user(example):02d} | rated" in text]
            compared += len(read)
            _check([*read, *(text for text in spy.texts if text in by_user[_user(example)])], example)
        parrot.prompts.clear()
        spy.texts.clear()
    assert shown, "no prompt showed a neighbour's items, so that door was not tried"
    assert compared == 3 * USERS, "the beam compares each tree with one behaviour"


def _select(stage: StageRun) -> None:
    worker = SelectWorker(stage)
    assert set(worker.encoders) == {"thought_space", "sbert", "encoder_base"}
    spies = [Spy(encoders) for encoders in worker.encoders.values()]
    worker.encoders = dict(zip(worker.encoders, spies, strict=True))  # type: ignore[arg-type]
    for part in stage.input("thoughts").parts():
        output = worker(part)
        stage.output("reasons").write(part, output.tables["reasons"])
        for example in examples(stage.input("examples").read(part)):
            for spy in spies:
                read = [text for text in spy.texts if f"- own{_user(example):02d} | rated" in text]
                assert len(read) == 1
                _check(read, example)
        for spy in spies:
            spy.texts.clear()


def _ranker(stage: StageRun) -> None:
    data = RankData(**{name: stage.input(name) for name in ("items", "examples", "candidates", "reasons")})
    items = catalogue.load(stage.input("items"))
    encoder = PromptEncoder(model.tokenizer(stage.config.ranker.model), stage.config.ranker)
    with_reason = 0
    for part in stage.input("examples").parts():
        by_id = {row.history.example_id: row for row in examples(stage.input("examples").read(part))}
        for variant in stage.config.ranker.variants:
            for row, target in data.rows(part, variant, items):
                example = by_id[row.history.example_id]
                prompt = encoder.prompt_text(row, items["shop"])
                _check([prompt], example)
                assert row.candidates[target].item_id == example.target_item
                assert all(
                    other.item_id != example.target_item for k, other in enumerate(row.candidates) if k != target
                )
                _check([item.text for item in row.candidates], example, allowed=[(example.split, _user(example))])
                with_reason += row.reason is not None
    assert with_reason == 3 * 3 * USERS


def _check(texts: Sequence[str], example: Example, allowed: Sequence[tuple[str, int]] = ()) -> None:
    """No text holds what came at or after the example's target, nor anything that is held out of another user."""
    user, place = _user(example), SPLITS.index(example.split)
    forbidden = {(split, user) for split in SPLITS[place:]}
    forbidden |= {(split, other) for other in range(USERS) if other != user for split in SPLITS[1:]}
    if allowed:  # A list of candidates may hold any item that the user never touches.
        forbidden = {entry for entry in forbidden if entry[1] == user}
    for split, owner in forbidden - set(allowed):
        for text in texts:
            assert canary(owner, split) not in text, (
                f"{example.history.example_id} sees {split} of user {owner}: {text}"
            )


def _user(example: Example) -> int:
    return int(example.history.user_id[1:])


def _world(folder: Path) -> dict[str, Any]:
    rng = random.Random(3)
    titles = {f"c{n}": f"common thing {n}" for n in range(COMMON)}
    reviews = []
    for user in range(USERS):
        # The review of the first item names its owner: only the owner's history shows it.
        taken = [f"own{user:02d}", *rng.sample([f"c{n}" for n in range(COMMON)], 6), *(f"{s}{user}" for s in SPLITS)]
        titles |= {f"own{user:02d}": f"own{user:02d}"} | {f"{s}{user}": canary(user, s) for s in SPLITS}
        for time, item in enumerate(taken):
            words = f"about {titles[item]} {'good ' * 3}"
            reviews.append(
                {
                    "reviewerID": f"u{user}",
                    "asin": item,
                    "overall": 5.0,
                    "reviewText": words,
                    "unixReviewTime": 1000 + time,
                }
            )
    _write(folder / "reviews.json.gz", reviews)
    _write(folder / "meta.json.gz", [{"asin": item, "title": title} for item, title in titles.items()])
    return {
        "kind": "amazon2018",
        "interactions": str(folder / "reviews.json.gz"),
        "items": str(folder / "meta.json.gz"),
    }


def _write(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    with gzip.open(path, "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _prepare(stage: StageRun) -> None:
    def each(step: Any, numbers: Sequence[tuple[int, ...]]) -> dict[int, dict[str, int]]:
        totals: dict[int, Counter[str]] = {domain: Counter() for domain, *_ in numbers}
        for entry in numbers:
            totals[entry[0]].update(step(stage, *entry))
        return {domain: dict(counts) for domain, counts in totals.items()}

    prepare(stage, each)


def _candidates(stage: StageRun) -> None:
    """Candidates and neighbours of an untrained SASRec: whom it finds similar does not matter here."""
    torch.manual_seed(0)
    keys = [(row["domain"], row["item_id"]) for row in _rows(stage.input("items").tables())]
    folder = Path(stage.output("sasrec").path)
    Sasrec(stage.config.candidates.sasrec, keys, stage.config.prepare.max_sequence).save(folder)
    exporter, indexer = ExportWorker(stage), IndexWorker(stage)
    for name in exports(stage):
        exporter(name)
    for domain in unindexed(stage):
        indexer(domain)
    worker = CandidateWorker(stage)
    for part in stage.input("examples").parts():
        output = worker(part)
        assert not output.rejects
        for name, data in output.tables.items():
            stage.output(name).write(part, data)


def _rows(tables: Iterator[Any]) -> list[dict[str, Any]]:
    return [row for data in tables for row in data.to_pylist()]
