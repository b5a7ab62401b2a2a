"""The command: light help, plans that touch nothing, and one line with exit code 2 for what the user can mend."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from pulse_ray import cli, doctor, overview, pipeline
from pulse_ray.config import load
from pulse_ray.workspace import StageSpec

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"
HEAVY = ("torch", "ray", "transformers", "vllm", "deepspeed", "polars", "pyarrow", "pydantic")


def _call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def _complaint(result: Result) -> str:
    """The one line of an error that the user can mend."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert result.stderr.endswith(f"{lines[0]}\n")
    assert "Traceback" not in result.output
    return lines[0]


def _reviews(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return path


def _review(user: int, item: int, time: int = 1_500_000_000) -> dict[str, Any]:
    return {
        "reviewerID": f"u{user}",
        "asin": f"i{item}",
        "overall": 5.0,
        "reviewText": "Just what was wanted.",
        "summary": "Good",
        "unixReviewTime": time,
    }


GOOD = [_review(user, item, 1_500_000_000 + item) for user in range(6) for item in range(6)]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration of a small Amazon file; the file itself is up to the test."""
    source = {"kind": "amazon2018", "interactions": str(tmp_path / "reviews.json.gz")}
    settings = {
        "name": "small",
        "storage": str(tmp_path / "runs"),
        "prepare": {"domains": [{"name": "shop", "source": source}], "partitions": 1, "downloads": str(tmp_path)},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['pulse-ray', '--help']\n"
        "from pulse_ray.cli import main\n"
        "try: main()\n"
        f"finally: print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert all(name in done.stdout for name in ("run", "status", "doctor", "models", *cli.STAGES))


def test_there_is_a_command_for_every_stage_with_an_example() -> None:
    assert list(cli.STAGES) == list(pipeline.STAGES)
    for name in ("run", "score", "submit", "status", "doctor", *cli.STAGES):
        shown = _call(name, "--help")
        assert shown.exit_code == 0
        assert f"pulse-ray {name}" in shown.stdout
        assert "--set" in shown.stdout
        assert "--dry-run" in shown.stdout


@pytest.mark.parametrize("command", ["run", "status", "doctor", *cli.STAGES])
def test_a_dry_run_prints_the_resolved_configuration_and_touches_nothing(command: str, tmp_path: Path) -> None:
    changes = ["--set", f"storage={tmp_path}", "--set", "tree.breadths=[4]"]
    done = _call(command, QUICKSTART, *changes, "--dry-run")
    assert done.exit_code == 0, done.output
    expected = load(QUICKSTART, [f"storage={tmp_path}", "tree.breadths=[4]"])
    assert json.loads(done.stdout) == json.loads(expected.to_json())
    assert "Plan for quickstart" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_plan_names_what_changed(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "identity", lambda domain: "the same data")
    for run in pipeline.plan(load(config)).values():
        run.begin()
        if run.spec.name != "evaluate":
            run.complete(1.5)
    table = overview.plan_table(load(config, ["tree.breadths=[9]", "cluster.num_cpus=9"]), list(cli.STAGES))
    stage, runs, why = (list(column.cells) for column in table.columns)
    plan = {name: (does, reason) for name, does, reason in zip(stage, runs, why, strict=True)}
    assert plan["rationales"] == ("no", "complete")
    assert plan["tree"] == ("yes", "changed: tree.breadths")
    assert plan["select"] == ("yes", "made from an earlier thoughts")
    changes = ["thought_space.max_tokens=300", "tree.beam_width=1", "ranker.variants=[none]"]
    changes += ["select.selectors=[sbert]"]
    table = overview.plan_table(load(config, changes), ["tree", "select"])
    assert list(table.columns[2].cells) == [
        "cannot: encoders must be made first",
        "changed: select.selectors, thought_space.max_tokens",
    ]
    table = overview.plan_table(load(config), ["prepare", "evaluate"])
    assert list(table.columns[2].cells) == ["complete", "was interrupted; 0 finished parts stay"]
    shown = _call("status", config)
    assert shown.exit_code == 0
    assert shown.stdout.count("complete") == len(cli.STAGES) - 1
    assert "partial" in shown.stdout


def test_a_stage_without_its_inputs_says_which_stage_makes_them(config: Path, ray_cluster: None) -> None:
    _reviews(config.parent / "reviews.json.gz", GOOD)
    assert "Run stage 'prepare' first" in _complaint(_call("candidates", config))


def test_interrupted_says_that_it_can_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "execute", interrupt)
    done = _call("prepare", QUICKSTART)
    assert done.exit_code == 130
    assert "the same command goes on from here" in done.stderr


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(pipeline, "execute", fail)
    assert isinstance(_call("prepare", QUICKSTART).exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("arguments", "place"),
    [
        (["run", "none.yaml"], "no configuration at none.yaml"),
        (["run", QUICKSTART, "--set", "tree.breadth=[1]"], "unknown key 'tree.breadth'. Did you mean 'breadths'?"),
        (["tree", QUICKSTART, "--set", "seed=many"], "'seed' is \"many\". Input should be a valid integer"),
        (["status", QUICKSTART, "--set", "seed"], "override 'seed' is not of the form section.key=value"),
        (["models", "fetch", "/no/such/folder"], "model '/no/such/folder' does not resolve"),
        (["run", QUICKSTART, "--set", "engine.model=/no/such/folder"], "model '/no/such/folder' does not resolve"),
    ],
)
def test_what_the_user_can_mend_takes_one_line(arguments: list[str | Path], place: str, tmp_path: Path) -> None:
    extra = ["--set", f"storage={tmp_path}"] if arguments[0] != "models" else []
    assert place in _complaint(_call(*arguments, *extra))
    assert list(tmp_path.iterdir()) == []


def test_the_shell_sees_one_line_and_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pulse_ray.cli", "run", "none.yaml"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["run"], ["run", "a.yaml", "--unknown"], ["fly"]])
def test_wrong_usage_exits_with_2(arguments: list[str]) -> None:
    assert _call(*arguments).exit_code == 2


@pytest.mark.parametrize(
    ("rows", "changes", "place"),
    [
        (None, [], "reviews.json.gz"),
        ([], [], "reviews.json.gz"),
        ([{k: v for k, v in row.items() if k != "asin"} for row in GOOD], [], "reviews.json.gz"),
        (GOOD, ["prepare.min_user_interactions=7"], "min_user_interactions"),
    ],
    ids=["missing", "empty", "no item", "nothing left"],
)
def test_unusable_data_is_named_and_leaves_the_workspace_as_it_was(
    rows: list[dict[str, Any]] | None, changes: list[str], place: str, config: Path, ray_cluster: None
) -> None:
    reviews = _reviews(config.parent / "reviews.json.gz", GOOD)
    assert _call("prepare", config).exit_code == 0
    before = _content(config.parent / "runs")
    if rows is None:
        reviews.unlink()
    else:
        _reviews(reviews, rows)
    overrides = [argument for change in changes for argument in ("--set", change)]
    assert place in _complaint(_call("prepare", config, *overrides))
    assert _content(config.parent / "runs") == before
    assert pipeline.conditions(load(config, changes))["prepare"] == "stale"
    _reviews(reviews, GOOD[:-1])
    mended = _call("prepare", config)
    assert mended.exit_code == 0, mended.output
    assert pipeline.conditions(load(config))["prepare"] == "complete"


def _content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_truncated_file_is_named_with_its_line(config: Path, ray_cluster: None) -> None:
    reviews = _reviews(config.parent / "reviews.json.gz", GOOD)
    assert _call("prepare", config).exit_code == 0
    before = _content(config.parent / "runs")
    reviews.write_bytes(reviews.read_bytes()[:-20])
    assert "reviews.json.gz:" in _complaint(_call("prepare", config))
    assert _content(config.parent / "runs") == before


def test_results_are_printed_with_their_places(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"model": "thought_space", "protocol": "oracle", "train_domain": "shop", "domain": "shop", "split": "test"}
    row |= {"candidates": 10_501, "n": 1234, "hr@1": 0.5, "hr@1_low": 0.4, "hr@1_high": 0.6}
    row |= {"hr@3": 0.7, "hr@5": 0.8, "ndcg@10": 0.66, "mrr": 0.61}
    settings = load(config)
    run = pipeline.plan(settings)["evaluate"]
    run.output("evaluation").write_bytes("metrics.json", json.dumps([row]).encode())
    cli._print_results(settings, config)
    shown = capsys.readouterr().out
    assert "0.500 [0.400, 0.600]" in shown
    assert "10,501" in shown, "a rank among all items is told apart from one among ten"
    assert "oracle (sees the label)" in shown
    assert f"{config.parent}/runs/small/evaluation/report.html" in shown
    assert f"pulse-ray status {config}" in shown


def test_the_doctor_exits_with_1_if_something_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = doctor.Finding(subject="Python", verdict="ok", found="3.11")
    ill = doctor.Finding(subject="torch", verdict="broken", found="not installed", remedy="Run `make setup`")
    monkeypatch.setattr(doctor, "examine", lambda _: iter([healthy]))
    assert _call("doctor").exit_code == 0
    monkeypatch.setattr(doctor, "examine", lambda _: iter([healthy, ill]))
    shown = _call("doctor")
    assert shown.exit_code == 1
    assert "Run `make setup`" in shown.stdout


def test_the_doctor_finds_what_cannot_be_imported() -> None:
    (finding, _) = doctor._package(("no-such-package",), "no_such_module")
    assert (finding.verdict, finding.found) == ("broken", "not installed")
    (finding, _) = doctor._package(("pytest",), "no_such_module")
    assert finding.verdict == "broken"
    assert "No module named 'no_such_module'" in finding.found


def test_the_doctor_compiles_the_rankers_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor._attention().verdict == "ok"
    monkeypatch.setenv("CXX", "no-such-compiler")
    finding = doctor._attention()
    assert finding.verdict == "warning"
    assert "'no-such-compiler' built nothing" in finding.found
    assert "CXX" in finding.remedy


def test_the_doctor_misses_libnuma(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", fail)
    finding = doctor._numa()
    assert finding.verdict == "broken"
    assert "apt-get install libnuma1" in finding.remedy
    monkeypatch.setattr("ctypes.CDLL", lambda name: None)
    assert doctor._numa().verdict == "ok"


def test_the_doctor_knows_which_models_a_stage_loads() -> None:
    config = load(QUICKSTART, ["ranker.model=a/ranker", "engine.model=a/writer", "thought_space.model=an/encoder"])
    assert doctor.models_of(config, ["prepare", "tree"]) == ["a/writer"]
    assert doctor.models_of(config, pipeline.STAGES) == ["a/ranker", "a/writer", "an/encoder"]
    ablation = ["select.selectors=[thought_space,sbert,encoder_base]", "select.sbert_model=a/sbert"]
    compared = load(QUICKSTART, [*ablation, "thought_space.model=an/encoder"])
    assert doctor.models_of(compared, ["select"]) == ["a/sbert", "an/encoder"]
    assert all(isinstance(spec, StageSpec) for spec, _ in pipeline.STAGES.values())
