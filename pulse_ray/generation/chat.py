"""A conversation as a model reads it: by its own chat template, whatever that template can do."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from pulse_ray.errors import ArtifactError, first_line

TODAY = date(2024, 7, 26)
"""What templates that ask for the day are told: a run that goes on tomorrow must write the same prompts.

It is the day that Llama's templates fall back on.
"""


def render(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    """A conversation up to where the model's own turn begins.

    Where the template has no place for a system text, it stands at the head of the first user turn. Models that would
    think aloud first are told not to: a completion is short, and all of it is the answer.

    Args:
        tokenizer: of transformers, with the model's chat template.
        messages: turns with `role` and `content`; the first may be the system's.

    Raises:
        ArtifactError: the model has no chat template, or one that takes no plain conversation.
    """
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ArtifactError(
            f"model '{tokenizer.name_or_path}' has no chat template",
            remedy="Use an instruction-tuned model, e.g. HuggingFaceTB/SmolLM2-135M-Instruct",
        )

    try:
        text = _apply(tokenizer, messages)
        # Some templates refuse a system text, others leave it out without a word.
        if messages[0]["role"] != "system" or messages[0]["content"].strip() in text:
            return text
    except TemplateError:
        pass
    try:
        return _apply(tokenizer, _merged(messages))
    except TemplateError as error:
        raise ArtifactError(
            f"the chat template of model '{tokenizer.name_or_path}' takes no plain conversation: {first_line(error)}",
            remedy="Use an instruction-tuned model whose template takes a user turn and an answer",
        ) from error


def _apply(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,
            strftime_now=TODAY.strftime,
        )
    )


def _merged(messages: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    if messages[0]["role"] != "system":
        return list(messages)
    system, user, *more = messages
    return [{"role": "user", "content": f"{system['content']}\n\n{user['content']}"}, *more]
