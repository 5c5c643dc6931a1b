"""Find the experiments: files in a folder that define one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import InputError
from .experiment import Experiment


def experiments_folder() -> Path:
    """Return the folder of experiments, in the repository or in the installed package.

    Raises
    ------
    InputError
        If there is none.
    """
    here = Path(__file__).resolve().parent
    for folder in (here / "scripts", here.parents[1] / "experiments"):
        if folder.is_dir():
            return folder
    raise InputError("the experiments did not come with this installation; clone the repository")


def find_experiments(folder: Path | None = None) -> dict[str, Experiment]:
    """Return the experiments by name, in the suite's order.

    Parameters
    ----------
    folder
        Folder to search; by default the suite's own.
    """
    found = []
    for path in sorted((folder or experiments_folder()).glob("*.py")):
        if "EXPERIMENT = " in path.read_text(encoding="utf-8"):
            found.append(load_experiment(path))
    return {one.name: one for one in sorted(found, key=lambda one: one.number)}


def load_experiment(path: Path) -> Experiment:
    """Load the experiment that a file defines.

    Raises
    ------
    InputError
        If the file cannot be run, or defines no experiment.
    """
    spec = importlib.util.spec_from_file_location(f"twotower_experiment_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # other scripts may exit when imported
        raise InputError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise InputError(f"{path} defines no EXPERIMENT")
    return found


def choose(names: tuple[str, ...], every: bool) -> list[Experiment]:
    """Return the experiments given by name or file, or all of them.

    Raises
    ------
    InputError
        If a name is unknown, or neither names nor `every` are given.
    """
    if every == bool(names):
        raise InputError("give names or --all; `twotower experiments list` shows the names")
    if len(set(names)) < len(names):
        raise InputError(f"an experiment is given twice: {', '.join(names)}")
    known = find_experiments()
    chosen = list(known.values()) if every else []
    for name in names:
        if name.endswith(".py"):
            chosen.append(load_experiment(Path(name)))
        elif name in known:
            chosen.append(known[name])
        else:
            raise InputError(f"unknown experiment {name!r}; there are {', '.join(known)}")
    return chosen
