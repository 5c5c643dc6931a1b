"""Finding the experiments: the files of a folder that make one."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import InputError
from .experiment import Experiment


def experiments_folder() -> Path:
    """Where the experiments are: beside the package, or in it where it was installed.

    Raises
    ------
    InputError
        If there are none.
    """
    room = Path(__file__).resolve().parent
    for folder in (room / "scripts", room.parents[1] / "experiments"):
        if folder.is_dir():
            return folder
    raise InputError("the experiments did not come with this installation; clone the repository")


def find_experiments(folder: Path | None = None) -> dict[str, Experiment]:
    """Experiments by name, in the suite's order.

    Parameters
    ----------
    folder
        Where to look; by default the suite's own folder.
    """
    found = []
    for path in sorted((folder or experiments_folder()).glob("*.py")):
        if "EXPERIMENT = " in path.read_text(encoding="utf-8"):
            found.append(load_experiment(path))
    return {one.name: one for one in sorted(found, key=lambda one: one.number)}


def load_experiment(path: Path) -> Experiment:
    """The experiment that a file makes.

    Raises
    ------
    InputError
        If the file cannot be run, or makes none.
    """
    spec = importlib.util.spec_from_file_location(f"twotower_experiment_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InputError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a script that is no experiment may well exit
        raise InputError(f"{path} cannot be run: {type(error).__name__}: {error}") from error
    found = getattr(module, "EXPERIMENT", None)
    if not isinstance(found, Experiment):
        raise InputError(f"{path} makes no EXPERIMENT")
    return found


def choose(names: tuple[str, ...], every: bool) -> list[Experiment]:
    """The experiments that are meant by name, by file, or by saying all.

    Raises
    ------
    InputError
        If a name is not known, or nothing is meant.
    """
    if every == bool(names):
        raise InputError("name experiments, or say --all; `twotower experiments list` shows them")
    if len(set(names)) < len(names):
        raise InputError(f"an experiment is named twice: {', '.join(names)}")
    known = find_experiments()
    chosen = list(known.values()) if every else []
    for name in names:
        if name.endswith(".py"):
            chosen.append(load_experiment(Path(name)))
        elif name in known:
            chosen.append(known[name])
        else:
            raise InputError(f"{name!r} is no experiment; there are {', '.join(known)}")
    return chosen
