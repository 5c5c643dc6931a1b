"""The shapes that functions name hold: jaxtyping checks them while the surface or other tests run.

In a process of its own: a checked function cannot be sent to a server, as other tests do.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CHECKED = [
    *(f"twotower.walk.{name}" for name in ("walk", "scores", "readout", "tensors", "batch")),
    *(f"twotower.sweep.{name}" for name in ("rows", "layout", "sweep")),
    *(f"twotower.edits.{name}" for name in ("attention", "prepared", "prepared_edits")),
    "twotower.models.architecture",
    "twotower.models.check",
]
FILES = [
    f"measures/test_{name}.py"
    for name in ("definitions", "edits", "attention_edits", "groups", "tracing", "experts")
]
SOME = "not qwen and not neox and not mistral and not (llama and not grouped)"


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=TESTS, capture_output=True, text=True, timeout=600)


SURFACE = f"""
import shapes  # before torch, after which beartype cannot be imported
import jaxtyping
jaxtyping.install_import_hook({CHECKED}, "shapes.checked")
import torch
torch.set_num_threads(1)
import twotower as tt
from surface import FEW, MEASURES
from tiny import THREE, tiny
for name, measures in (("llama-grouped", MEASURES), ("gpt2", FEW)):
    model = tiny(name)
    prompts = tt.build_prompts(model, THREE, shots=1, n=3, seed=2)
    for measure in measures:
        MEASURES[measure](model, prompts)
print("all held")

from twotower.walk.scores import _mean_before
at = torch.ones(2, 5, dtype=torch.bool)
assert _mean_before(torch.zeros(1, 5, 1, 4), at).shape == (2, 5, 1, 4)
try:
    _mean_before(torch.zeros(1, 5, 3, 4), at)
except jaxtyping.TypeCheckError:
    print("a wrong one is refused")
"""


def test_shapes_hold_and_wrong_ones_are_refused() -> None:
    done = python("-c", SURFACE)
    said = done.stdout.strip().splitlines()[-2:]
    assert said == ["all held", "a wrong one is refused"], done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_shapes_hold_while_other_tests_run() -> None:
    packages = ",".join([*CHECKED, "shapes.checked"])
    plugins = ["-p", "no:cacheprovider", f"--jaxtyping-packages={packages}"]
    done = python("-m", "pytest", "-q", "-x", *plugins, *FILES, "-k", SOME)
    assert done.returncode == 0, done.stdout[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) > 150
