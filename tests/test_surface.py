"""The surface is documented: every public name, every argument, and pages can be made of it."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from surface import OF_MEASURES

import twotower as tt

MODULES = ("twotower", "twotower.figures", "twotower.prompts", "twotower.testing")


def public() -> list[tuple[str, Any]]:
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        for one in module.__all__:
            value = getattr(module, one)
            if inspect.isfunction(value) or inspect.isclass(value):
                found.append((f"{name}.{one}", value))
    return found + [(function.__qualname__, function) for function in OF_MEASURES]


@pytest.mark.parametrize(("name", "value"), public(), ids=[name for name, _ in public()])
def test_docstrings_are_complete(name: str, value: Any) -> None:
    text = inspect.getdoc(value)
    assert text, name
    error = inspect.isclass(value) and issubclass(value, Exception)
    if error or value is tt.models.Architecture:
        return
    section = re.split(r"\n(?:Parameters|Attributes)\n-+\n", text)
    if inspect.isclass(value):
        fields = [x for x in getattr(value, "__annotations__", {}) if not x.startswith("_")]
    else:
        fields = list(inspect.signature(value).parameters)
    if not fields:
        return
    assert len(section) > 1, f"{name} does not tell its parameters"
    told = "\n".join(section[1:])
    for field in fields:
        assert re.search(rf"(^|, )\**{field}\b", told, re.MULTILINE), f"{name}: {field}"
    if inspect.isfunction(value):
        assert re.search(r"\nReturns\n-+\n", text), f"{name} does not say what it returns"


@pytest.mark.slow
def test_pages_are_made_of_it(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "pdoc", "-d", "numpy", "-o", str(tmp_path)]
    subprocess.run([*command, "twotower", "!twotower.cli", "!twotower.runs"], check=True)
    page = (tmp_path / "twotower.html").read_text(encoding="utf-8")
    assert [name for name in tt.__all__ if f'id="{name}"' not in page] == [
        "errors",
        "figures",
        "measures",
        "prompts",
    ]  # pages of their own
