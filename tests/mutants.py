"""Change measures, sweeps, edits and the walk at random, and see which changes no test notices.

python tests/mutants.py [SHARE] [SEED]; `make mutants` calls it. Works on what is committed, in
build/mutants; what survived is written to build/mutants.md, and judged in tests/MUTANTS.md.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPY = ROOT / "build" / "mutants"
KILLED, SURVIVED = 1, 0
"""Exit codes of pytest."""


def mutmut(*arguments: str) -> str:
    """Run mutmut on the copy; threads are not safe to fork, so that there is one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTEST_XDIST_WORKER": "gw0"}
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    done = subprocess.run(command, cwd=COPY, env=environment, capture_output=True, text=True)
    if "failed to collect stats" in done.stdout:
        raise SystemExit("the tests fail on the unchanged code in build/mutants/mutants")
    return done.stdout


def results() -> dict[str, int | None]:
    """Exit code of the tests by mutant; None where it was not tried."""
    found: dict[str, int | None] = {}
    for path in sorted((COPY / "mutants" / "twotower").rglob("*.meta")):
        found |= json.loads(path.read_text())["exit_code_by_key"]
    return found


def difference(name: str) -> str:
    """The changed lines."""
    lines = mutmut("show", name).splitlines()
    return "\n".join(x for x in lines if x[:1] in "+-" and x[:3] not in ("+++", "---"))


def main(share: float = 0.08, seed: int = 0) -> None:
    """Draw a share of all mutants, try them, and write what survived."""
    shutil.rmtree(COPY, ignore_errors=True)
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(COPY)], check=True)
    mutmut("run", "twotower.walk.everywhere.*")  # makes all, and tries these
    names = sorted(results())
    drawn = random.Random(seed).sample(names, round(share * len(names)))
    mutmut("run", *drawn)
    codes = {name: code for name, code in results().items() if name in drawn}
    survived = [name for name, code in codes.items() if code == SURVIVED]
    killed = sum(code == KILLED for code in codes.values())
    lines = [
        f"{killed} of {len(drawn)} mutants killed, {len(survived)} survived; {len(names)} in all"
    ]
    lines += [f"## {name}\n```diff\n{difference(name)}\n```" for name in survived]
    (ROOT / "build" / "mutants.md").write_text("\n\n".join(lines) + "\n")
    print(lines[0])


if __name__ == "__main__":
    main(*(kind(value) for kind, value in zip((float, int), sys.argv[1:], strict=False)))
