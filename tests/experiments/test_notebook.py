"""The notebook runs, in ten cells, and its committed outputs are those it gives."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def said(notebook: Any) -> list[tuple[str, list[str]]]:
    """Printed words, and the kinds of all other outputs, of every cell of code."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        printed = "".join(x["text"] for x in cell.outputs if x.output_type == "stream")
        kinds = [
            kind
            for x in cell.outputs
            if x.output_type in ("display_data", "execute_result")
            for kind in sorted(x.data)
        ]
        found.append((printed, kinds))
    return found


@pytest.mark.slow
@pytest.mark.demo_model
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXPERIMENTS)
    from run_notebook import executed

    # The kernel is another process, and warnings of its libraries are not these tests' matter.
    monkeypatch.setenv("PYTHONWARNINGS", "ignore")
    before = nbformat.read(EXPERIMENTS / "explore.ipynb", as_version=4)
    now = said(executed())
    then = said(before)
    assert len(now) == len(then) == 10
    assert sum("image/png" in kinds for _, kinds in now) == 5
    for (printed, kinds), (expected, known) in zip(now, then, strict=True):
        assert kinds == known
        numbers = [float(x) for x in re.findall(r"\d+\.\d+", printed)]
        assert numbers == pytest.approx(
            [float(x) for x in re.findall(r"\d+\.\d+", expected)], abs=0.11
        )
    assert now[2][0].split()[0] == then[2][0].split()[0]  # the strongest head


def test_no_output_tells_of_a_machine() -> None:
    text = (EXPERIMENTS / "explore.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"/home/|/root|/tmp|/work|site-packages|Traceback", text)
    assert len(text) < 500_000
