"""Prompts by stage and version: Jinja2 files in the package, whose blocks are the pieces of a prompt.

A version's wording never changes once results were made with it: another wording is another version.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jinja2 import Template as JinjaTemplate

_SUFFIX = ".jinja"


def versions(stage: str) -> list[str]:
    """The versions of a stage's prompts that the package holds, sorted."""
    return sorted(file.name.removesuffix(_SUFFIX) for file in _folder(stage).iterdir() if file.name.endswith(_SUFFIX))


def sha(stage: str, version: str) -> str:
    """First 12 hex digits of the sha256 of a template: texts that were written under another one are stale."""
    return hashlib.sha256(_source(stage, version)).hexdigest()[:12]


def fill(stage: str, version: str, block: str, **values: str) -> str:
    """A block of a template as text, with `values` for its names, character by character.

    Raises:
        jinja2.UndefinedError: the block names a value that is not given.

    >>> fill("tree", "v1", "history", history="- Tea")
    'A customer bought these products, oldest first:\\n- Tea\\n\\n'
    """
    template = _parsed(stage, version)
    return "".join(template.blocks[block](template.new_context(dict(values))))


@lru_cache
def _parsed(stage: str, version: str) -> JinjaTemplate:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(undefined=StrictUndefined, autoescape=False)
    return environment.from_string(_source(stage, version).decode())


def _source(stage: str, version: str) -> bytes:
    return (_folder(stage) / f"{version}{_SUFFIX}").read_bytes()


def _folder(stage: str) -> Traversable:
    return files("pulse_ray") / stage / "templates"
