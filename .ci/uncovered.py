"""Compare the lines that no test reaches with the table of reasons: `python .ci/uncovered.py COVERAGE_JSON TABLE`.

The table has a row for each function with uncovered lines, ``| `pulse_ray/data/files.py` | `function` | reason |``. The
exit code is 1 if a function with uncovered lines has no row. Rows of functions that are covered now are printed: some
lines are reached only when two events come in a certain order, so they do not fail the build.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROW = re.compile(r"^\| `(?P<file>[^`]+)` \| `(?P<function>[^`]+)` \| (?P<reason>.+) \|$", re.MULTILINE)


def main(report: Path, table: Path) -> int:
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
    unexplained = sorted(uncovered.keys() - given)
    for file, name in unexplained:
        lines = ", ".join(map(str, uncovered[file, name]))
        print(f"{file}: lines {lines} of {name} are reached by no test; test or delete them, or say why in {table}")
    return 1 if unexplained else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
