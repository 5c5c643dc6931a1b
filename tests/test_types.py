"""The package's types hold in mypy's strict mode, and users' type checkers see them."""

from __future__ import annotations

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def mypy(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mypy", *arguments], cwd=ROOT, capture_output=True, text=True
    )


@pytest.mark.slow  # `make lint` checks it, too
def test_the_package_is_typed() -> None:
    found = mypy()
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.slow
def test_a_users_script_sees_signatures(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    names = (
        "tt.predict",
        "tt.load",
        "tt.open",
        "tt.measures.predict.predict",
        "tt.figures.head_map",
    )
    lines = ["import twotower as tt", "import twotower.measures"]
    lines += [f"reveal_type({name})" for name in names]
    script.write_text("\n".join(lines) + "\n")
    found = mypy(str(script))
    assert found.returncode == 0, found.stdout + found.stderr
    told = [x.partition("Revealed type is ")[2] for x in found.stdout.splitlines() if "note" in x]
    assert len(told) == len(names)
    assert told[0].startswith('"def (model: twotower.models.model.Model, prompts: twotower.prompts')
    assert told[0].endswith('-> xarray.core.dataset.Dataset"')
    assert told[1].endswith('-> twotower.models.model.Model"')
    assert told[2].endswith('-> xarray.core.datatree.DataTree"')
    assert told[3] == told[0]
    assert told[4].endswith('-> matplotlib.axes._axes.Axes"')


@pytest.mark.parametrize("name", ["twotower", "twotower.measures", "twotower.figures"])
def test_a_stub_lists_what_there_is(name: str) -> None:
    module = import_module(name)
    stub = ast.parse(Path(str(module.__file__)).with_suffix(".pyi").read_text())
    listed = next(
        ast.literal_eval(x.value)
        for x in stub.body
        if isinstance(x, ast.Assign) and ast.unparse(x.targets[0]) == "__all__"
    )
    assert sorted(module.__all__) == sorted(listed)
    assert all(hasattr(module, x) for x in listed)


def test_the_package_says_that_it_is_typed() -> None:
    assert (ROOT / "twotower" / "py.typed").is_file()
