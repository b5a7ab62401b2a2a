"""`prepare` against the benchmark's peer, which does the same work another way, on a small made-up category."""

from __future__ import annotations

from pathlib import Path

import pytest
from worlds import Prepare, amazon

from benchmarks import _polars_prepare, _reviews
from benchmarks._tables import KEYS, differences


def test_the_peer_makes_the_same_tables(prepared: Prepare, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = _reviews.make(tmp_path, reviews=12_000)
    result = prepared(domains=[amazon(files.reviews, files.metadata)], partitions=3, shard_examples=50)
    _polars_prepare.main(str(files.reviews), str(files.metadata), "shop", str(tmp_path))
    for table in KEYS:
        parts = sorted(Path(result.stage.output(table).path).glob("*.parquet"))
        assert len(parts) > 1
        assert differences(table, parts, [tmp_path / f"{table}.parquet"]) == (0, "[]")
        # The comparison sees what is missing.
        assert differences(table, parts[1:], [tmp_path / f"{table}.parquet"])[0] > 0
    assert result.step("kept")[0] > 500
    assert '"kept"' in capsys.readouterr().out
