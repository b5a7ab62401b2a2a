"""Report the lines that no test reaches and that have no reason: `python .ci/uncovered.py COVERAGE_JSON TABLE`.

The table has a row for each function with uncovered lines, ``| `pulse_ray/data/files.py` | `function` | reason |``.
This is a report: some lines are reached only when two events come in a certain order, so a function without a reason
fails no build. The share of all lines does: `fail_under` in pyproject.toml.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROW = re.compile(r"^\| `(?P<file>[^`]+)` \| `(?P<function>[^`]+)` \| (?P<reason>.+) \|$", re.MULTILINE)


def main(report: Path, table: Path) -> None:
    """Print functions with uncovered lines that have no reason, and reasons that are no longer needed."""
    given = {(row["file"], row["function"]) for row in ROW.finditer(table.read_text())}
    uncovered = {
        (file, name or "(module)"): found["missing_lines"]
        for file, content in json.loads(report.read_text())["files"].items()
        for name, found in content["functions"].items()
        if found["missing_lines"]
    }
    for file, name in sorted(given - uncovered.keys()):
        print(f"{table}: {file} {name} is covered; remove its row unless it depends on timing")
    for file, name in sorted(uncovered.keys() - given):
        lines = ", ".join(map(str, uncovered[file, name]))
        print(f"{file}: lines {lines} of {name} are reached by no test; test or delete them, or say why in {table}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
