from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from worlds import Prepare, Prepared, bind

from pulse_ray.data.stage import Numbers, Step, Totals, prepare


@pytest.fixture
def prepared(tmp_path: Path) -> Prepare:
    """Runs the stage in this process; `backwards` runs every step's pieces in reverse."""

    def run(name: str = "workspace", *, backwards: bool = False, **settings: Any) -> Prepared:
        stage = bind(tmp_path / name, settings)

        def each(step: Step, numbers: Sequence[Numbers]) -> Totals:
            totals: dict[int, Counter[str]] = {domain: Counter() for domain, *_ in numbers}
            for entry in reversed(numbers) if backwards else numbers:
                totals[entry[0]].update(step(stage, *entry))
            return {domain: dict(counts) for domain, counts in totals.items()}

        stage.begin()
        return Prepared(stage, prepare(stage, each))

    return run
