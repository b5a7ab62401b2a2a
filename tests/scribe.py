"""A stand-in for the engine, which writes at once and remembers what it was asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pulse_ray.config import SamplingConfig
from pulse_ray.generation.engine import Completion


class Scribe:
    """Writes what `answer` makes of a prompt and a seed."""

    special_tokens = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")

    def __init__(self, answer: Callable[[str, int], str]) -> None:
        self.answer = answer
        self.prompts: list[str] = []

    def count(self, text: str) -> int:
        return len(text.split())

    def render(self, messages: Sequence[dict[str, str]]) -> str:
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)

    def fits(self, prompt: str, sampling: SamplingConfig) -> bool:
        return self.count(prompt) < 1000

    def turn(self) -> int:
        return 0

    async def complete(
        self, prompt: str, n: int, seed: int, sampling: SamplingConfig, priority: int = 0
    ) -> list[Completion]:
        self.prompts.append(prompt)
        return [
            Completion(text=self.answer(prompt, one), mean_logprob=-1.0, num_tokens=9, finish_reason="stop", seed=one)
            for one in range(seed, seed + n)
        ]
