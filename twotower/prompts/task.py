"""A classification task: texts by class. From a dict, a file, the package, or the hub."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import finite, whole, yes_or_no
from ..errors import InputError

KINDS = ("words", "sentences")
"""What a task's texts can be."""


@dataclass(frozen=True)
class Task:
    """Texts sorted into classes.

    Parameters
    ----------
    name
        A short name; it is written into every result.
    texts
        Texts by class name. Repeated texts of a class are kept once.
    description
        What the classes are.
    kind
        "words" or "sentences".
    hard
        Whether small models are known to be at chance on it.
    source
        Where the texts come from.

    Raises
    ------
    InputError
        If there are fewer than two classes, a class is empty, a text is blank or not a
        string, or a text stands in two classes; if the name is none, or the kind not known.

    Examples
    --------
    >>> task = Task("pets-towns", {"animal": ["cat", "dog"], "city": ["Paris", "Rome"]})
    >>> task.classes
    ('animal', 'city')
    """

    name: str
    texts: Mapping[str, Sequence[str]]
    description: str = ""
    kind: str = "sentences"
    hard: bool = False
    source: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name.strip():
            raise InputError(f"the task's name {self.name!r} must be a text")
        if self.kind not in KINDS:
            raise InputError(f"kind={self.kind!r} is not known; use one of {', '.join(KINDS)}")
        for about in ("description", "source"):
            if not isinstance(getattr(self, about), str):
                raise InputError(f"{about}={getattr(self, about)!r} must be a text")
        yes_or_no("hard", self.hard)
        if not isinstance(self.texts, Mapping):
            raise InputError(f"task {self.name!r}: texts must be a dict of class name to texts")
        if len(self.texts) < 2:
            raise InputError(f"task {self.name!r} has {len(self.texts)} class; it needs at least 2")
        owner: dict[str, str] = {}
        kept: dict[str, tuple[str, ...]] = {}
        for name, texts in self.texts.items():
            if not isinstance(name, str) or not name.strip():
                raise InputError(f"task {self.name!r}: the class {name!r} needs a name, as text")
            if isinstance(texts, str) or not isinstance(texts, Iterable):
                raise InputError(f"task {self.name!r}: class {name!r} needs a list of texts")
            texts = tuple(texts)
            for text in texts:
                if not isinstance(text, str) or not text.strip():
                    raise InputError(
                        f"task {self.name!r}: class {name!r} holds {text!r}, which is no text"
                    )
            unique = tuple(dict.fromkeys(texts))
            if not unique:
                raise InputError(f"task {self.name!r}: class {name!r} has no texts")
            for text in unique:
                key = " ".join(text.split())
                if owner.setdefault(key, name) != name:
                    raise InputError(
                        f"task {self.name!r}: {text!r} stands in the classes "
                        f"{owner[key]!r} and {name!r}; keep it in one"
                    )
            kept[name] = unique
        object.__setattr__(self, "texts", kept)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in order."""
        return tuple(self.texts)

    def split(self, fraction: float, seed: int) -> tuple[Task, Task]:
        """Two tasks with no text in common.

        Parameters
        ----------
        fraction
            Share of each class's texts that goes to the first, between 0 and 1.
        seed
            Seed of the draw.

        Raises
        ------
        InputError
            If the fraction is not between 0 and 1, or a class has one text.
        """
        if not 0 < finite("fraction", fraction) < 1:
            raise InputError(f"fraction={fraction} must lie strictly between 0 and 1")
        whole("seed", seed)
        rng = np.random.default_rng([seed, 7])
        first, second = {}, {}
        for name, texts in self.texts.items():
            order = rng.permutation(len(texts))
            cut = min(max(round(fraction * len(texts)), 1), len(texts) - 1)
            if cut < 1:
                raise InputError(f"class {name!r} of {self.name!r} has one text: nothing to split")
            first[name] = [texts[i] for i in sorted(order[:cut])]
            second[name] = [texts[i] for i in sorted(order[cut:])]
        about = (self.description, self.kind, self.hard, self.source)
        return Task(self.name, first, *about), Task(self.name, second, *about)


@dataclass(frozen=True)
class HubTask:
    """Where on the Hugging Face hub a task's texts and classes are."""

    dataset: str
    text: str
    label: str
    split: str = "train"
    config: str | None = None


HUB_TASKS = {
    "sst2": HubTask("stanfordnlp/sst2", "sentence", "label"),
    "ag_news": HubTask("fancyzhx/ag_news", "text", "label"),
    "trec": HubTask("CogComp/trec", "text", "coarse_label"),
    "dbpedia_14": HubTask("fancyzhx/dbpedia_14", "title", "label"),
    "emotion": HubTask("dair-ai/emotion", "text", "label"),
}


def bundled_tasks() -> list[str]:
    """Names of the tasks that come with the package."""
    folder = resources.files(__package__) / "tasks"
    return sorted(
        f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")
    )


def load_task(
    source: str,
    *,
    text: str = "text",
    label: str = "label",
    split: str = "train",
    config: str | None = None,
    max_per_class: int = 200,
    seed: int = 0,
) -> Task:
    """A task by name, from a file, or from the hub.

    Parameters
    ----------
    source
        A bundled task ("animals-cities"; `bundled_tasks` lists them), a ready hub entry
        ("sst2", "ag_news", "trec", "dbpedia_14", "emotion"), a CSV or JSONL file, or
        "hub:owner/dataset" (needs the extra `twotower[hub]`). A folder that
        `datasets.load_dataset` reads also works as "hub:folder".
    text, label
        Names of the columns that hold the texts and the classes.
    split, config
        Split and configuration of a hub dataset.
    max_per_class
        Texts kept per class of a hub dataset, drawn by `seed`.
    seed
        Seed of that draw.

    Returns
    -------
    Task

    Raises
    ------
    InputError
        If there is no such task, file or column, or the texts do not make a task.
    """
    source = str(source) if isinstance(source, Path) else source
    if not isinstance(source, str):
        raise InputError(f"{source!r} is no task's name; for texts of your own see Task")
    for name, value in (("text", text), ("label", label), ("split", split)):
        if not isinstance(value, str):
            raise InputError(f"{name}={value!r} must be a text")
    if config is not None and not isinstance(config, str):
        raise InputError(f"config={config!r} must be a text")
    whole("max_per_class", max_per_class, 1)
    whole("seed", seed)
    if source in bundled_tasks():
        path = resources.files(__package__) / "tasks" / f"{source}.json"
        return Task(**json.loads(path.read_text(encoding="utf-8")))
    if source in HUB_TASKS:
        return _from_hub(source, HUB_TASKS[source], max_per_class, seed)
    if source.startswith("hub:"):
        name = source.removeprefix("hub:")
        if not name.strip("/"):
            raise InputError(f"{source!r} names no dataset; write hub:owner/dataset")
        return _from_hub(name, HubTask(name, text, label, split, config), max_per_class, seed)
    path = Path(source)
    if path.suffix.lower() in (".csv", ".jsonl"):
        if not path.is_file():
            raise InputError(f"there is no file {source}")
        return _from_file(path, text, label)
    raise InputError(
        f"there is no task {source!r}. Bundled: {', '.join(bundled_tasks())}. On the hub: "
        f"{', '.join(HUB_TASKS)}. Or give a .csv or .jsonl file, or hub:owner/dataset"
    )


def _from_file(path: Path, text: str, label: str) -> Task:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".csv":
                rows: list[dict[str, Any]] = list(csv.DictReader(file))
            else:
                rows = []
                for number, line in enumerate(file, start=1):
                    try:
                        rows += [json.loads(line)] if line.strip() else []
                    except json.JSONDecodeError as error:
                        raise InputError(f"{path}, line {number}: {error.msg}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
    if not rows:
        raise InputError(f"{path} holds no rows")
    return _task(path.stem, rows, text, label, f"file {path.name}", strict=True)


def _from_hub(name: str, entry: HubTask, max_per_class: int, seed: int) -> Task:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{name!r} is on the hub, which needs the package datasets: pip install 'twotower[hub]'"
        ) from error
    try:
        table = datasets.load_dataset(entry.dataset, entry.config, split=entry.split)
    except Exception as error:
        raise InputError(
            f"{entry.dataset} could not be had from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check the name and the network"
        ) from error
    for column in (entry.text, entry.label):
        if column not in table.column_names:
            raise InputError(
                f"{entry.dataset} has no column {column!r}; it has {', '.join(table.column_names)}"
            )
    names = getattr(table.features[entry.label], "names", None)
    table = table.shuffle(seed=seed)
    rows: list[dict[str, Any]] = []
    kept: dict[Any, int] = {}
    for row in table:
        value = row[entry.label]
        if value in (None, "") or (names and value == -1):  # not labelled, as test splits are
            continue
        cls = names[value] if names and isinstance(value, int) else value
        kept[cls] = kept.get(cls, 0) + 1
        if kept[cls] <= max_per_class:
            rows.append({entry.text: row[entry.text], entry.label: cls})
    source = f"hub {entry.dataset}, split {entry.split}"
    return _task(
        name.rstrip("/").split("/")[-1], rows, entry.text, entry.label, source, strict=False
    )


def _task(
    name: str, rows: list[dict[str, Any]], text: str, label: str, source: str, strict: bool
) -> Task:
    """A task from rows; where not strict, blank and contradictory texts are left out."""
    texts: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict) or text not in row or label not in row:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise InputError(
                f"row {number} of {name} lacks the column {text!r} or {label!r}; it has {has}. "
                "Name the columns with text= and label= (--text-column and --label-column)"
            )
        if row[label] is None or not str(row[label]).strip():
            raise InputError(f"row {number} of {name} has no class in the column {label!r}")
        # Templates put one demonstration on one line.
        if not isinstance(row[text], (str, int, float, type(None))):
            raise InputError(f"row {number} of {name} holds {row[text]!r} in {text!r}, no text")
        value = " ".join(("" if row[text] is None else str(row[text])).split())
        cls = str(row[label])
        if not strict and (not value or owner.setdefault(value, cls) != cls):
            continue
        texts.setdefault(cls, []).append(value)
    lengths = [len(x.split()) for xs in texts.values() for x in xs]
    kind = "words" if lengths and max(lengths) <= 2 else "sentences"
    return Task(name, dict(sorted(texts.items())), kind=kind, source=source)
