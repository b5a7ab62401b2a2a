"""`pulse-ray serve`: help, dry run, and what it refuses before anything starts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pulse_ray import cli
from pulse_ray.serving import command
from tests.serving import shop


@pytest.fixture(autouse=True)
def _no_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PULSE_RAY_TOKENS", raising=False)


def _serve(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


def test_help_shows_examples_and_options() -> None:
    shown = _serve("--help")
    assert shown.exit_code == 0
    assert all(text in shown.stdout for text in ("pulse-ray serve", "--port", "--host", "--set", "--dry-run"))


def test_a_dry_run_touches_nothing_and_says_what_would_be_served(tmp_path: Path) -> None:
    path = shop.dump(shop.config(tmp_path / "runs"), tmp_path / "config.json")
    done = _serve(path, "--port", 9001, "--set", "serve.retrieve_k=3", "--dry-run")
    assert done.exit_code == 0, done.output
    resolved = json.loads(done.stdout)["serve"]
    assert (resolved["port"], resolved["retrieve_k"]) == (9001, 3)
    assert "variant 'thought_space'" in done.stderr
    assert "http://127.0.0.1:9001 (no tokens: this machine only" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_other_hosts_need_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shop.dump(shop.config(tmp_path / "runs"), tmp_path / "config.json")
    for more in ((), ("--dry-run",)):
        refused = _serve(path, "--host", "0.0.0.0", *more)
        assert refused.exit_code == 2
        assert "serve.host is 0.0.0.0, but there are no tokens" in refused.stderr
    monkeypatch.setenv("PULSE_RAY_TOKENS", "zyxwort quuxly")
    allowed = _serve(path, "--host", "0.0.0.0", "--dry-run")
    assert "(2 tokens" in allowed.stderr
    assert "zyxwort" not in allowed.output


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        ((), "holds no complete 'interactions'"),
        (("--set", "serve.variant=base"), "serve.variant is 'base'"),
        (("--port", "99999"), "'serve.port' is 99999"),
        (("--set", "serve.tokens_file=/no/such/file"), "cannot read serve.tokens_file"),
        (("--set", "serve.store=redis://127.0.0.1:1/0"), "holds no complete 'interactions'"),
    ],
)
def test_what_the_user_can_mend_takes_one_line(tmp_path: Path, arguments: tuple[str, ...], place: str) -> None:
    path = shop.dump(shop.config(tmp_path / "runs"), tmp_path / "config.json")
    done = _serve(path, *arguments)
    assert done.exit_code == 2, done.output
    assert place in done.stderr
    assert "Traceback" not in done.output


def test_a_store_that_is_down_is_one_line(tmp_path: Path) -> None:
    config = shop.config(tmp_path / "runs", serve={"store": "redis://127.0.0.1:1/0"})
    shop.make(config)
    done = _serve(shop.dump(config, tmp_path / "config.json"))
    assert done.exit_code == 2
    assert "the profile store redis://127.0.0.1:1/0 does not answer" in done.stderr


def test_the_printed_line_is_one_that_a_shell_understands(tmp_path: Path) -> None:
    line = command.curl(shop.config(tmp_path), "http://127.0.0.1:8000", "it's")
    words = subprocess.run(["bash", "-c", f"printf '%s\\n' {line}"], capture_output=True, text=True, check=True).stdout
    assert words.splitlines()[-1] == '{"user_id": "it\'s"}'
