"""twotower heads, show and report: tables, a coloured prompt, JSON, and what is refused."""

from __future__ import annotations

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from command import run as command
from rich.console import Console
from tiny import TWO

import twotower as tt
from twotower.figures import head_table, prompt_view
from twotower.figures.terminal import coloured, show_heads, show_prompt


@pytest.fixture(scope="module")
def run(llama: tt.Model, prompts: tt.Prompts) -> xr.DataTree:
    run = tt.analyze(llama, prompts)
    run["ov"] = tt.ov_labels(llama, prompts, top_tokens=[(2, 1)])
    return run


@pytest.fixture(scope="module")
def store(run: xr.DataTree, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(tt.save(run, tmp_path_factory.mktemp("runs") / "run.zarr"))


def test_heads(store: Path, run: xr.DataTree, capsys) -> None:
    assert command("heads", store, "--k", 5, "--by", "qk_auc") == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "┃" not in out  # plain text in a pipe
    table = head_table(run)
    lines = out.splitlines()
    assert lines[0].split("  ") != []
    order = np.argsort(-table.qk_auc.values, axis=None, kind="stable")[:5]
    for line, place in zip(lines[1:], order, strict=False):
        layer, head = divmod(int(place), 4)
        name, *values = line.split()
        assert name.rstrip("*") == f"{layer}.{head}"
        expected = [float(table[x].values[layer, head]) for x in table]
        np.testing.assert_allclose(list(map(float, values)), expected, atol=0.00051)


def test_heads_as_json(store: Path, run: xr.DataTree, capsys) -> None:
    assert command("heads", store, "--k", 100, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["layer"], row["head"]) for row in rows] == tt.in_context_heads(run, 12)
    table = head_table(run)
    for row in rows:
        for name in table:
            assert row[name] == float(table[name].values[row["layer"], row["head"]])
        assert row["in_context"] is True


def test_show(store: Path, run: xr.DataTree, capsys) -> None:
    assert command("show", store, "--head", "2.1", "--prompt", 3) == 0
    out = capsys.readouterr().out
    view = prompt_view(run, 3)
    own = view.of((2, 1))
    assert "\x1b" not in out
    assert f"{view.gold} is right" in out.splitlines()[0]
    rows = [line.split() for line in out.splitlines() if line.strip().startswith("-")]
    rows = [row for row in rows if len(row) >= 8]
    order = sorted(view.named, key=lambda i: -own["attention"][i])
    assert [int(row[0]) for row in rows] == [int(view.positions[i]) for i in order]
    for row, i in zip(rows, order, strict=True):
        same = view.classes[i] == view.query_class
        assert row[1:3] == [view.label_texts[i], view.classes[i] + "*" * same]
        names = ("attention", "score", "score_content", "score_position")
        expected = [own[name][i] for name in names] + own["label_logit"][i].tolist()
        np.testing.assert_allclose([float(x) for x in row[3:9]], expected, atol=0.00051)
    for i in np.flatnonzero(own["attention"] >= 0.1):
        assert f"[{own['attention'][i]:.2f}]" in out


def test_show_as_json(store: Path, run: xr.DataTree, capsys) -> None:
    assert command("show", store, "--head", "2.1", "--prompt", 2, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    view = prompt_view(run, 2)
    own = view.of((2, 1))
    assert [row["token"] for row in rows] == view.tokens.tolist()
    assert [row["role"] for row in rows] == view.roles.tolist()
    np.testing.assert_array_equal([row["attention"] for row in rows], own["attention"])
    found = [[row["label_logit"][label] for label in view.labels] for row in rows]
    np.testing.assert_array_equal(found, own["label_logit"])
    assert [row["top_token"] for row in rows] == view.top_tokens["2.1"].tolist()


def test_colours_on_a_terminal(run: xr.DataTree) -> None:
    view = prompt_view(run, 0)
    attention = view.of((1, 1))["attention"]
    text = coloured(view, (1, 1))
    strongest = int(attention.argmax())
    shades = [str(span.style) for span in text.spans if "rgb(213,94,0)" in str(span.style)]
    assert len(shades) == int((attention == attention[strongest]).sum())
    underlined = [span for span in text.spans if "underline" in str(span.style)]
    assert len(underlined) == len(view.named)
    console = Console(file=io.StringIO(), force_terminal=True, width=100, markup=False)
    show_prompt(run, (1, 1), 0, console)
    show_heads([], console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert "\x1b[" in out
    assert "╭" in out


def test_control_characters_never_reach_the_terminal(llama: tt.Model) -> None:
    nasty = ["\x1b[31mred", "bell\x07", "back\x08", "null\x00"]
    task = tt.Task("nasty", {"a": nasty, "b": TWO.texts["city"][:4]})
    run = tt.analyze(llama, tt.build_prompts(llama, task, shots=2, n=2, seed=0))
    console = Console(file=io.StringIO(), markup=False, width=200)
    show_prompt(run, (0, 0), 0, console)
    out = console.file.getvalue()  # type: ignore[attr-defined]
    assert not set(out) & set("\x1b\x07\x08\x00")


def test_report(store: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("report", store) == 0
    assert "Saved report.html" in capsys.readouterr().out
    assert command("report", store, store, "-o", "two.html", "--prompts", 1, 3) == 0
    text = (tmp_path / "two.html").read_text(encoding="utf-8")
    assert '"run (A)"' in text
    assert '"run (B)"' in text
    assert text.count('type="text/plain" id="prompt-') == 4


@pytest.mark.usefixtures("loaded_once")
def test_parts(checkpoint: Path, tmp_path: Path, capsys) -> None:
    task = tmp_path / "task.csv"
    rows = [f"{text},{cls}" for cls, texts in TWO.texts.items() for text in texts]
    task.write_text("text,label\n" + "\n".join(rows) + "\n")
    store = tmp_path / "runs.zarr"
    asked = ("--model", checkpoint, "--task", task, "--shots", 2, "--n", 2, "--seed", 0, 1)
    asked += ("--measures", "predictions", "effects", "qk")
    assert command("analyze", *asked, "--output", store) == 0
    capsys.readouterr()
    names = json.loads(tt.open(store).attrs["twotower_parts"])
    assert command("heads", store) == 2
    assert f"choose one of {', '.join(names)}" in capsys.readouterr().err
    assert command("heads", store, "--part", names[1], "--json") == 0
    found = json.loads(capsys.readouterr().out)
    expected = tt.in_context_heads(tt.open(store)[names[1]], 12)
    assert [(row["layer"], row["head"]) for row in found] == expected
    file = tmp_path / "two.html"
    assert command("report", store, "--part", names[0], "--other-part", names[1], "-o", file) == 0
    assert all(f'"name": "{name}"' in file.read_text(encoding="utf-8") for name in names)
    assert command("show", store, "--head", "0.0", "--part", names[0]) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("heads", "no.zarr"), "there is no store at no.zarr"),
        (("heads", "STORE", "--k", "0"), "k=0"),
        (("heads", "STORE", "--k", "few"), "few"),
        (("heads", "STORE", "--by", "auc"), "auc"),
        (("heads", "STORE", "--part", "a"), "no part 'a'; it has none"),
        (("show", "STORE"), "head"),
        (("show", "STORE", "--head", "3"), "write layer.head, such as 21.3"),
        (("show", "STORE", "--head", "3.1"), "no head 3.1"),
        (("show", "STORE", "--head", "a.b"), "'a.b' is not a head"),
        (("show", "STORE", "--head", "-1.0"), "is not a head"),
        (("show", "STORE", "--head", "0.0", "--prompt", "6"), "prompt 6 is not in the run"),
        (("report", "STORE", "no.zarr"), "there is no store at no.zarr"),
        (("report", "STORE", "-o", "no/run.html"), "folder is not there"),
        (("report", "STORE", "--prompts", "9"), "prompt 9 is not in the run"),
        (("report", "STORE", "--part", "a"), "no part 'a'; it has none"),
        (("report", "STORE", "--most-bytes", "10"), "most_bytes=10"),
    ],
)
def test_what_is_refused(arguments, words: str, store: Path, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*(store if x == "STORE" else x for x in arguments)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("width", [30, 60, 80])
def test_narrow_terminals_lose_no_number(run: xr.DataTree, width: int) -> None:
    narrow, wide = (
        Console(file=io.StringIO(), force_terminal=True, width=w, markup=False, color_system=None)
        for w in (width, 300)
    )
    for console in (narrow, wide):
        show_prompt(run, (2, 1), 0, console)
    texts = [c.file.getvalue() for c in (narrow, wide)]  # type: ignore[attr-defined]
    numbers = [
        [w for w in text.split() if w.replace(".", "").lstrip("-").isdigit()] for text in texts
    ]
    assert numbers[0] == numbers[1]
    assert narrow.width == width


@pytest.mark.parametrize(
    "arguments",
    [
        ["show", "--head", "2.1", "--json"],
        pytest.param(["heads", "--k", "12"], marks=pytest.mark.slow),
    ],
)
def test_a_reader_that_goes_away(arguments: list[str], store: Path) -> None:
    name, *rest = arguments
    line = [sys.executable, "-m", "twotower.cli", name, str(store), *rest]
    found = subprocess.run(
        f"{shlex.join(line)} | head -c 1; exit ${{PIPESTATUS[0]}}",
        shell=True,
        executable="/bin/bash",
        capture_output=True,
        text=True,
    )
    assert found.stderr == ""
    assert found.returncode in (0, 141)  # 0 where all was written before the reader left


def test_numbers_that_are_none_are_null(run: xr.DataTree) -> None:
    """JSON has no NaN."""
    from twotower.figures.terminal import rows_of

    empty = run.copy(deep=True)
    empty["scores"]["qk_auc"][0, 0] = np.nan
    rows = {(row["layer"], row["head"]): row for row in rows_of(empty, "margin_drop", 12)}
    assert rows[0, 0]["qk_auc"] is None
    assert rows[1, 1]["qk_auc"] is not None
    with pytest.raises(
        tt.errors.InputError, match=r"by='size' is not in the run; it has margin_drop"
    ):
        rows_of(run, "size", 3)
