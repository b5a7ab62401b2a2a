"""A language model that writes: vLLM's asynchronous engine, one per actor, behind three questions.

How many tokens has this text, what does the model read for this conversation, and what does it write? The engine starts
with the first completion, so that an error of it reaches the caller like any other. One that died is started again by
the next completion.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from pulse_ray import models
from pulse_ray.config import EngineConfig, SamplingConfig
from pulse_ray.errors import ArtifactError, GenerationError, first_line
from pulse_ray.generation import chat, reaper
from pulse_ray.text import control_tokens

Message = dict[str, str]
"""One turn of a conversation: `role` (system, user, assistant) and `content`."""

CPU_BLOCK_TOKENS = 32
"""Tokens in a block of the CPU cache. Prefixes are shared in whole blocks; vLLM's default of 128 would share few."""

CPU_BATCH_TOKENS = 4096
"""Prompt tokens that one step of the engine reads on CPU."""

ENCODED_TEXTS = 256
"""Texts whose tokens are remembered: a prompt is counted before it is sent."""


RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Ranks of LoRA that vLLM makes room for (its `MaxLoRARanks`)."""


class EngineDeathError(GenerationError):
    """The engine's processes are gone, and with them all that it was writing. The next completion starts it again."""


class RequestError(GenerationError):
    """One request failed; the engine goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model wrote.

    `mean_logprob` is the mean log-probability of the generated tokens under the model, before temperature.
    `finish_reason` is `stop` where the model ended by itself or wrote a stop string, `length` where it ran into
    `max_tokens`.
    """

    text: str
    mean_logprob: float
    num_tokens: int
    finish_reason: str
    seed: int


class Engine:
    """A model and its tokenizer. To be used from one event loop.

    Args:
        config: the model and how to run it.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.usage = Usage()
        self._llm: Any = None
        self._ids, self._turns = itertools.count(), itertools.count()
        self._encode = lru_cache(maxsize=ENCODED_TEXTS)(self._tokens)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, from its folder.

        Raises:
            ArtifactError: the model does not resolve, or its tokenizer cannot be read.
        """
        from transformers import AutoTokenizer

        folder = models.resolve(self.config.model)
        try:
            return AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"model '{self.config.model}' has no tokenizer that can be read: {first_line(error)}",
                remedy=f"Check the files in {folder}",
            ) from error

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Texts that the tokenizer reads as control tokens; they must not come from users (`text.neutralise`)."""
        return control_tokens(self.tokenizer)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self._encode(text))

    def render(self, messages: Sequence[Message]) -> str:
        """A conversation as the model reads it, up to where its own turn begins.

        Raises:
            ArtifactError: the model has no chat template.
        """
        return chat.render(self.tokenizer, messages)

    def fits(self, prompt: str, sampling: SamplingConfig) -> bool:
        """Whether a prompt leaves room for a whole completion."""
        return self.count(prompt) + sampling.max_tokens <= self.config.max_model_len

    def turn(self) -> int:
        """A priority for what belongs together: who asks for one later has a higher number, and waits."""
        return next(self._turns)

    async def complete(
        self, prompt: str, n: int, seed: int, sampling: SamplingConfig, priority: int = 0
    ) -> list[Completion]:
        """`n` completions of a rendered prompt, which is read once. Their seeds are `seed`, `seed + 1`, …

        Args:
            priority: of what waits, the lowest number is read first.

        Raises:
            GenerationError: the engine cannot start.
            EngineDeathError: it died meanwhile.
            RequestError: it refused or broke off this request.
        """
        from vllm import TokensPrompt
        from vllm.v1.engine.exceptions import EngineDeadError

        self.start()
        llm = self._llm
        # Greedy siblings are all the same, and vLLM refuses to write more than one.
        drawn = n if sampling.temperature > 0 else 1
        # Tokens rather than text: the template already wrote the opening token, which must not come twice.
        stream = llm.generate(
            TokensPrompt(prompt_token_ids=self._encode(prompt)),
            _sampling_params(sampling, drawn, seed),
            f"completion-{next(self._ids)}",
            lora_request=self._adapter(sampling.adapter),
            priority=priority,
        )
        try:
            outputs = [result async for result in stream][-1].outputs
        except Exception as error:  # Of any kind: vLLM checks requests in many places.
            if isinstance(error, EngineDeadError) or llm.errored:
                if self._llm is llm:
                    self.close()
                raise EngineDeathError(
                    f"the engine of '{self.config.model}' died while it wrote",
                    remedy="Run again to go on; if it lacked memory, lower engine.max_num_seqs or engine.kv_cache_gb",
                ) from error
            raise RequestError(
                f"'{self.config.model}' refused a prompt: {first_line(error.__cause__ or error)}",
                remedy="Check max_tokens and engine.max_model_len",
            ) from error
        if broken := {output.finish_reason for output in outputs} & {"abort", "error"}:
            raise RequestError(f"'{self.config.model}' broke off a request: {broken}", remedy="Run again")
        return [_completion(output, seed + place) for place, output in enumerate(outputs * (n // drawn))]

    def start(self) -> None:
        """Starts vLLM's processes, if they do not run; it blocks, as nothing else could be done meanwhile.

        Raises:
            GenerationError: they do not come up.
        """
        if self._llm is not None:
            return
        folder, adapters = models.resolve(self.config.model), self._adapters
        rank = _max_rank(adapters.values())
        self._watcher = reaper.watch()
        try:
            self._llm = _start_vllm(self.config, str(folder), len(adapters), rank, self.usage)
        except Exception as error:  # vLLM raises errors of many kinds, and all mean that it cannot run like this.
            self._watcher.communicate()
            raise GenerationError(
                f"vLLM cannot start '{self.config.model}': {first_line(error)}",
                remedy="Check memory (engine.kv_cache_gb, engine.gpu_memory_utilization), engine.dtype and "
                "engine.max_model_len; the cause stands in the logs of the Ray session",
            ) from error

    def close(self) -> None:
        """Ends the engine's processes. They also end by themselves when this process does."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
            self._watcher.communicate()

    def _tokens(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    @cached_property
    def _adapters(self) -> dict[str, Path]:
        return {name: models.resolve(folder, models.ADAPTER) for name, folder in self.config.adapters.items()}

    def _adapter(self, name: str | None) -> Any:
        from vllm.lora.request import LoRARequest

        if name is None:
            return None
        return LoRARequest(name, 1 + list(self._adapters).index(name), str(self._adapters[name]))


@dataclass(kw_only=True, slots=True)
class Usage:
    """What an engine's prefix cache did, as the engine counts it: tokens of all prompts, and those that it had."""

    prompt_tokens: int = 0
    cached_tokens: int = 0


def _sampling_params(sampling: SamplingConfig, n: int, seed: int) -> Any:
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    return SamplingParams(
        n=n,
        max_tokens=sampling.max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        stop=list(sampling.stop),
        seed=seed,
        logprobs=0,  # The sampled token's alone: without it vLLM does not add them up.
        output_kind=RequestOutputKind.FINAL_ONLY,  # With siblings, any other kind gives them one by one.
    )


def _completion(output: Any, seed: int) -> Completion:
    return Completion(
        text=output.text,
        mean_logprob=output.cumulative_logprob / max(1, len(output.token_ids)),
        num_tokens=len(output.token_ids),
        finish_reason=output.finish_reason,
        seed=seed,
    )


def _max_rank(adapters: Iterable[Path]) -> int:
    """The least of the ranks that vLLM makes room for which holds all adapters.

    Raises:
        ArtifactError: an adapter says nothing of its rank, or has a larger one than vLLM takes.
    """
    found = RANKS[0]
    for folder in adapters:
        rank = json.loads((folder / models.ADAPTER).read_text()).get("r")
        fitting = [room for room in RANKS if rank and room >= rank]
        if not fitting:
            raise ArtifactError(
                f"adapter {folder} has rank {rank}", remedy=f"Use a LoRA of PEFT of rank 1 to {RANKS[-1]}"
            )
        found = max(found, fitting[0])
    return found


def _start_vllm(config: EngineConfig, folder: str, adapters: int, max_rank: int, usage: Usage) -> Any:
    prepare_environment(config)
    from vllm import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.metrics.loggers import StatLoggerBase

    class Counting(StatLoggerBase):  # type: ignore[misc]
        """Adds up what the scheduler says of its prefix cache."""

        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None: ...

        def record(self, scheduler_stats: Any, *others: Any, **more: Any) -> None:
            if scheduler_stats is not None:
                usage.prompt_tokens += scheduler_stats.prefix_cache_stats.queries
                usage.cached_tokens += scheduler_stats.prefix_cache_stats.hits

        def log_engine_initialized(self) -> None: ...

    special: dict[str, Any] = {}
    if adapters:
        special = {"enable_lora": True, "max_loras": adapters, "max_lora_rank": max_rank}
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(**vllm_arguments(config, folder), **special), stat_loggers=[Counting]
    )


def prepare_environment(config: EngineConfig) -> None:
    """What vLLM reads from the environment; to be called before it is imported."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A forked child would not carry the reaper's mark.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # Ray sets it to the actor's logical CPUs, which say how many actors share a node, not how fast one may be.
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.tensor_parallel)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Pinned, two engines of one node would sit on the same cores; and pinning keeps one core free of work.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"


def vllm_arguments(config: EngineConfig, folder: str) -> dict[str, Any]:
    """The settings as vLLM's `EngineArgs` knows them, for the platform that it finds here."""
    from vllm.platforms import current_platform
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    arguments: dict[str, Any] = {
        "model": folder,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "max_model_len": config.max_model_len,
        "max_num_seqs": config.max_num_seqs,
        "tensor_parallel_size": config.tensor_parallel,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "enforce_eager": not config.compile,
        "enable_prefix_caching": True,
        # What began first is finished first: its prefix is used while the cache still holds it.
        "scheduling_policy": "priority",
        "generation_config": "vllm",  # Sampling is ours to set, not the model folder's.
    }
    if not current_platform.is_cpu():
        return arguments
    if config.tensor_parallel == 1:
        # The name "uni" would be taken for "mp", whose scheduler keeps a core busy while it waits for its worker.
        arguments["distributed_executor_backend"] = UniProcExecutor
    return arguments | {
        "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30),
        "block_size": CPU_BLOCK_TOKENS,
        # vLLM's CPU sampler cannot take back the draw of a seeded request whose prompt is only partly read.
        "enable_chunked_prefill": False,
        "max_num_batched_tokens": max(CPU_BATCH_TOKENS, config.max_model_len),
    }
