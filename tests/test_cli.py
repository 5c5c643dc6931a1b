"""The command line: what it prints, what it refuses, and with which exit code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from shutil import copytree
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command import run

import twotower as tt
from twotower.cli import main
from twotower.experiments.units import SeedLedger
from twotower.measures.head_kinds import KINDS
from twotower.runs.configuration import Configuration

pytestmark = pytest.mark.usefixtures("loaded_once")


@pytest.fixture(scope="module")
def task_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tasks") / "mine.csv"
    rows = [
        f"{text},{cls}"
        for cls, texts in {
            "animal": ["cat", "dog", "owl", "cow"],
            "city": ["Paris", "Rome", "Oslo", "Lima"],
        }.items()
        for text in texts
    ]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


def test_analyze(checkpoint: Path, task_file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "run.zarr"
    code = run(
        "analyze",
        "--model",
        checkpoint,
        "--task",
        task_file,
        "--shots",
        2,
        "--n",
        4,
        "--output",
        out,
    )
    assert code == 0
    tree = tt.open(out)
    assert tree["effects"]["margin_drop"].shape == (4, 3, 4)
    assert tree["prompts"].attrs["task"] == "mine"
    assert f"Saved {out}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "measures"), [(1, ["predictions", "effects", "qk"]), (0, ["predictions"])]
)
def test_analyze_pairs(
    wrong: int, measures: list[str], checkpoint: Path, tmp_path: Path, capsys
) -> None:
    """Pairs with answers of one and of several tokens, in units, and to the terminal."""
    task, out = tmp_path / "sounds.csv", tmp_path / "run.zarr"
    outputs = ["foo", "bar", "key foo", "cup", "one"]
    rows = [f"{x},{y}" for x, y in zip(["cat", "dog", "owl", "cow", "hen"], outputs, strict=True)]
    task.write_text("\n".join(["input,output", *rows]) + "\n")
    given = ["--task", task, "--shots", 2, "--n", 4, "--unit-size", 2, "--wrong", wrong]
    given += ["--measures", *measures]
    assert run("analyze", "--model", checkpoint, *given, "--output", out) == 0
    tree, shown = tt.open(out), capsys.readouterr().out
    assert ("between the answers" if wrong else "of the whole answer") in shown
    assert "scores" not in tree.children
    model = tt.load(checkpoint)
    prompts = tt.build_prompts(model, tt.load_pairs(task), shots=2, n=4, wrong=wrong)
    assert tree["predictions"]["answer_text"].values.tolist() == prompts.answers.text.tolist()
    if "effects" not in measures:
        logprobs = tt.predict(model, prompts)["logprob"]
        np.testing.assert_allclose(tree["predictions"]["logprob"], logprobs, atol=1e-5)
        return
    effects = tt.head_effects(model, prompts)["margin_drop"]
    np.testing.assert_allclose(tree["effects"]["margin_drop"], effects, atol=1e-5)
    assert run("show", out, "--head", "0.1", "--prompt", 1) == 0
    shown = capsys.readouterr().out
    assert f"{prompts.answers.text[1, 0]!r} is right" in shown
    assert "the query's class" not in shown
    assert run("analyze", "--model", checkpoint, *given, "--labels", "a", "b") == 2
    assert "labels= needs a task of classes" in capsys.readouterr().err


def test_runs_of_older_versions_go_on() -> None:
    """Settings that older versions lack are recorded only if they are used."""
    assert not {"wrong", "scoring", "input_column"} & set(Configuration().describe())
    assert Configuration(wrong=2).describe()["wrong"] == 2
    assert Configuration(wrong=2).hash != Configuration().hash


def test_memory_that_runs_out_on_the_way(
    checkpoint: Path, task_file: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A unit for which memory does not do is set aside; once it does, it is measured."""
    from twotower.walk import judge

    forward, calls = judge.run_batch, []

    def runs_out(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        if len(calls) > 3:  # the state, the store, and the first unit
            raise torch.OutOfMemoryError("tried to allocate 20.00 GiB")
        return forward(*arguments, **options)

    monkeypatch.setattr(judge, "run_batch", runs_out)
    out, model = tmp_path / "runs" / "run.zarr", tmp_path / "tiny"
    copytree(checkpoint, model)  # loaded anew
    given = ["--model", model, "--task", task_file, "--shots", 2, "--n", 4, "--output", out]
    given += ["--batch-size", 1, "--unit-size", 1, "--measures", "predictions", "qk"]
    assert run("analyze", *given) == 1
    said = capsys.readouterr()
    assert "memory ran out on a single prompt of" in said.out
    assert "tried to allocate 20.00 GiB" in said.out
    assert "3 units failed (twotower status" in said.err
    assert "Traceback" not in said.err
    assert tt.open(out).predictions.measured.values.tolist() == [True, False, False, False]
    assert run("status", out, "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert [status[name] for name in ("done", "missing", "failed")] == [1, 0, 3]
    assert all("memory ran out" in error for error in status["errors"].values())
    monkeypatch.undo()
    assert run("analyze", *given) == 0
    assert "measured" not in tt.open(out).predictions.coords


@pytest.mark.parametrize("command", ["analyze", "bench", "check", "circuit", "kinds", "plan"])
def test_every_option_is_explained(command: str, capsys) -> None:
    assert run(command, "--help") == 0
    lines = [line.strip("│ ") for line in capsys.readouterr().out.splitlines()]
    listed = [line for line in lines if line.startswith("--") and not line.startswith("--no-")]
    texts = {line.split("  ")[0]: line.partition("  ")[2] for line in listed}
    assert texts
    assert [option for option, text in texts.items() if text.strip()[:1] in ("", "[")] == []


def test_a_circuit_that_cannot_be_written(tmp_path: Path, capsys) -> None:
    """Said before the model is loaded."""
    out = tmp_path / "nowhere" / "circuit.graphml"
    assert run("circuit", "no/such-model", "--out", out) == 2
    assert "its folder is not there" in capsys.readouterr().err


def test_status_of_experiments(tmp_path: Path, capsys) -> None:
    """Of three units one is measured and one has failed; nobody works on them now."""
    done = tmp_path / "done.zarr"
    done.mkdir()
    units = [
        {"unit": f"{part}, seed {seed}", "part": part, "path": str(path)}
        for part, seed, path in (("a", 0, done), ("a", 1, tmp_path / "x"), ("b", 0, tmp_path / "y"))
    ]
    ledger = SeedLedger(tmp_path)
    reports = {units[0]["unit"]: {"worker": "here:1"}}
    ledger.write(units=units, reports=reports, errors={units[1]["unit"]: "no memory"})
    assert run("status", tmp_path) == 0
    text = capsys.readouterr().out
    assert "not running" in text
    assert "a: 1 of 2" in text
    assert "b: 0 of 1" in text
    assert "here:1 did 1" in text
    assert "a, seed 1: no memory" in text
    assert run("status", tmp_path, "--json") == 0
    status = json.loads(capsys.readouterr().out)
    assert [status[x] for x in ("units", "done", "missing", "failed", "running")] == [3, 1, 1, 1, 0]


def test_yaml_and_what_is_given_beside_it(
    checkpoint: Path, task_file: Path, tmp_path: Path, capsys
) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {checkpoint}\ntask: {task_file}\nshots: 1\nn: 4\nbatch_size: 3\n"
        f"labels: [bar, foo]\nmeasures: [predictions, qk]\noutput: {tmp_path / 'y.zarr'}\n"
    )
    assert run("analyze", "--config", settings, "--n", 2) == 0
    tree = tt.open(tmp_path / "y.zarr")
    assert set(tree.children) == {"prompts", "predictions", "qk", "units"}
    assert tree["predictions"].sizes["prompt"] == 2
    assert tree["predictions"]["label"].values.tolist() == ["bar", "foo"]
    assert Configuration.from_yaml(settings).batch_size == 3


def test_labels_by_class_and_how_texts_are_tokenized(
    checkpoint: Path, task_file: Path, tmp_path: Path, capsys
) -> None:
    """The same run from a file and from the command line; what was decided is recorded."""
    classes = tt.load_task(task_file).classes
    labels = dict(zip(classes, ("bar", "foo"), strict=True))
    settings = tmp_path / "run.yaml"
    settings.write_text(
        f"model: {checkpoint}\ntask: {task_file}\nshots: 1\nn: 4\nmeasures: [predictions]\n"
        f"output: {tmp_path / 'y.zarr'}\nlabels: {json.dumps(labels)}\n"
    )
    assert run("analyze", "--config", settings) == 0
    words = [f"{cls}={word}" for cls, word in labels.items()]
    assert run("analyze", "--config", settings, "--labels", *words, "--overwrite") == 0
    assert Configuration.from_yaml(settings).labels == tuple(words)
    assert Configuration(labels=labels) == Configuration(labels=tuple(words))
    found = tt.open(tmp_path / "y.zarr")["predictions"]
    pairs = set(zip(found["query_class"].values, found["gold"].values, strict=True))
    assert pairs == set(labels.items())
    assert json.loads(found.attrs["prompts"])["permute_labels"] is False
    assert run(
        *("analyze", "--config", settings, "--permute-labels", "--no-add-special-tokens"),
        *("--control-tokens", "--output", tmp_path / "z.zarr"),
    ) == 0  # fmt: skip
    told = json.loads(tt.open(tmp_path / "z.zarr")["predictions"].attrs["prompts"])
    assert told["permute_labels"] is True
    assert told["add_special_tokens"] is False
    assert told["control_tokens"] is True


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["frob"], "Unknown command"),
        (["analyze", "--nn", "3"], "Unknown option"),
        (["analyze", "--n", "many"], "--n"),
        (["analyze", "--task", "nope"], "there is no task 'nope'"),
        (["analyze", "--task", "missing.csv"], "there is no file missing.csv"),
        (["analyze", "--order", "sideways"], "--order"),
        (["analyze", "--config", "missing.yaml"], "cannot be read"),
        (["check", "/no/such/folder"], "there is no folder"),
        (["check", "smollm2-135m", "--quantization", "int3"], '"int3" for --quantization'),
        (["tasks", "nope"], "there is no task"),
    ],
)
def test_one_line_and_exit_code_2(arguments: list[str], message: str, capsys) -> None:
    assert run(*arguments) == 2
    printed = capsys.readouterr().err.strip()
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert printed.startswith("twotower: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("modle: x\n", "unknown setting 'modle'"),
        ("- a\n- b\n", "must hold names and values"),
        ("a: [1\n", "is not YAML"),
    ],
)
def test_bad_yaml(content: str, message: str, tmp_path: Path, capsys) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(content)
    assert run("analyze", "--config", path) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["--shots", "1", "--labels", "foo", "--labels", "foo"], "labels must differ"),
        (["--shots", "9"], "9 shots and a query need 10"),
        (["--shots", "1", "--n", "0"], "n=0"),
        (["--shots", "1", "--batch-size", "0"], "batch_size=0"),
    ],
)
def test_bad_settings_write_nothing(
    settings: list[str], message: str, checkpoint: Path, task_file: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "runs" / "run.zarr"
    code = run("analyze", "--model", checkpoint, "--task", task_file, "--output", out, *settings)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not out.parent.exists()


def test_an_existing_run_is_not_touched(task_file: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "run.zarr").mkdir()
    assert run("analyze", "--task", task_file, "--output", tmp_path / "run.zarr") == 2
    assert "exists already" in capsys.readouterr().err


def test_debug_shows_where(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["analyze", "--task", "nope", "--debug"])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert printed.splitlines()[-1].startswith("twotower: there is no task 'nope'")


def test_check_prints_the_identities(checkpoint: Path, capsys) -> None:
    assert run("check", checkpoint) == 0
    printed = capsys.readouterr().out
    assert "heads' outputs sum to the attention output" in printed
    assert "All hold." in printed


def test_a_server_that_is_none(capsys) -> None:
    assert run("check", "gpt2", "--remote", "nowhere") == 2
    assert "the address of a server" in capsys.readouterr().err


def test_tasks(capsys) -> None:
    assert run("tasks") == 0
    printed = capsys.readouterr().out
    for name in tt.prompts.bundled_tasks():
        assert name[:10] in printed
    for name in tt.prompts.bundled_pairs():
        assert name[:10] in printed
    assert run("tasks", "animals-cities") == 0
    assert "animal (48): cat, dog" in capsys.readouterr().out
    assert run("tasks", "capitals") == 0
    assert "France: Paris" in capsys.readouterr().out


def test_help_does_not_import_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "from twotower.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'transformers', 'nnsight', 'xarray', 'zarr', 'pandas', 'matplotlib'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


# ---- experiments ---------------------------------------------------------------------------------


def test_experiments_are_listed(capsys) -> None:
    assert run("experiments", "list") == 0
    out = capsys.readouterr().out
    assert "qk-similarity" in out
    assert "animals-cities" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give names or --all"),
        (("--all", "qk-similarity"), "give names or --all"),
        (("qk",), "unknown experiment 'qk'; there are"),
        (("absent.py",), "is not a Python file"),
        (("qk-similarity", "--task", "no-such-task"), "no-such-task"),
        (("qk-similarity", "--model", "./no-such-folder"), "there is no folder"),
        (("qk-similarity", "--quantization", "int3"), '"int3" for --quantization'),
    ],
)
def test_experiments_refused(arguments, message: str, tmp_path: Path, capsys) -> None:
    code = run("experiments", "run", *arguments, "--out", tmp_path / "out")
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_experiments_with_a_task_that_does_not_fit(
    checkpoint: Path, task_file: Path, tmp_path: Path, capsys
) -> None:
    """Four texts a class are too few: refused before anything is measured."""
    out = tmp_path / "out"
    code = run(
        "experiments", "run", "qk-similarity", "--model", checkpoint, "--task", task_file,
        "--out", out,
    )  # fmt: skip
    assert code == 2
    assert "text" in capsys.readouterr().err
    assert not out.exists()


def test_experiments_with_a_model_that_cannot_do_it(
    checkpoint: Path, tmp_path: Path, capsys
) -> None:
    out = tmp_path / "out"
    code = run(
        "experiments", "run", "qk-similarity", "--quick", "--model", checkpoint, "--out", out
    )  # fmt: skip
    assert code == 1
    assert "there is nothing to explain" in capsys.readouterr().err
    assert not list(out.glob("*.json"))


@pytest.mark.parametrize("measures", [["qk"], ["predictions"], ["qk", "ov"]])
def test_analyze_a_part(
    measures: list[str], checkpoint: Path, task_file: Path, tmp_path: Path, capsys
) -> None:
    """What was not measured is not told of."""
    out = tmp_path / "run.zarr"
    settings = ["--model", checkpoint, "--task", task_file, "--shots", 2, "--n", 2]
    assert run("analyze", *settings, "--output", out, "--measures", *measures) == 0
    said = capsys.readouterr().out
    assert ("Accuracy" in said) == ("predictions" in measures)
    assert "Strongest" not in said
    assert set(tt.open(out).children) - {"prompts", "scores", "units"} == set(measures)


@pytest.mark.parametrize("debug", [False, True])
@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (
            ZeroDivisionError("by\n0"),
            1,
            "unexpected error (ZeroDivisionError: by 0)",
        ),
        (KeyboardInterrupt(), 130, "twotower: interrupted"),
    ],
)
def test_what_is_unforeseen(
    error: BaseException, code: int, words: str, debug: bool, capsys, monkeypatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("twotower.cli.commands.app", SimpleNamespace(meta=fails))
    with pytest.raises(SystemExit) as caught:
        main(["tasks", *(["--debug"] if debug else [])])
    said = capsys.readouterr().err
    assert caught.value.code == code
    assert words in said
    assert ("Traceback" in said) == (debug and code == 1)


def test_circuit(checkpoint: Path, tmp_path: Path, capsys) -> None:
    """The edges are those of `tt.circuit`, in the table, as JSON and in a file."""
    classes, file = {"animal": ["cat", "dog", "owl"], "city": ["Rome", "Oslo", "Bonn"]}, None
    model = tt.load(checkpoint)
    for number in range(20):  # a random model answers some task by chance
        texts = [f"{cls},{text}{number}" for cls, own in classes.items() for text in own]
        file = tmp_path / f"task{number}.csv"
        file.write_text("label,text\n" + "\n".join(texts) + "\n")
        prompts = tt.build_prompts(model, tt.load_task(file), shots=1, n=2)
        if float(tt.predict(model, prompts).margin.mean()) > 0.1:
            break
    out = tmp_path / "circuit.zarr"
    limits = ["--writers", 2, "--edges", 6, "--threshold", 0.0, "--depth", 1]
    arguments = ["circuit", checkpoint, "--task", file, "--n", 2, "--shots", 1, *limits]
    assert run(*arguments, "--json", "--out", out) == 0
    rows = json.loads(capsys.readouterr().out)
    found = tt.circuit(model, prompts, writers=2, edges=6, threshold=0.0, depth=1)
    assert len(rows) == found.sizes["edge"] == tt.open(out)["circuit"].sizes["edge"]
    effects = np.sort(abs(found.mean_effect.values))[::-1]
    assert [abs(row["effect"]) for row in rows] == pytest.approx(effects, abs=1e-4)
    assert run(*arguments, "--k", 1, "--out", tmp_path / "circuit.graphml") == 0
    shown = capsys.readouterr().out
    assert rows[0]["source"] in shown
    assert f"1 of {len(rows)} edges" in shown
    assert (tmp_path / "circuit.graphml").exists()
    assert run(*arguments, "--out", tmp_path / "circuit.csv") == 2
    assert "must end in one of .zarr" in capsys.readouterr().err


def test_kinds(checkpoint: Path, task_file: Path, capsys) -> None:
    """Heads are named by the thresholds; the table shows those that the JSON holds."""
    arguments = ["kinds", checkpoint, "--task", task_file, "--n", 3, "--shots", 1, "--k", 2]
    assert run(*arguments, "--json") == 0
    rows = json.loads(capsys.readouterr().out)
    model = tt.load(checkpoint)
    prompts = tt.build_prompts(model, tt.load_task(task_file), shots=1, n=3)
    found = tt.head_kinds(model, prompts)
    scores = [row["score"] for row in rows]
    assert scores == [score for score, _ in KINDS.values()] + ["qk_auc", "ov_auc"]
    for row, size in zip(rows[-2:], ("qk_size", "ov_size"), strict=True):
        sizes = found[size].where(found[row["score"]] >= row["least"]).values.ravel()
        best = np.sort(sizes[np.isfinite(sizes)])[::-1][:2]
        assert [head["size"] for head in row["heads"]] == pytest.approx(best, abs=1e-4)
    for row in rows[:-2]:
        sign = 1 if row["least"] > 0 else -1
        values, errors = found[row["score"]], found[f"{row['score']}_error"]
        reached = (sign * values >= abs(row["least"])) & (sign * values - errors > 0)
        best = (sign * values).where(reached).values.ravel()
        best = np.sort(best[np.isfinite(best)])[::-1][:2]
        assert [sign * head["score"] for head in row["heads"]] == pytest.approx(best, abs=1e-4)
    assert run(*arguments) == 0
    shown = capsys.readouterr().out
    assert "previous token" in shown
    assert "QK AUC" in shown
    assert run("kinds", checkpoint, "--task", "nothing") == 2
    pairs = task_file.with_name("pairs.csv")
    pairs.write_text("input,output\ncat,foo\ndog,bar\nowl,map\n")
    assert run("kinds", checkpoint, "--task", pairs, "--shots", 9) == 2
    assert "'pairs' has 3 pairs here, and 9 shots" in capsys.readouterr().err
