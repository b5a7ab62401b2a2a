"""Imports form layers, heavy libraries stay where they belong, and what `--help` and `status` need stays light."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

LAYERS = [
    *("errors", "schema", "seeding", "templates", "config", "metrics", "text"),
    *("workspace", "catalogue", "progress", "runtime"),
    *("models", "cpu", "training", "generation"),
    *("data", "candidates", "rationales", "thought_space", "tree", "selection", "ranker", "evaluation"),
    *("serving", "pipeline", "overview", "doctor"),
    *("scoring", "submission", "cli"),
]
"""A module imports only from its own package and from layers before it."""

STAGE_PACKAGES = ("data", "candidates", "rationales", "thought_space", "tree", "selection", "ranker", "evaluation")

SHARED = {
    "data.files": ("pipeline", "submission"),
    "candidates.check": ("cli",),
    "candidates.retrieval": ("serving.app", "scoring.worker"),
    "thought_space.encoders": ("tree.stage", "selection.*"),
    "thought_space.agreement": ("tree.stage", "selection.stage", "serving.reasoning"),
    "tree.growing": ("serving.*",),
    "tree.search": ("serving.*",),
    "selection.selectors": ("serving.*",),
    "*.prompts": ("pipeline", "evaluation.stage", "serving.*", "scoring.*"),
    "ranker.scorer": ("evaluation.stage", "serving.*", "scoring.worker"),
    "ranker.packing": ("serving.*",),
}
"""What a stage's package lends to modules outside of it. Anything else of it is its own business."""

LIBRARIES = {
    "ray": ("runtime", "training.*", "generation.pool", "*.stage", "serving.app", "submission", "cli"),
    "vllm": ("generation.engine",),
    "torch": (
        *("models", "cpu", "training.*", "candidates.sasrec", "candidates.losses", "thought_space.*"),
        *("ranker.packing", "ranker.attention*", "ranker.last_layer", "ranker.model", "ranker.loop", "ranker.scorer"),
    ),
    "deepspeed": ("training.worker",),
    "tensorboardX": ("training.fitting",),
    "transformers": ("models", "generation.engine", "thought_space.encoders", "thought_space.flat", "ranker.*"),
    "peft": ("ranker.model",),
    "sentence_transformers": ("thought_space.encoders", "thought_space.flat"),
    "faiss": ("candidates.neighbours", "candidates.retrieval"),
    "polars": ("data.*",),
    "sklearn": ("evaluation.*",),
    "matplotlib": ("evaluation.*",),
    "py3langid": ("generation.language",),
    "jinja2": ("templates", "generation.chat", "evaluation.report"),
    "fastapi": ("serving.*",),
    "starlette": ("serving.*",),
    "prometheus_client": ("serving.*",),
    "redis": ("serving.store",),
}
"""Which modules may import a heavy library, at all: inside functions too."""

LIGHT = ("cli", "pipeline", "overview", "doctor", "tree.search", "tree.growing")
"""Importing these must import no heavy library, through whatever they import at module level."""


@dataclass(frozen=True)
class Import:
    """`importer` names modules without the package's own name; `target` likewise where it is one of ours."""

    importer: str
    target: str
    ours: bool
    line: int
    at_import: bool
    """Happens when the importing module is imported: not inside a function, not for type checkers alone."""


def _imports(importer: str, source: str, known: set[str]) -> Iterator[Import]:
    def visit(node: ast.AST, runs: bool, checked_only: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import | ast.ImportFrom) and not checked_only:
                for name in _names(child, importer, known):
                    ours = name == "pulse_ray" or name.startswith("pulse_ray.")
                    target = name.removeprefix("pulse_ray").lstrip(".")
                    yield Import(importer, target, ours, child.lineno, runs)
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typing = isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING")
            yield from visit(child, runs and not inside, checked_only or typing)

    yield from visit(ast.parse(source), True, False)


def _names(node: ast.Import | ast.ImportFrom, importer: str, known: set[str]) -> Iterator[str]:
    """Full names of the imported modules: `from pulse_ray import models` imports `pulse_ray.models`."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        package = f"pulse_ray.{importer}".split(".")[: -node.level]
        base = ".".join([*package, *([base] if base else [])])
    for alias in node.names:
        inner = f"{base}.{alias.name}".removeprefix("pulse_ray.")
        yield f"pulse_ray.{inner}" if base.startswith("pulse_ray") and inner in known else base


def _sources() -> dict[str, str]:
    """Source of every module by its name below the package; a package's `__init__` goes by the package's name."""
    package = ROOT / "pulse_ray"
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def _matches(module: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(module, pattern) for pattern in patterns)


def violations(sources: Mapping[str, str]) -> list[str]:
    """What is wrong with the imports of modules, given as name → source; one line each."""
    known = set(sources)
    imports = [entry for name, source in sources.items() for entry in _imports(name, source, known)]
    ours = [entry for entry in imports if entry.ours and entry.target]
    found = [f"{name}: in no layer" for name in sources if name and name.split(".")[0] not in LAYERS]
    if not found:
        found += [line for entry in ours for line in _border(entry)]
    found += [
        f"{entry.importer}:{entry.line}: may not import {library}"
        for entry in imports
        if not entry.ours and (library := entry.target.split(".")[0]) in LIBRARIES
        if not _matches(entry.importer, LIBRARIES[library])
    ]
    return found + _weight(imports) + _cycle(ours)


def _border(entry: Import) -> Iterator[str]:
    importer, target = entry.importer.split(".")[0], entry.target.split(".")[0]
    where = f"{entry.importer}:{entry.line}"
    if importer != target and LAYERS.index(target) > LAYERS.index(importer or "errors"):
        yield f"{where}: imports {entry.target}, a later layer"
    if importer != target and target in STAGE_PACKAGES:
        lenders = [users for pattern, users in SHARED.items() if fnmatchcase(entry.target, pattern)]
        if not any(_matches(entry.importer, users) for users in lenders):
            yield f"{where}: imports {entry.target}, which that stage does not share with it"


def _weight(imports: list[Import]) -> list[str]:
    """Heavy libraries that come along when a light module is imported."""
    found = []
    for light in LIGHT:
        reached, todo = {light}, [light]
        while todo:
            module = todo.pop()
            for entry in imports:
                if entry.importer != module or not entry.at_import:
                    continue
                if not entry.ours and entry.target.split(".")[0] in LIBRARIES:
                    found.append(f"{light}: importing it imports {entry.target} in {module}:{entry.line}")
                if entry.ours and entry.target not in reached:
                    reached.add(entry.target)
                    todo.append(entry.target)
    return found


def _cycle(ours: list[Import]) -> list[str]:
    graph: dict[str, set[str]] = {}
    for entry in ours:
        graph.setdefault(entry.importer, set()).add(entry.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"modules import each other: {' ← '.join(error.args[1])}"]
    return []


def test_the_package_keeps_its_layers() -> None:
    assert violations(_sources()) == []


@pytest.mark.parametrize(
    ("sources", "complaint"),
    [
        ({"text": "from pulse_ray.workspace import Workspace", "workspace": ""}, "text:1: imports workspace, a later"),
        ({"text": "def f():\n    from pulse_ray import cli", "cli": ""}, "text:2: imports cli, a later layer"),
        ({"tree.stage": "import pulse_ray.data.stage", "data.stage": ""}, "imports data.stage, which that stage"),
        ({"tree.prompts": "def f():\n    import torch.nn"}, "tree.prompts:2: may not import torch"),
        ({"tree.prompts": "from vllm import LLM"}, "tree.prompts:1: may not import vllm"),
        ({"config": "class A:\n    import ray"}, "config:2: may not import ray"),
        ({"drawer": ""}, "drawer: in no layer"),
        ({"data.a": "from . import b", "data.b": "from pulse_ray.data.a import x"}, "modules import each other"),
        (
            {"cli": "from pulse_ray import runtime", "runtime": "import ray"},
            "cli: importing it imports ray in runtime:1",
        ),
    ],
)
def test_the_checker_sees(sources: dict[str, str], complaint: str) -> None:
    assert any(complaint in line for line in violations(sources)), violations(sources)


@pytest.mark.parametrize(
    "sources",
    [
        {"text": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch"},
        {"cli": "def f():\n    from pulse_ray.runtime import cluster", "runtime": "import ray"},
        {"selection.stage": "from pulse_ray.thought_space.encoders import E", "thought_space.encoders": "import torch"},
    ],
)
def test_the_checker_allows(sources: dict[str, str]) -> None:
    assert violations(sources) == []
