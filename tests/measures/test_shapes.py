"""The shapes that functions name hold: jaxtyping checks them while other tests run.

In a process of its own: a checked function cannot be sent to a server, as other tests do. The
whole surface is checked by `models/test_sharded.py`.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from checked import OPTION

TESTS = Path(__file__).parents[1]
FILES = [
    f"measures/test_{name}.py"
    for name in ("definitions", "edits", "attention_edits", "groups", "tracing", "experts")
]
SOME = "not qwen and not neox and not mistral and not (llama and not grouped)"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shapes_hold_while_other_tests_run() -> None:
    plugins = ["-p", "no:cacheprovider", OPTION]
    done = python("-m", "pytest", "-q", "-x", *plugins, *FILES, "-k", SOME)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
