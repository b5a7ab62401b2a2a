from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pulse_ray import schema
from pulse_ray.config import Config
from pulse_ray.errors import ArtifactError, DataError
from pulse_ray.schema import Reject, table
from pulse_ray.workspace import BEGIN, MANIFEST, StageRun, StageSpec, Workspace

CONFIG = Config.model_validate(
    {"name": "run", "prepare": {"domains": [{"name": "shop", "source": {"kind": "synthetic"}}]}}
)
SPEC = StageSpec(
    name="rationales", settings=("seed", "rationales"), inputs=("examples",), outputs=("rationales",), summary=""
)


def bind(folder: Path, fingerprint: str = "f1") -> StageRun:
    return StageRun(workspace=Workspace(str(folder), "run"), config=CONFIG, spec=SPEC, fingerprint=fingerprint)


def rationale(example: str, **fields: Any) -> dict[str, Any]:
    row = {"example_id": example, "text": "because", "model": "m", "prompt_sha": "0" * 12, "seed": 1}
    return row | {"finish_reason": "stop", "num_tokens": 3} | fields


def rows(*examples: str) -> pa.Table:
    return table("rationales", [rationale(example) for example in examples])


def test_the_life_of_an_artefact(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    output = stage.output("rationales")
    assert stage.condition() == "missing"
    stage.begin()
    assert stage.condition() == "partial"
    output.write("train-0000-0001", rows("shop/a/1", "shop/b/1"))
    assert stage.todo(["train-0000-0000", "train-0000-0001"], ["rationales"]) == ["train-0000-0000"]
    stage.begin()  # As a run that resumes does.
    assert output.parts() == ["train-0000-0001"]
    stage.reject("train-0000-0000", [Reject(key="shop/c/1", reason="too short"), Reject(key="d", reason="too short")])
    output.write("train-0000-0000", rows("shop/d/1"))
    stage.complete(1.5, {"rationales": {"words": 4}})
    assert stage.condition() == "complete"
    manifest = output.manifest()
    assert manifest is not None
    assert (manifest.parts, manifest.rows, manifest.tokens, manifest.rejects) == (2, 3, 9, {"too short": 2})
    assert manifest.metrics == {"words": 4}
    assert manifest.settings["rationales"]["max_reject_fraction"] == CONFIG.rationales.max_reject_fraction
    assert [data.num_rows for data in output.tables()] == [1, 2]
    assert output.parts("test") == []


def test_another_fingerprint_makes_stale_and_starts_over(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    stage.begin()
    stage.reject("train-0000-0000", [Reject(key="k", reason="r")])
    stage.output("rationales").write("train-0000-0000", rows("shop/a/1"))
    stage.complete(1.0)
    changed = bind(tmp_path, "f2")
    assert changed.condition() == "stale"
    changed.begin()
    assert changed.output("rationales").files() == [BEGIN]
    assert changed.rejected() == {}
    assert changed.condition() == "partial"


def test_a_part_is_made_again_if_one_of_its_tables_is_gone(tmp_path: Path) -> None:
    spec = StageSpec(name="candidates", settings=("seed",), inputs=(), outputs=("rationales", "reasons"), summary="")
    stage = StageRun(workspace=Workspace(str(tmp_path), "run"), config=CONFIG, spec=spec, fingerprint="f1")
    stage.begin()
    for name in spec.outputs:
        stage.output(name).write("train-0000-0000", table(name, []))
    assert stage.todo(["train-0000-0000"], spec.outputs) == []
    stage.output("rationales").delete()
    assert stage.todo(["train-0000-0000"], spec.outputs) == ["train-0000-0000"]


def test_rejects_of_an_attempt_that_was_killed_do_not_stay(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    stage.begin()
    stage.reject("train-0000-0000", [Reject(key="shop/a/1", reason="too short")])
    stage.reject("train-0000-0000", [])
    assert stage.rejected() == {}


def test_the_time_of_attempts_adds_up(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    stage.pause(5.0)  # It broke before it began: there is nothing that this time was spent on.
    stage.begin()
    for _ in range(2):
        stage.pause(10.0)
        stage.begin()
    stage.complete(1.5)
    manifest = stage.output("rationales").manifest()
    assert manifest is not None
    assert manifest.seconds == 21.5


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "run" / "examples").mkdir(parents=True)
    with pytest.raises(ArtifactError, match="is no run of pulse-ray"):
        Workspace(str(tmp_path), "run").claim()
    for _ in range(2):
        Workspace(str(tmp_path), "new").claim()


def test_storage_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = Workspace(str(tmp_path / "file"), "run").artefact("rationales")
    for use in (output.manifest, lambda: output.write("train-0000-0000", rows("shop/a/1"))):
        with pytest.raises(ArtifactError, match=r"cannot (read|write) .*file"):
            use()


def test_a_write_that_fails_leaves_no_part(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    stage.begin()
    with pytest.raises(DataError, match="columns"):
        stage.output("rationales").write("train-0000-0000", pa.table({"example_id": ["a"]}))
    (tmp_path / "run" / "rationales" / ".train-0000-0001.parquet.1234").write_bytes(b"half")
    assert stage.output("rationales").parts() == []


def test_damaged_files_are_named(tmp_path: Path) -> None:
    output = bind(tmp_path).output("rationales")
    output.write("train-0000-0000", rows("shop/a/1"))
    path = tmp_path / "run" / "rationales" / "train-0000-0000.parquet"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"cannot read .*train-0000-0000\.parquet"):
        output.read("train-0000-0000")
    with pytest.raises(ArtifactError, match=r"absent\.parquet"):
        output.read("absent")
    output.write_bytes(MANIFEST, b"{")
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        output.manifest()
    with pytest.raises(ArtifactError, match="cannot open storage"):
        Workspace("nowhere://x", "run")


def test_undeclared_artefacts_cannot_be_touched(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    with pytest.raises(AssertionError):
        stage.input("thoughts")
    with pytest.raises(AssertionError):
        stage.output("examples")


def test_a_stage_travels_to_workers(tmp_path: Path) -> None:
    stage = bind(tmp_path)
    there = pickle.loads(pickle.dumps(stage))
    there.output("rationales").write("train-0000-0000", rows("shop/a/1"))
    assert stage.output("rationales").read("train-0000-0000", ["example_id"]).num_rows == 1


def test_folders_travel_through_storage(tmp_path: Path) -> None:
    (tmp_path / "model" / "deep").mkdir(parents=True)
    (tmp_path / "model" / "deep" / "weights").write_bytes(b"w")
    artefact = Workspace(f"file://{tmp_path}/store", "run").artefact("encoders")
    artefact.upload(tmp_path / "model")
    assert (artefact.download(tmp_path / "copy") / "deep" / "weights").read_bytes() == b"w"
    artefact.delete()
    artefact.delete()
    assert artefact.files() == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (rationale("a", text=None), "nulls in column 'text'"),
        (rationale("a", colour="red"), "no column"),
        (rationale("a", num_tokens="three"), "do not fit"),
    ],
)
def test_tables_refuse_rows_that_do_not_fit(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        table("rationales", [row])


def test_a_history_is_read_without_its_target() -> None:
    step = {"item_id": "i", "timestamp": 1, "rating": None, "review": "fine"}
    row = {"domain": "shop", "user_id": "u", "split": "test", "history": [step], "target_item": "canary"}
    data = table("examples", [row | {"example_id": schema.example_id("shop", "u", 1)}])
    [history], [example] = schema.histories(data), schema.examples(data)
    assert "canary" not in repr(history)
    assert (example.history, example.target_item, example.split) == (history, "canary", "test")


def test_every_column_says_what_it_means() -> None:
    for name, columns in schema.TABLES.items():
        lines = schema.describe(name).splitlines()
        assert len(lines) == len(columns)
        assert all(len(line.split()) > 3 for line in lines)
