"""Prompts by version: what is not there is told while settings are read, and what is used marks what was made."""

from __future__ import annotations

from pathlib import Path

import pytest

from pulse_ray import config, pipeline, templates
from pulse_ray.errors import ConfigError

SHOP = "name: run\nprepare: {domains: [{name: shop, source: {kind: synthetic}}]}\n"


@pytest.mark.parametrize("stage", ["rationales", "tree"])
@pytest.mark.parametrize("version", ["v0", "../tree/templates/v1", ""])
def test_an_unknown_version_is_refused_with_those_that_are_known(stage: str, version: str, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(SHOP)
    with pytest.raises(ConfigError, match=rf"{stage}.template: there is no template '{version}'; known are v1"):
        config.load(tmp_path / "run.yaml", [f"{stage}.template='{version}'"])


def test_a_value_that_is_missing_is_an_error_and_not_a_gap() -> None:
    with pytest.raises(Exception, match="'history' is undefined"):
        templates.fill("tree", "v1", "history")


def test_another_wording_makes_stale_what_was_written_with_it_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text(SHOP)
    settings = config.load(tmp_path / "run.yaml")
    before = {name: run.fingerprint for name, run in pipeline.plan(settings).items()}
    sha = templates.sha
    monkeypatch.setattr(templates, "sha", lambda stage, version: sha(stage, version)[:: -1 if stage == "tree" else 1])
    after = {name: run.fingerprint for name, run in pipeline.plan(settings).items()}
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"tree", "select", "ranker", "evaluate"}
