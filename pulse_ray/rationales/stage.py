"""The `rationales` stage: why users chose their targets, for training examples alone."""

from __future__ import annotations

from typing import Any

from pulse_ray import catalogue, templates
from pulse_ray.generation import gates, names
from pulse_ray.generation.engine import Completion, Engine
from pulse_ray.generation.gates import Flaw
from pulse_ray.generation.pool import generate
from pulse_ray.generation.together import together
from pulse_ray.rationales import prompts
from pulse_ray.runtime import ShardOutput
from pulse_ray.schema import Example, Reject, examples, table
from pulse_ray.seeding import derive
from pulse_ray.workspace import Part, StageRun


def run(stage: StageRun) -> dict[str, dict[str, float]]:
    """Reads items and training examples; writes rationales.

    Returns:
        By output, what the engines did for the parts made in this call (`generation.pool.generate`).
    """
    figures = generate(
        stage,
        stage.input("examples").parts("train"),
        RationaleWorker,
        stage,
        title="rationales: Phase I",
        max_reject_fraction=stage.config.rationales.max_reject_fraction,
    )
    return {"rationales": figures}


class RationaleWorker:
    """Writes the rationales of a part, all at the same time."""

    def __init__(self, stage: StageRun) -> None:
        self.stage = stage
        self.config = stage.config.rationales
        self.engine = Engine(stage.config.engine)
        self.items = catalogue.load(stage.input("items"))
        self.names = names.of_catalogue(self.items, self.config.sampling)

    async def __call__(self, part: Part) -> ShardOutput:
        given = list(examples(self.stage.input("examples").read(part)))
        written = await together(map(self._write, given))
        prompt_sha = templates.sha(prompts.STAGE, self.config.template)
        rows: list[dict[str, Any]] = []
        rejects: list[Reject] = []
        for example, rationale in zip(given, written, strict=True):
            key = example.history.example_id
            if isinstance(rationale, Flaw):
                rejects.append(Reject(key=key, reason=rationale.reason, detail=rationale.detail))
            else:
                rows.append(_row(key, self.stage.config.engine.model, prompt_sha, rationale))
        return ShardOutput(
            tables={"rationales": table("rationales", rows)},
            examples=len(given),
            rejects=rejects,
            figures={"tokens": sum(row["num_tokens"] for row in rows)},
        )

    async def _write(self, example: Example) -> Completion | Flaw:
        assert example.split == "train", f"{example.history.example_id} is held out"
        history, version, text = example.history, self.config.template, self.config.text
        items = self.items[history.domain]
        messages = prompts.rationale_messages(
            example,
            items,
            version=version,
            count=self.engine.count,
            max_tokens=text.history_tokens,
            review_words=text.review_words,
            special_tokens=self.engine.special_tokens,
        )
        request = gates.Request(
            prompt=self.engine.render(messages),
            task=prompts.instruction(version),
            opening=prompts.opening(version),
            reviews=gates.reviews(history, text.review_words),
            titles=gates.titles(history, items, [example.target_item]),
            names=self.names.get(history.domain),
        )

        def seed(attempt: int) -> int:
            return derive(self.stage.config.seed, "rationales", history.example_id, attempt)

        (drawn,) = await gates.draw(self.engine, request, self.config.sampling, seed)
        return drawn


def _row(example_id: str, model: str, prompt_sha: str, rationale: Completion) -> dict[str, Any]:
    return {
        "example_id": example_id,
        "text": rationale.text,
        "model": model,
        "prompt_sha": prompt_sha,
        "seed": rationale.seed,
        "finish_reason": rationale.finish_reason,
        "num_tokens": rationale.num_tokens,
    }
