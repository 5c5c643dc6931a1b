"""Write tests/COVERAGE.md from coverage's JSON report; `make coverage` does both.

python tests/coverage_page.py build/coverage.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path

HEAD = """# Coverage

Lines and branches of `twotower/` that `make test` reaches, in processes of their own too, together
with the check of every type of model (`tests/models/test_families.py`; `make test` runs one for
each feature); made by `make coverage`. Bodies of traces count (`tests/coverage.ini`,
`tests/seen.py`). Not seen are what a GPU alone runs, and workers of Ray that are killed.

| part | lines | branches |
|---|---|---|
"""


def page(report: dict) -> str:
    """The whole page."""
    parts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    files = []
    for name, file in report["files"].items():
        s = file["summary"]
        found = [s["covered_lines"], s["num_statements"], s["covered_branches"], s["num_branches"]]
        folders = Path(name).parts
        key = "/".join(folders[folders.index("twotower") :][:2])
        for part in ("**all**", key if not key.endswith(".py") else "twotower/*.py"):
            parts[part] = [a + b for a, b in zip(parts[part], found, strict=True)]
        files.append((s["percent_covered"], name, s["missing_lines"]))
    rows = [
        f"| {part} | {a / b:.1%} of {b} | {c / d:.1%} of {d} |"
        for part, (a, b, c, d) in sorted(parts.items())
        if b and d
    ]
    least = [f"- `{name}` {percent:.0f}%" for percent, name, _ in sorted(files) if percent < 90]
    return (
        HEAD
        + "\n".join(rows)
        + "\n\nFiles below 90%:\n\n"
        + "\n".join(least)
        + f"\n\n<sub>{datetime.now(UTC):%Y-%m-%d}; coverage {report['meta']['version']}</sub>\n"
    )


if __name__ == "__main__":
    found = page(json.loads(Path(sys.argv[1]).read_text()))
    Path(__file__).with_name("COVERAGE.md").write_text(found)
    print(found)
