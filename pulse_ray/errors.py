"""Errors that a user can act on.

    PulseError
    ├── ConfigError       a setting is wrong: names the key, the value and what is allowed
    ├── DataError         an input file or table is wrong: names file, line and column
    ├── ArtifactError     a workspace artefact or a model is missing, stale or damaged
    ├── GenerationError   an engine failed, or too many completions were rejected
    └── TrainingError     training cannot go on: names the step and the last good checkpoint

Every error says what happened in one line and what to do about it in another. The command line prints both and
exits with code 2; anything that is not a `PulseError` is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class PulseError(Exception):
    """Something that the user can mend.

    Args:
        message: what happened and where, in one line.
        remedy: what to do about it, in one line.
    """

    def __init__(self, message: str, *, remedy: str) -> None:
        super().__init__(message, remedy)
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}. {self.remedy}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive the default pickling, and errors cross Ray's process borders.
        return (_rebuild, (type(self), self.message, self.remedy))


def _rebuild(kind: type[PulseError], message: str, remedy: str) -> PulseError:
    return kind(message, remedy=remedy)


class ConfigError(PulseError):
    """A setting is unknown, of the wrong type, out of range or in conflict with another."""


class DataError(PulseError):
    """An input cannot be read, or too many of its rows cannot be used."""


class ArtifactError(PulseError):
    """A workspace artefact or a model's weights are missing, stale or damaged."""


class GenerationError(PulseError):
    """An engine cannot start or keeps failing, or more completions than allowed were rejected."""


class TrainingError(PulseError):
    """Training diverged, ran out of memory or lost its workers for good."""


def to_values(error: PulseError) -> list[str]:
    """An error as plain values, for a table of results: Ray wraps raised errors in its own and tries them again."""
    return [type(error).__name__, error.message, error.remedy]


def from_values(values: Sequence[str]) -> PulseError:
    """The error that `to_values` was given."""
    name, message, remedy = values
    kinds: list[type[PulseError]] = [PulseError, *PulseError.__subclasses__()]
    return next(kind for kind in kinds if kind.__name__ == name)(message, remedy=remedy)


def first_line(error: BaseException) -> str:
    """What a library's error says, without what follows: some append pages."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
