"""Trees for 64 users: ours, raw vLLM that is given a whole level at once, and ray.data.llm with a processor per level.

    python -m benchmarks.generation            # SmolLM2-135M and a tiny random model: about 45 minutes on two cores
    python -m benchmarks.generation --quick    # the tiny model and 16 users: some minutes
    python -m benchmarks.generation --smoke    # the tiny model, two users and trees of two thoughts: paths, not figures

All three grow the same trees with the same code, prompts, seeds and engine settings; what differs is who carries the
prompts to an engine and when. Ours is the `tree` stage on a local Ray. The ceiling is `vllm.LLM.generate`, one call for
each level, and only the time inside these calls counts. ray.data.llm gets a dataset for each level and starts an engine
for each, as one who uses it would; it has no siblings, so each is a row of its own.

Ours has an engine for each core (`--engines`) with a thread each, as its pool allows; the others have one engine that
computes with all cores, ray.data.llm one after another.

No start of an engine counts; `startup_s` is the rest of the wall-clock time. An engine has started when it wrote its
first token, as vLLM compiles a part of its sampler for that. Ours runs from when all engines have started to the last
part, with all prompts and tables; the ceiling counts what happens inside `generate`; ray.data.llm runs from the second
step of each level's engine to its last row. The share of prompt tokens that the prefix caches had is read from our
engines, and compared with what whole blocks of equal tokens allow when nothing is ever evicted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks._report import Size, parser, report, size
from pulse_ray import catalogue, models
from pulse_ray.config import Config, EngineConfig, SamplingConfig
from pulse_ray.generation.engine import CPU_BLOCK_TOKENS, Completion, Engine, prepare_environment, vllm_arguments
from pulse_ray.generation.pool import generate
from pulse_ray.runtime import ShardOutput, cluster
from pulse_ray.schema import histories
from pulse_ray.tree.growing import grow_tree
from pulse_ray.tree.stage import TreeWorker
from pulse_ray.workspace import Part, StageRun
from tests import tiny
from tests.histories import configure, tree_run

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
SYSTEMS = ("ceiling", "ours", "ray_data_llm")
WARMING = "Once"
"""What an engine reads first; it is not measured."""

SEED = 11
PARTS_IN_FLIGHT = 2
"""Of each of our engines, whose work is that many parts."""

QUIET_S = 0.5
"""When no tree has asked for anything this long, a level is complete."""

Figures = dict[str, Any]
Request = tuple[str, int, int]
"""A prompt, how many completions, and the seed of the first."""


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Which trees to grow, with which models, and how often."""

    only: str | None
    """One of the two models; None stands for what the command line says."""
    turns: int | None
    """Times that ours and the ceiling run; None stands for what the command line says."""
    users: int
    breadths: tuple[int, ...]
    max_tokens: int
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of the systems' processes."""


FULL = Sizes(only=None, turns=None, users=64, breadths=(3, 3), max_tokens=32)
QUICK = replace(FULL, only="tiny", turns=1, users=16)
# Compiling a part of the sampler, and a process for the ceiling's engine, take longer than the generation itself.
SMOKE = replace(
    QUICK,
    users=2,
    breadths=(1,),
    max_tokens=8,
    environment={"TORCH_COMPILE_DISABLE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
)
SIZES: Mapping[Size, Sizes] = {"full": FULL, "quick": QUICK, "smoke": SMOKE}


def main() -> int:
    """Measure every model and print the report."""
    command_line = parser("generation", __doc__, quick="the tiny model alone, 16 users, one turn: some minutes")
    command_line.add_argument(
        "--turns", type=int, default=2, help="times that ours and the ceiling run in the full size (default 2)"
    )
    command_line.add_argument(
        "--engines", type=int, default=os.cpu_count(), help="engines of ours (default: one for a core)"
    )
    command_line.add_argument("--only", choices=("tiny", "smollm2"), help="one of the two models in the full size")
    command_line.add_argument("--child", choices=SYSTEMS, help=argparse.SUPPRESS)
    command_line.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    options = command_line.parse_args()
    if options.child:
        print(json.dumps(_measure(options.child, **options.settings)))
        return 0
    chosen = size(options)
    sizes = SIZES[chosen]
    figures: Figures = {}
    with tempfile.TemporaryDirectory() as folder:
        both = {"tiny": str(tiny.make(Path(folder) / "tiny")), "smollm2": SMOLLM2}
        only = sizes.only or options.only
        turns = options.turns if sizes.turns is None else sizes.turns
        for name, model in both.items():
            if only in (None, name):
                settings = {"model": model, "chosen": chosen, "engines": options.engines}
                figures[name] = _compare(settings, turns, sizes)
    return report("generation", chosen, figures, _bars(figures))


def _bars(figures: Figures) -> dict[str, dict[str, Any]]:
    bars = {}
    for model, found in figures.items():
        for name, value, bar in (
            ("of_ceiling", found["ours"]["tokens_per_s"] / found["ceiling"]["tokens_per_s"], 0.9),
            ("over_ray_data_llm", found["ours"]["tokens_per_s"] / found["ray_data_llm"]["tokens_per_s"], 1.3),
            ("cached_of_possible", found["ours"]["cached_tokens"] / found["ours"]["possible_cached_tokens"], 0.95),
        ):
            bars[f"{model}_{name}"] = {"value": round(value, 3), "bar": bar, "holds": value >= bar}
    return bars


def _compare(settings: Figures, turns: int, sizes: Sizes) -> Figures:
    runs: dict[str, list[Figures]] = {system: [] for system in SYSTEMS}
    for turn in range(turns):
        # ray.data.llm, which is far from the bar and starts three engines, runs once.
        for system in SYSTEMS if turn == 0 else ("ours", "ceiling"):
            found = _child(system, settings, sizes)
            print(f"{settings['model']}, {system}: {found}", file=sys.stderr, flush=True)
            runs[system].append(found)
    return {system: _median(found) for system, found in runs.items()}


def _median(runs: Sequence[Figures]) -> Figures:
    """The run of median rate, and the rates of all."""
    rates = [run["tokens_per_s"] for run in runs]
    middle = runs[rates.index(statistics.median_low(rates))]
    return {**middle, "tokens_per_s_of_all_runs": rates}


def _child(system: str, settings: Figures, sizes: Sizes) -> Figures:
    command = [sys.executable, "-m", "benchmarks.generation", "--child", system, "--settings", json.dumps(settings)]
    root = str(Path(__file__).parents[1])
    environment = {**os.environ, **sizes.environment, "PYTHONPATH": root}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, cwd=root)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _measure(system: str, model: str, chosen: Size, engines: int) -> Figures:
    sizes = SIZES[chosen]
    users = sizes.users
    sampling = {"max_tokens": sizes.max_tokens, "attempts": 1, "gates": []}
    # The budget of blocks is no matter here: every prompt and its tree fit at once.
    engine = {"model": model, "dtype": "float32", "max_model_len": 1024, "max_num_seqs": 128, "kv_cache_gb": 4.0}
    engines = min(engines, users // PARTS_IN_FLIGHT)  # Each gets a part, or the others would wait for it for ever.
    if system == "ours":
        threads = max(1, (os.cpu_count() or 1) // engines)
        engine |= {"threads": threads, "pool": {"min": engines, "max": engines}, "shards_in_flight": PARTS_IN_FLIGHT}
    settings = {"seed": SEED, "engine": engine, "tree": {"breadths": sizes.breadths, "sampling": sampling}}
    with tempfile.TemporaryDirectory() as folder:
        part_users = users // (PARTS_IN_FLIGHT * engines)
        stage = tree_run(Config.model_validate(configure(Path(folder), users, settings)), part_users)
        os.environ["PULSE_RAY_STEPS"] = f"{folder}/steps"
        begun = time.time()
        measured = {"ceiling": _ceiling, "ours": _ours, "ray_data_llm": _ray_data_llm}[system](stage, Path(folder))
        wall_s = time.time() - begun
    return {
        **measured,
        "tokens_per_s": round(measured["tokens"] / measured["seconds"], 1),
        "seconds": round(measured["seconds"], 2),
        "startup_s": round(wall_s - measured["seconds"], 1),
    }


class Timed(TreeWorker):
    """Waits until all engines are up; then notes when it began, and what its engine was asked."""

    def __init__(self, stage: StageRun, folder: Path) -> None:
        super().__init__(stage)
        self.engine, self.folder = Asked(stage.config.engine), folder

    async def __call__(self, part: Part) -> ShardOutput:
        await self.engine.complete(WARMING, 1, 0, SamplingConfig(max_tokens=1))
        (self.folder / f"{os.getpid()}.up").touch()
        while len(list(self.folder.glob("*.up"))) < self.stage.config.engine.pool.max:
            await asyncio.sleep(0.1)
        begun = time.time()
        output = await super().__call__(part)
        note = {"begun": begun, "engine": os.getpid(), "asked": self.engine.asked}
        (self.folder / f"{part}.json").write_text(json.dumps(note))
        return output


class Asked(Engine):
    """Remembers its requests."""

    asked: list[tuple[str, int]]

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config)
        self.asked = []

    async def complete(self, prompt: str, n: int, *others: Any, **more: Any) -> list[Completion]:
        """As the engine does."""
        self.asked.append((prompt, n))
        return await super().complete(prompt, n, *others, **more)


def _ours(stage: StageRun, folder: Path) -> Figures:
    with cluster(stage.config.cluster):
        stage.begin()
        parts = stage.input("examples").parts()
        figures = generate(stage, parts, Timed, stage, folder, title="trees", max_reject_fraction=0.0)
    ended = max((Path(stage.output("thoughts").path) / f"{part}.parquet").stat().st_mtime for part in parts)
    notes = [json.loads((folder / f"{part}.json").read_text()) for part in parts]
    by_age = sorted(notes, key=lambda note: len(note["asked"]))
    asked = {note["engine"]: note["asked"] for note in by_age}  # An engine's last part knows all of its requests.
    return {
        **{name: int(value) for name, value in figures.items()},
        "possible_cached_tokens": sum(_possible(Engine(stage.config.engine), one) for one in asked.values()),
        "requests_by_engine": [len(one) for one in asked.values()],
        "seconds": ended - min(note["begun"] for note in notes),
    }


def _possible(engine: Engine, asked: Sequence[tuple[str, int]]) -> int:
    """Prompt tokens that a cache without bounds has when a request comes, in whole blocks, the last token never."""
    held: set[tuple[int, ...]] = set()
    found = 0
    for prompt, n in asked:
        tokens = tuple(engine._encode(prompt))
        for _ in range(n):
            ends = range(CPU_BLOCK_TOKENS, len(tokens) + 1, CPU_BLOCK_TOKENS)
            found += max((end for end in ends if end < len(tokens) and tokens[:end] in held), default=0)
            held.update(tokens[:end] for end in ends)
    return found


class Levels(Engine):
    """Collects what all trees ask for and hands it on a level at a time."""

    def __init__(self, config: EngineConfig, answer: Callable[[list[Request], SamplingConfig], list[str]]) -> None:
        super().__init__(config)
        self.answer = answer
        self.waiting: list[tuple[Request, asyncio.Future[list[Completion]]]] = []
        self.timer: asyncio.TimerHandle | None = None

    async def complete(
        self, prompt: str, n: int, seed: int, sampling: SamplingConfig, priority: int = 0
    ) -> list[Completion]:
        """`n` texts, as soon as the level is written."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Completion]] = loop.create_future()
        self.waiting.append(((prompt, n, seed), future))
        if self.timer:
            self.timer.cancel()
        self.timer = loop.call_later(QUIET_S, self._level, sampling)
        return await future

    def _level(self, sampling: SamplingConfig) -> None:
        waiting, self.waiting = self.waiting, []
        texts = iter(self.answer([request for request, _ in waiting], sampling))
        for (_, n, seed), future in waiting:
            future.set_result(
                [
                    Completion(
                        text=next(texts), mean_logprob=0.0, num_tokens=0, finish_reason="stop", seed=seed + place
                    )
                    for place in range(n)
                ]
            )


async def _grow_all(stage: StageRun, writer: Engine) -> None:
    items = catalogue.load(stage.input("items"))["shop"]
    given = [one for part in stage.input("examples").parts() for one in histories(stage.input("examples").read(part))]
    seed = stage.config.seed
    await asyncio.gather(*(grow_tree(writer, stage.config.tree, one, items, (), seed=seed) for one in given))


def _ceiling(stage: StageRun, folder: Path) -> Figures:
    config = stage.config.engine
    prepare_environment(config)
    from vllm import LLM, SamplingParams

    llm = LLM(**vllm_arguments(config, str(models.resolve(config.model))), disable_log_stats=True)
    llm.generate([WARMING], SamplingParams(max_tokens=1, logprobs=0), use_tqdm=False)
    measured = {"tokens": 0, "seconds": 0.0}

    def answer(requests: list[Request], sampling: SamplingConfig) -> list[str]:
        params = [
            SamplingParams(n=n, seed=seed, max_tokens=sampling.max_tokens, temperature=sampling.temperature, logprobs=0)
            for _, n, seed in requests
        ]
        started = time.perf_counter()
        found = llm.generate([prompt for prompt, _, _ in requests], params, use_tqdm=False)
        measured["seconds"] += time.perf_counter() - started
        outputs = [output for one in found for output in one.outputs]
        measured["tokens"] += sum(len(output.token_ids) for output in outputs)
        return [output.text for output in outputs]

    asyncio.run(_grow_all(stage, Levels(config, answer)))
    return measured


def _ray_data_llm(stage: StageRun, folder: Path) -> Figures:
    config = stage.config.engine
    prepare_environment(config)
    import ray
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    model = str(models.resolve(config.model))
    arguments = vllm_arguments(config, model) | {"distributed_executor_backend": "benchmarks._steps.Noting"}
    arguments.pop("model")
    notes = Path(os.environ["PULSE_RAY_STEPS"])
    measured = {"tokens": 0, "seconds": 0.0}

    def answer(requests: list[Request], sampling: SamplingConfig) -> list[str]:
        processor = build_processor(
            vLLMEngineProcessorConfig(
                model_source=model,
                engine_kwargs=arguments,
                batch_size=64,
                concurrency=1,
                chat_template_stage=False,
                placement_group_config={"bundle_per_worker": {"CPU": 1}},
            ),
            preprocess=lambda row: {
                "place": row["place"],
                "prompt": row["prompt"],
                "sampling_params": {
                    "seed": row["seed"],
                    "max_tokens": sampling.max_tokens,
                    "temperature": sampling.temperature,
                    "logprobs": 0,
                },
            },
            postprocess=lambda row: {
                "place": row["place"],
                "text": row["generated_text"],
                "tokens": row["num_generated_tokens"],
            },
        )
        siblings = [(prompt, seed + one) for prompt, n, seed in requests for one in range(n)]
        rows = [{"place": place, "prompt": prompt, "seed": seed} for place, (prompt, seed) in enumerate(siblings)]
        found = sorted(processor(ray.data.from_items(rows)).take_all(), key=lambda row: row["place"])
        measured["seconds"] += time.time() - float(notes.read_text().splitlines()[-1])
        measured["tokens"] += sum(row["tokens"] for row in found)
        return [row["text"] for row in found]

    # Each of its stages holds a logical CPU.
    ray.init(num_cpus=16, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    asyncio.run(_grow_all(stage, Levels(config, answer)))
    ray.shutdown()
    return measured


if __name__ == "__main__":
    sys.exit(main())
