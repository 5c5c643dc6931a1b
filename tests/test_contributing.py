"""The pages for contributors, followed as written."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from command import run as command
from reference import Reference
from tiny import ARCHITECTURES, FURTHER, THREE, tiny

import twotower as tt
from twotower.experiments.experiment import QUICK
from twotower.results.schema import GROUPS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_an_architecture() -> None:
    assert BLOCKS[0] == (ROOT / "twotower" / "models" / "families" / "phi.py").read_text(
        encoding="utf-8"
    )
    assert "phi" in FURTHER  # step 2; step 3 is tests/models/test_further.py


def test_a_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("twotower.results.schema.GROUPS", GROUPS)
    before = dict(GROUPS)
    file = tmp_path / "entropy.py"  # a file, since nnsight reads the source of what it traces
    file.write_text(BLOCKS[1], encoding="utf-8")
    names: dict[str, object] = {"__name__": "entropy"}
    try:
        exec(compile(BLOCKS[1], str(file), "exec"), names)
        for name in ARCHITECTURES:
            model = tiny(name)
            prompts = tt.build_prompts(model, THREE, shots=2, n=3, seed=1)
            found = names["attention_entropy"](model, prompts).entropy.values  # type: ignore[operator]
            reference = Reference(model.module)
            for number in range(3):
                ids = prompts.token_id[number]
                own = reference.run(ids[ids >= 0])
                for layer, attention in enumerate(own.attention):
                    p = attention[:, -1].numpy()
                    logs = np.log(np.where(p > 0, p, 1))
                    np.testing.assert_allclose(
                        found[number, layer], -(p * logs).sum(axis=-1), rtol=1e-4, atol=1e-5
                    )
    finally:
        GROUPS.clear()
        GROUPS.update(before)


@pytest.mark.demo_model
@pytest.mark.parametrize("kind", ["random", pytest.param("demo", marks=pytest.mark.slow)])
def test_an_experiment(
    kind: str, random_model: tt.Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    model = "smollm2-135m"
    if kind == "random":
        monkeypatch.setattr("twotower.experiments.experiment.check_task", lambda run, name: None)
        few = replace(QUICK, n_fit=6, n_test=6, shots=2)
        monkeypatch.setattr("twotower.experiments.units.QUICK", few)
        model = tmp_path / "random"
        random_model.module.save_pretrained(model)
        random_model.tokenizer.save_pretrained(model)
    file = tmp_path / "last_layers.py"
    file.write_text(BLOCKS[2], encoding="utf-8")
    monkeypatch.syspath_prepend(ROOT / "experiments")
    given = ("--quick", "--model", model, "--out", tmp_path / "out")
    code = command("experiments", "run", file, *given)
    out = capsys.readouterr().out
    assert code == 0, out
    assert "last-layers" in out
    assert (tmp_path / "out" / "last-layers.png").is_file()


def test_every_file_that_is_named_is_there() -> None:
    for name in re.findall(r"`((?:twotower|tests|experiments)/[\w/.]+)`", TEXT):
        assert (ROOT / name).exists(), name
