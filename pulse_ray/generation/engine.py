"""A language model that writes: vLLM's asynchronous engine, one per actor, behind three questions.

How many tokens has this text, what does the model read for this conversation, and what does it write? The engine starts
with the first completion, so that an error of it reaches the caller like any other.
"""

from __future__ import annotations

import asyncio
import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the model wrote.

    `mean_logprob` is the mean log-probability of the generated tokens under the model, before temperature.
    `finish_reason` is `stop` where the model ended by itself and `length` where it ran into `max_tokens`.
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
        self._llm: Any = None
        self._ids = itertools.count()

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

    async def complete(self, prompt: str, n: int, seed: int, sampling: SamplingConfig) -> list[Completion]:
        """`n` completions of a rendered prompt, which is read once. Their seeds are `seed`, `seed + 1`, …

        Raises:
            GenerationError: the engine cannot start, or has died.
        """
        if self._llm is None:
            self._start()
        # Tokens rather than text: the template already wrote the opening token, which must not come twice.
        tokens = self._encode(prompt)
        return list(await asyncio.gather(*(self._draw(tokens, seed + place, sampling) for place in range(n))))

    def close(self) -> None:
        """Ends the engine's processes. They also end by themselves when this process does."""
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
            self._watcher.communicate()

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    async def _draw(self, tokens: list[int], seed: int, sampling: SamplingConfig) -> Completion:
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        params = SamplingParams(
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=seed,
            logprobs=0,  # The sampled token's alone: without it vLLM does not add them up.
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        stream = self._llm.generate(TokensPrompt(prompt_token_ids=tokens), params, f"completion-{next(self._ids)}")
        try:
            results = [result async for result in stream]
        except (EngineDeadError, EngineGenerateError) as error:
            raise GenerationError(
                f"the engine of '{self.config.model}' failed while it wrote: {first_line(error)}",
                remedy="Run again to go on; if it was short of memory, lower engine.max_num_seqs or engine.kv_cache_gb",
            ) from error
        output = results[-1].outputs[0]
        return Completion(
            text=output.text,
            mean_logprob=output.cumulative_logprob / max(1, len(output.token_ids)),
            num_tokens=len(output.token_ids),
            finish_reason=output.finish_reason,
            seed=seed,
        )

    def _start(self) -> None:
        """Starts vLLM's processes; it blocks, as nothing else could be done meanwhile."""
        self._watcher = reaper.watch()
        try:
            self._llm = _start_vllm(self.config, str(models.resolve(self.config.model)))
        except Exception as error:  # vLLM raises errors of many kinds, and all mean that it cannot run like this.
            raise GenerationError(
                f"vLLM cannot start '{self.config.model}': {first_line(error)}",
                remedy="Check memory (engine.kv_cache_gb, engine.gpu_memory_utilization), engine.dtype and "
                "engine.max_model_len; the cause stands in the logs of the Ray session",
            ) from error


def _start_vllm(config: EngineConfig, folder: str) -> Any:
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    # A forked child would not carry the reaper's mark.
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"
    # Ray sets it to the actor's logical CPUs, which say how many actors share a node, not how fast one may be.
    threads = config.threads or max(1, len(os.sched_getaffinity(0)) // config.tensor_parallel)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # Pinned, two engines of one node would sit on the same cores; and pinning keeps one core free of work.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from vllm import AsyncEngineArgs
    from vllm.platforms import current_platform
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    on_cpu: dict[str, Any] = {}
    if current_platform.is_cpu():
        if config.tensor_parallel == 1:
            # The name "uni" would be taken for "mp", whose scheduler keeps a core busy while it waits for its worker.
            on_cpu["distributed_executor_backend"] = UniProcExecutor
        on_cpu |= {
            "kv_cache_memory_bytes": int(config.kv_cache_gb * 2**30),
            "block_size": CPU_BLOCK_TOKENS,
            # vLLM's CPU sampler cannot take back the draw of a seeded request whose prompt is only partly read.
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(CPU_BATCH_TOKENS, config.max_model_len),
        }
    return AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=folder,
            dtype=config.dtype,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            tensor_parallel_size=config.tensor_parallel,
            gpu_memory_utilization=config.gpu_memory_utilization,
            enforce_eager=not config.compile,
            enable_prefix_caching=True,
            disable_log_stats=True,
            generation_config="vllm",  # Sampling is ours to set, not the model folder's.
            **on_cpu,
        )
    )
