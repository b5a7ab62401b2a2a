"""Which completions are kept, and what happens to the others."""

from __future__ import annotations

import asyncio

import pytest
from scribe import Scribe

from pulse_ray.config import SamplingConfig
from pulse_ray.generation.engine import Completion
from pulse_ray.generation.gates import Flaw, draw, fault

INSTRUCTION = "Say in two short sentences what this customer will want next and why."
GOOD = "The customer wants creams without perfume, because scented ones made the skin itch."


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (GOOD, None),
        ("", "empty"),
        (" \n!? ", "empty"),
        ("Hand cream.", "too short"),
        ("soft and warm and soft and warm and soft and warm and soft and warm", "repeats itself"),
        ("Say in two short sentences what this customer will want next.", "copies the instruction"),
    ],
)
def test_degenerate_texts_are_told_from_good_ones(text: str, reason: str | None) -> None:
    assert fault(text, INSTRUCTION, 5) == reason


def _draw(scribe: Scribe, prompt: str = "prompt", attempts: int = 3) -> Completion | Flaw:
    (drawn,) = asyncio.run(
        draw(scribe, prompt, INSTRUCTION, SamplingConfig(attempts=attempts), lambda attempt: 10 + attempt)
    )
    return drawn


def test_a_flawed_completion_is_drawn_again_with_the_next_seed() -> None:
    scribe = Scribe(lambda prompt, seed: GOOD if seed == 12 else "No.")
    kept = _draw(scribe)
    assert isinstance(kept, Completion)
    assert (kept.text, kept.seed, len(scribe.prompts)) == (GOOD, 12, 3)


def test_an_opening_is_read_by_the_model_and_stands_before_what_it_adds() -> None:
    scribe = Scribe(lambda prompt, seed: " creams without perfume, as scent made the skin itch.")
    (kept,) = asyncio.run(draw(scribe, "prompt ", INSTRUCTION, SamplingConfig(), lambda attempt: 1, "They want"))
    assert isinstance(kept, Completion)
    assert scribe.prompts == ["prompt They want"]
    assert kept.text == "They want creams without perfume, as scent made the skin itch."


def test_after_the_last_attempt_the_reason_is_told() -> None:
    assert _draw(Scribe(lambda prompt, seed: "No."), attempts=2) == Flaw(reason="too short", detail="No.")


def test_a_prompt_that_does_not_fit_is_not_sent() -> None:
    scribe = Scribe(lambda prompt, seed: GOOD)
    flaw = _draw(scribe, prompt="word " * 2000)
    assert isinstance(flaw, Flaw)
    assert flaw.reason == "prompt too long"
    assert not scribe.prompts
