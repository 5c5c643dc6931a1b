"""Wrong command lines and settings: exit code 2, one line of error, nothing printed or written."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command import run
from tiny import TWO
from transformers.utils import logging

import twotower as tt
from twotower.cli import commands as cli

ANALYZE = "analyze --model MODEL --task TASK "
SUITE = "experiments run qk-similarity --model MODEL "
LONG = "x" * 300

LINES = {
    "frob": 'Unknown command "frob"',
    "--frob": 'Unknown command "--frob"',
    "--config": "--config requires an argument",
    "--config x.yaml": "--config is only for `twotower analyze`",
    "--config x.yaml status x": "--config is only for `twotower analyze`",
    # demo
    "demo x": "Unused Tokens: ['x']",
    "demo --nope": "Unknown option: --nope",
    "demo --seed": "--seed requires an argument",
    "demo --seed x": "'x' must be a whole number",
    "demo --seed 1.5": "'1.5' must be a whole number",
    "demo --seed -1": "seed=-1 must be",
    "demo --threads 0": "threads=0 must be",
    "demo --threads 1.5": "'1.5' must be a whole number",
    "demo --task nope": "there is no task 'nope'",
    "demo --task six-fields": "the demo needs a task of two classes; 'six-fields' has 6",
    "demo --output ''": "is not a path for a run",
    "demo --output FILE/x.zarr": "is not a writable folder",
    "demo --output EMPTY": "cannot be read as a Zarr store",
    "demo": "set TWOTOWER_CACHE to a folder",
    # analyze
    "analyze x": "Unused Tokens: ['x']",
    "analyze --nn 3": "Unknown option: --nn",
    "analyze --n ''": "'' must be a whole number",
    "analyze --n 1e3": "'1e3' must be a whole number",
    "analyze --config nope.yaml": "nope.yaml cannot be read: No such file",
    "analyze --config EMPTY": "cannot be read: Is a directory",
    "analyze --config FILE": "must hold names and values",
    ANALYZE + "--n 0": "n=0 must be",
    ANALYZE + "--n 99999999999": "n=99999999999 must be a whole number, from 1 to 1000000",
    ANALYZE + "--shots -1": "shots=-1 must be",
    ANALYZE + "--shots 0": "shots must leave at least one demonstration",
    ANALYZE + "--shots 99": "99 shots and a query need 100",
    ANALYZE + "--seed -1": "seed=-1 must be",
    ANALYZE + "--seed 1.5": "'1.5' must be a whole number",
    ANALYZE + "--seed 0 0": "seed=[0, 0] must be one value, or several without repeats",
    ANALYZE + "--order sideways": 'Invalid value "sideways" for --order',
    ANALYZE + "--norm x": 'Invalid value "x" for --norm',
    ANALYZE + "--keep last": 'Invalid value "last" for --keep',
    ANALYZE + "--measures x": 'Invalid value "x" for --measures',
    ANALYZE + "--shots 1 --measures": "choose a list from predictions",
    ANALYZE + "--shots 1 --labels foo": "there are 1 labels",
    ANALYZE + "--shots 1 --labels foo foo": "labels must differ",
    ANALYZE + "--shots 1 --labels a=foo a=bar": "names a class twice",
    ANALYZE + "--shots 1 --labels zz=foo b=bar": "names the classes zz, b; name each class of",
    ANALYZE + "--shots 1 --template x": "must hold {text} and then {label}",
    ANALYZE + "--text-column z": "has no column 'z'",
    ANALYZE + "--label-column z": "has no column 'z'",
    ANALYZE + "--permute-labels maybe": "Unused Tokens: ['maybe']",
    ANALYZE + "--batch-size -1": "batch_size=-1 must be",
    ANALYZE + "--unit-size 0": "unit_size=0 must be",
    ANALYZE + "--threads 0": "threads=0 must be",
    ANALYZE + "--dtype float33": "dtype='float33' is not a torch dtype",
    ANALYZE + "--dtype int8": "is not a floating-point type",
    ANALYZE + "--device-map nope": "could not be loaded: ValueError",
    ANALYZE + "--quantization int3": 'Invalid value "int3" for --quantization',
    ANALYZE + "--revision main": "revision= is for a model on the hub",
    ANALYZE + "--remote nowhere": "or the address of a server",
    ANALYZE + "--engine x": 'Invalid value "x" for --engine',
    ANALYZE + "--workers 2": "--workers is for --engine ray",
    ANALYZE + "--address x": "--address is for --engine ray",
    ANALYZE + "--gpus-per-replica 1": "--gpus-per-replica is for --engine ray",
    ANALYZE + "--patience -1": "patience=-1.0 must be at least 0",
    ANALYZE + "--patience nan": "patience=nan must be at least 0",
    ANALYZE + "--output ''": "cannot be read as a Zarr store",
    ANALYZE + "--output FILE": "cannot be read as a Zarr store",
    ANALYZE + "--output FILE/x.zarr": "is not a writable folder",
    ANALYZE + "--output EMPTY --overwrite": "cannot be read as a Zarr store",
    ANALYZE + "--output RUN": "exists already; use --overwrite, or another --output",
    ANALYZE + "--output nope://x": "nope://x cannot be used",
    ANALYZE + f"--output {LONG}": "cannot be a store: File name too long",
    "analyze --model MODEL MODEL --task TASK": "must be one value, or several without repeats",
    "analyze --model ./nope --task TASK": "there is no folder ./nope",
    "analyze --model EMPTY --task TASK": "it has no config.json",
    "analyze --model someone/none --task TASK": "could not be loaded from the hub",
    "analyze --task nope": "there is no task 'nope'",
    "analyze --task nope.csv": "there is no file nope.csv",
    "analyze --task hub:": "names no dataset",
    # status, heads, show, report
    "status": "--run requires an argument",
    "status nope": "there is no store at nope",
    "status RUN": "is not a run measured in units",
    "status FILE": "is not a run measured in units",
    "status RUN --jsn": "Unknown option: --jsn",
    "heads": "--run requires an argument",
    "heads nope": "there is no store at nope",
    "heads FILE": "cannot be read as a Zarr store",
    "heads MODEL": "cannot be read as a Zarr store",
    "heads ANSWERS": "the run has no numbers of heads",
    "heads RUN --k 0": "k=0 must be",
    "heads RUN --k 1.5": "'1.5' must be a whole number",
    "heads RUN --by auc": "by='auc' is not in the run; it has margin_drop",
    "heads RUN --part a": "no part 'a'",
    "heads s3:// --json": "s3:// cannot be used",
    "show RUN": "--head requires an argument",
    "show RUN --head 1": "'1' is not a head; write layer.head",
    "show RUN --head 1.2.3": "'1.2.3' is not a head",
    "show RUN --head 9.0": "the run has no head 9.0",
    "show RUN --head 0.0 --prompt -1": "prompt=-1 must be",
    "show RUN --head 0.0 --prompt 9": "prompt 9 is not in the run",
    "show ANSWERS --head 0.0": "the run has neither qk nor ov",
    "report": "--run requires an argument",
    "report nope": "there is no store at nope",
    "report RUN nope": "there is no store at nope",
    "report RUN ANSWERS": "cannot be compared",
    "report RUN --prompts 1.5": "'1.5' must be a whole number",
    "report RUN --prompts 0 0": "prompt 0 is named twice",
    "report RUN --prompts 9": "prompt 9 is not in the run",
    "report RUN --most-bytes 9": "most_bytes=9 must be",
    "report RUN -o EMPTY": "it is a folder",
    "report RUN -o nope/x.html": "its folder is not there",
    f"report RUN -o {LONG}": "cannot be written: File name too long",
    "report RUN --other-part x": "no part 'x'",
    # check, plan, bench, fetch, tasks
    "check ./nope": "there is no folder ./nope",
    "check FILE": "there is no folder",
    "check EMPTY": "it has no config.json",
    "check gpt2-large": "is only a shape here",
    "check MODEL x": "Unused Tokens: ['x']",
    "check MODEL --dtype x": "dtype='x' is not a torch dtype",
    "check MODEL --threads 0": "threads=0 must be",
    "check MODEL --remote ftp://x": "or the address of a server",
    "check MODEL --revision ''": "revision= is for a model on the hub",
    "check": "set TWOTOWER_CACHE to a folder",
    "plan": "--model requires an argument",
    "plan llama-7b --gpu": "--gpu needs the memory of each GPU",
    "kinds --n 0": "n=0 must be a whole number, 1 or more",
    "plan ./nope": "there is no folder ./nope",
    "plan EMPTY": "it has no config.json",
    "plan MODEL --gpu lots": "gpu='lots' must be a number of bytes",
    "plan MODEL --cpu lots": "cpu='lots' must be a number of bytes",
    "plan MODEL --dtype x": "dtype='x' is not a torch dtype",
    "plan MODEL --quantization x": "quantization='x' is not known",
    "plan llama-7b --device-map x": "device_map='x'",
    "plan MODEL --keep x": "keep='x' is not known",
    "plan MODEL --batch 0": "batch=0 must be",
    "plan MODEL --prompts x": "'x' must be a whole number",
    "plan MODEL --prompt-tokens 9999": "takes at most 256",
    "bench ./nope": "there is no folder ./nope",
    "bench MODEL --rounds 0": "rounds=0 must be",
    "bench MODEL --batch x": "'x' must be a whole number",
    "bench MODEL --prompt-tokens 0": "prompt_tokens=0 must be",
    "bench MODEL --measures x": "'x' is not known; measures are",
    "bench MODEL --weights x": "weights='x' is not known",
    "fetch x": "Unused Tokens: ['x']",
    "fetch": "set TWOTOWER_CACHE to a folder",
    "tasks nope": "there is no task 'nope'",
    "tasks a b": "Unused Tokens: ['b']",
    "tasks FILE": "is not a readable table",
    # experiments
    "experiments x": 'Unknown command "x"',
    "experiments list x": "Unused Tokens: ['x']",
    "experiments run": "give names or --all",
    "experiments run --all qk-similarity": "give names or --all",
    "experiments run nope": "unknown experiment 'nope'; there are",
    "experiments run nope.py": "nope.py is not a Python file",
    "experiments run PLAIN": "defines no EXPERIMENT",
    "experiments run LEAVES": "cannot be run: SystemExit: 3",
    "experiments run BROKEN": "cannot be run: SyntaxError",
    SUITE + "qk-similarity": "an experiment is given twice",
    SUITE + "--batch-size 0": "batch_size=0 must be",
    SUITE + "--batch-size x": "'x' must be a whole number",
    SUITE + "--threads 0": "threads=0 must be",
    SUITE + "--workers 1": "--workers is for --engine ray",
    SUITE + "--patience -1": "patience=-1.0 must be",
    SUITE + "--task ''": "there is no task ''",
    SUITE + "--dtype x": "dtype='x' is not a torch dtype",
    SUITE + "--out FILE": "cannot be read",
    "experiments run qk-similarity --model ./nope": "there is no folder ./nope",
}

SETTINGS = {
    "n: [1, 2]": "n: [1, 2] must be a whole number",
    "n: .inf": "n: inf must be a whole number",
    "n: 2024-01-01": "must be a whole number",
    "n: 4\nn: 5": "'n' is set twice",
    "seed: []": "must be one value, or several without repeats",
    "seed: [0, 0]": "must be one value, or several without repeats",
    "seed: [a]": "must be a whole number, or a list",
    "model: []": "must be one value, or several without repeats",
    "model: 3": "model: 3 must be a text, or a list",
    "model: ~": "model: None must be a text, or a list",
    "labels: [1, 2]": "must be a list of texts",
    "labels: {a: 1}": "must be a list of texts, or class: text",
    "labels: {a: yes}": "must be a list of texts, or class: text",
    "permute_labels: 'no'": "permute_labels: 'no' must be true or false",
    "control_tokens: 'no'": "control_tokens: 'no' must be true or false",
    "measures: qk": "must be a list of texts",
    "measures: [zzz]": 'Invalid value "zzz" for [measures]',
    "order: sideways": 'Invalid value "sideways" for [order]',
    "engine: x": 'Invalid value "x" for [engine]',
    "patience: x": "must be a number",
    "patience: .nan": "patience=nan must be",
    "logprobs: 'yes'": "must be true or false",
    "template: 5": "template: 5 must be a text",
    "remote: true": "remote: True must be a text",
    "output: [a]": "must be a text",
    "overwrite: 'no'": "must be true or false",
    "modle: x": "unknown setting 'modle'; settings are",
    "3: x": "unknown setting 3",
    "null: x": "unknown setting None",
    "- a": "must hold names and values",
    "text": "must hold names and values",
    "a: b: c": "is not YAML",
    "\t- x": "is not YAML",
    "a: \x00": "is not YAML",
    "? [a]\n: b": "is not YAML",
    "!!python/object/apply:os.system ['touch evil']": "is not YAML",
    "a: &a [*a]": "unknown setting 'a'",
}


@pytest.fixture(scope="module")
def places(llama, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("places")
    texts = {
        "TASK": ("task.csv", "text,label\n" + _rows()),
        "FILE": ("file", "x"),
        "PLAIN": ("plain.py", "x = 1\n"),
        "LEAVES": ("leaves.py", "raise SystemExit(3)\n"),
        "BROKEN": ("broken.py", "def (\n"),
    }
    found = {"MODEL": checkpoint, "EMPTY": folder / "empty"}
    found["EMPTY"].mkdir()
    for name, (file, text) in texts.items():
        found[name] = folder / file
        found[name].write_text(text)
    measured = tt.analyze(llama, tt.build_prompts(llama, TWO, shots=1, n=4))
    found["RUN"] = Path(tt.save(measured, folder / "run.zarr"))
    found["ANSWERS"] = Path(tt.save(measured["predictions"], folder / "answers.zarr"))
    return found


@pytest.fixture(scope="module")
def files(places: dict[str, Path]) -> set[str]:
    """All that lies in the places before the commands."""
    return _files(places)


def _files(places: dict[str, Path]) -> set[str]:
    found = {str(place) for place in places.values()}
    for place in places.values():
        for folder, inside, names in os.walk(place):
            found.update(os.path.join(folder, name) for name in (*inside, *names))
    return found


def _rows() -> str:
    return "".join(f"{text},{cls}\n" for cls, texts in TWO.texts.items() for text in texts)


@pytest.fixture(autouse=True)
def _surroundings(
    places: dict[str, Path], loaded_once: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """An empty folder, no network, no demo model; no bars, as where the command line starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TWOTOWER_CACHE", str(places["FILE"]))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    logging.disable_progress_bar()
    yield
    logging.enable_progress_bar()


def _refused(arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    code = run(*arguments)
    printed = capfd.readouterr()
    assert (code, printed.out) == (2, "")
    assert printed.err.startswith("twotower: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert "Traceback" not in printed.err
    assert "unexpected error" not in printed.err


@pytest.mark.parametrize("line", LINES)
def test_commands(line: str, places: dict[str, Path], files, tmp_path: Path, capfd) -> None:
    arguments = shlex.split(line)
    for name, place in places.items():
        arguments = [argument.replace(name, str(place)) for argument in arguments]
    _refused(arguments, LINES[line], capfd)
    assert not list(tmp_path.iterdir())
    assert _files(places) == files


@pytest.mark.parametrize("text", SETTINGS)
def test_settings(text: str, places: dict[str, Path], tmp_path: Path, capfd) -> None:
    settings = tmp_path / "run.yaml"
    settings.write_text(text)
    given = ["analyze", "--config", str(settings), "--task", str(places["TASK"])]
    if not text.startswith("model"):
        given += ["--model", str(places["MODEL"])]
    _refused(given, SETTINGS[text], capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["run.yaml"]


def test_exit_codes_are_documented() -> None:
    said = " ".join((cli.__doc__ or "").split())
    for code in ("0 success", "1 a finding", "2 unusable", "130 interrupted", "141 the reader"):
        assert code in said
    page = (Path(__file__).parents[1] / "docs" / "long-runs.md").read_text(encoding="utf-8")
    assert "exit code 2" in page
    assert "130 that the run was interrupted" in page


@pytest.mark.slow
def test_a_process_of_its_own(places: dict[str, Path], tmp_path: Path) -> None:
    """Bars of the libraries do not show there either."""
    line = ["analyze", "--model", places["MODEL"], "--task", places["TASK"], "--labels", "foo"]
    found = subprocess.run(
        [sys.executable, "-m", "twotower.cli", *map(str, line), "--shots", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert (found.returncode, found.stdout) == (2, "")
    assert found.stderr.startswith("twotower: ")
    assert found.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
