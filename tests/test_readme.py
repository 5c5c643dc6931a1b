"""The README's Python runs as written, and its figures are those that were measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.demo_model
def test_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 8
    names: dict[str, object] = {}
    for number, block in enumerate(blocks):
        # From a file, since nnsight reads the source of what it traces.
        (tmp_path / f"block{number}.py").write_text(block, encoding="utf-8")
        exec(compile(block, str(tmp_path / f"block{number}.py"), "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    before, after = map(float, printed[0].split())
    assert before > after
    near, far = map(
        float, next(x for x in printed[1:] if re.fullmatch(r"[\d.]+ [\d.]+", x)).split()
    )
    assert near > far
