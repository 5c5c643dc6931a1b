"""Classification tasks: texts by class, from a dict, a table, the package, or the hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import encodable, finite, is_list, one_of, shown, whole, yes_or_no
from ..errors import InputError
from .bundled import bundled_pairs, bundled_tasks
from .classes import class_name, is_missing, texts_by_class
from .tables import (
    FORMATS,
    SEPARATED,
    Rows,
    Table,
    dataset_rows,
    read_file,
    read_object,
    whole_classes,
)

KINDS = ("words", "sentences")
"""Kinds of texts."""


@dataclass(frozen=True)
class Task:
    """A classification task: texts by class.

    Parameters
    ----------
    name
        A short name, written into every result.
    texts
        Texts by class: a dict of class to any iterable of texts, a pandas Series of lists, or
        a list of tuples (text, class). Repeated texts of a class are kept once. Numeric
        classes become texts.
    description
        Description of the classes.
    kind
        "words" or "sentences".
    hard
        Whether small models are known to be at chance on it.
    source
        Source of the texts.

    Raises
    ------
    InputError
        If there are fewer than two classes, a class is empty, a text is blank or not a
        string, a text is in two classes, the name is empty, or the kind is unknown.

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
            raise InputError(f"the task's name {shown(self.name)} must be a text")
        one_of("kind", self.kind, KINDS)
        for about in ("description", "source"):
            if not isinstance(getattr(self, about), str):
                raise InputError(f"{about}={shown(getattr(self, about))} must be a text")
            encodable(f"the task's {about}", getattr(self, about))
        encodable("the task's name", self.name)
        yes_or_no("hard", self.hard)
        try:
            given = texts_by_class(self.texts)
        except InputError as error:
            raise InputError(f"task {self.name!r}: {error}") from None
        if len(given) < 2:
            raise InputError(f"task {self.name!r} has {len(given)} class; it needs at least 2")
        owner: dict[str, str] = {}
        kept: dict[str, tuple[str, ...]] = {}
        for cls, texts in given:
            name = class_name(cls)
            if name is None:
                raise InputError(f"task {self.name!r}: the class {cls!r} needs a name, as text")
            encodable(f"task {self.name!r}: the class", name)
            if name in kept:
                raise InputError(
                    f"task {self.name!r}: the class {cls!r} needs a different name; another class "
                    f"is also {name!r}"
                )
            # Iterating over a table gives its column names.
            table = hasattr(texts, "columns") or hasattr(texts, "column_names")
            if table or not is_list(texts):
                raise InputError(f"task {self.name!r}: class {name!r} needs a list of texts")
            texts = tuple(texts)
            for text in texts:
                if not isinstance(text, str) or not text.strip():
                    raise InputError(
                        f"task {self.name!r}: class {name!r} holds {text!r}, which is no text"
                    )
                encodable(f"task {self.name!r}: the text", text)
            texts = tuple(map(str, texts))
            unique: dict[str, str] = {}
            for text in texts:  # those that differ only in blanks are the same
                unique.setdefault(" ".join(text.split()), text)
            if not unique:
                raise InputError(f"task {self.name!r}: class {name!r} has no texts")
            for key, text in unique.items():
                if owner.setdefault(key, name) != name:
                    raise InputError(
                        f"task {self.name!r}: {text!r} is in the classes "
                        f"{owner[key]!r} and {name!r}; keep it in one"
                    )
            kept[name] = tuple(unique.values())
        object.__setattr__(self, "texts", kept)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, in order."""
        return tuple(self.texts)

    def split(self, fraction: float, seed: int) -> tuple[Task, Task]:
        """Split into two tasks without common texts.

        Parameters
        ----------
        fraction
            Share of each class's texts in the first task, between 0 and 1.
        seed
            Seed of the draw.

        Raises
        ------
        InputError
            If the fraction is not between 0 and 1, or a class has only one text.
        """
        if not 0 < finite("fraction", fraction) < 1:
            raise InputError(f"fraction={fraction} must be strictly between 0 and 1")
        whole("seed", seed)
        rng = np.random.default_rng([seed, 7])
        first, second = {}, {}
        for name, texts in self.texts.items():
            order = rng.permutation(len(texts))
            cut = min(max(round(fraction * len(texts)), 1), len(texts) - 1)
            if cut < 1:
                raise InputError(f"class {name!r} of {self.name!r} has one text; a split needs two")
            first[name] = [texts[i] for i in sorted(order[:cut])]
            second[name] = [texts[i] for i in sorted(order[cut:])]
        about = (self.description, self.kind, self.hard, self.source)
        return Task(self.name, first, *about), Task(self.name, second, *about)


@dataclass(frozen=True)
class HubTask:
    """Dataset, columns and split of a task on the Hugging Face hub."""

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


def load_task(
    source: Any,
    *,
    name: str | None = None,
    text: str = "text",
    label: str = "label",
    split: str = "train",
    config: str | None = None,
    max_per_class: int = 200,
    seed: int = 0,
) -> Task:
    """Load a task by name, from a table, or from the hub.

    Parameters
    ----------
    source
        A bundled task ("animals-cities"; `bundled_tasks` lists them), a ready hub entry
        ("sst2", "ag_news", "trec", "dbpedia_14", "emotion"), a CSV, TSV, JSON, JSONL or
        Parquet file (Parquet needs the extra `twotower[tables]`), a pandas DataFrame, a
        `datasets.Dataset` or DatasetDict, or "hub:owner/dataset" (needs the extra
        `twotower[hub]`). A folder that `datasets.load_dataset` reads also works as
        "hub:folder".
    name
        The task's name; by default the name of the file or dataset.
    text, label
        Columns of the texts and the classes. Classes may be texts, numbers or booleans; 1 and
        1.0 are the same class.
    split, config
        Split of a hub dataset or DatasetDict, and configuration of a hub dataset.
    max_per_class
        Maximum number of texts per class of a hub dataset, drawn with `seed`.
    seed
        Seed of that draw.

    Returns
    -------
    Task

    Raises
    ------
    InputError
        If the task, file or column does not exist; if a file is not rectangular, not UTF-8, or
        has another separator than its extension says; if a row has no class; or if the texts
        are not a valid task.
    """
    source = str(source) if isinstance(source, Path) else source
    texts = {"text": text, "label": label, "split": split}
    texts |= {} if config is None else {"config": config}
    texts |= {} if name is None else {"name": name}
    for about, value in texts.items():
        if not isinstance(value, str):
            raise InputError(f"{about}={shown(value)} must be a text")
    whole("max_per_class", max_per_class, 1)
    whole("seed", seed)
    if not isinstance(source, str):
        table = read_object(source, text, label, split)
        if table is None:
            given = type(source).__name__ if len(repr(source)) > 60 else repr(source)
            raise InputError(
                f"{given} is neither a task name nor a table; for your own texts use Task"
            )
        return _task(table, text, label, name, strict=True)
    encodable("source", source)
    if source in bundled_tasks():
        path = resources.files(__package__) / "tasks" / f"{source}.json"
        task = Task(**json.loads(path.read_text(encoding="utf-8")))
        return task if name is None else replace(task, name=name)
    if source in HUB_TASKS:
        return _from_hub(source, HUB_TASKS[source], max_per_class, seed, name)
    if source.startswith("hub:"):
        at = source.removeprefix("hub:")
        if not at.strip("/"):
            raise InputError(f"{source!r} names no dataset; write hub:owner/dataset")
        entry = HubTask(at, text, label, split, config)
        return _from_hub(at, entry, max_per_class, seed, name)
    if Path(source).suffix.lower() in FORMATS:
        table = read_file(Path(source), text, label)
        if Path(source).suffix.lower() in SEPARATED:
            table = whole_classes(table, label)
        return _task(table, text, label, name, strict=True)
    endings = ", ".join(FORMATS)
    if Path(source).is_file():
        raise InputError(f"{source} is not a readable table; give one of {endings}")
    if source in bundled_pairs():
        raise InputError(f"{source!r} is a task of pairs: use load_pairs({source!r})")
    raise InputError(
        f"there is no task {source!r}. Bundled: {', '.join(bundled_tasks())}. On the hub: "
        f"{', '.join(HUB_TASKS)}. Or give a table ({endings}), or hub:owner/dataset"
    )


def _from_hub(at: str, entry: HubTask, max_per_class: int, seed: int, name: str | None) -> Task:
    try:
        import datasets
    except ImportError as error:
        raise InputError(
            f"{at!r} is on the hub, which needs the package datasets: pip install 'twotower[hub]'"
        ) from error
    try:
        table = datasets.load_dataset(entry.dataset, entry.config, split=entry.split)
    except Exception as error:
        raise InputError(
            f"{entry.dataset} could not be loaded from the hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); check the name and the network"
        ) from error
    table = table.shuffle(seed=seed)
    rows: Rows = []
    kept: dict[Any, int] = {}
    for row in dataset_rows(table, entry.text, entry.label, entry.dataset):
        cls = row[entry.label]
        if is_missing(cls) or cls == "":  # no class, as in test splits
            continue
        kept[cls] = kept.get(cls, 0) + 1
        if kept[cls] <= max_per_class:
            rows.append(row)
    source = f"hub {entry.dataset}, split {entry.split}"
    found = Table(rows, at.rstrip("/").split("/")[-1], source)
    return _task(found, entry.text, entry.label, name, strict=False)


def _task(table: Table, text: str, label: str, name: str | None, strict: bool) -> Task:
    """Make a task from rows; if not strict, skip blank and contradictory texts."""
    title = table.name
    texts: dict[str, list[str]] = {}
    owner: dict[str, str] = {}
    for number, row in enumerate(table.rows, start=1):
        where = f"row {number} of {title}"
        if not isinstance(row, dict) or text not in row or label not in row:
            has = ", ".join(map(str, row)) if isinstance(row, dict) else repr(row)
            raise InputError(
                f"{where} lacks the column {text!r} or {label!r}; it has {has}. "
                "Name the columns with text= and label= (--text-column and --label-column)"
            )
        if is_missing(row[label]) or (isinstance(row[label], str) and not row[label].strip()):
            raise InputError(f"{where} has no class in the column {label!r}")
        cls = class_name(row[label])
        if cls is None:
            raise InputError(f"{where} holds {row[label]!r} in {label!r}, which names no class")
        value = "" if is_missing(row[text]) else row[text]
        if not isinstance(value, (str, int, float)):
            raise InputError(f"{where} holds {value!r} in {text!r}, no text")
        # Templates put one demonstration on one line.
        value = " ".join(str(value).split())
        if strict and not value:
            raise InputError(f"{where}: class {cls!r} holds {value!r}, which is no text")
        if not strict and (not value or owner.setdefault(value, cls) != cls):
            continue
        texts.setdefault(cls, []).append(value)
    lengths = [len(x.split()) for xs in texts.values() for x in xs]
    kind = "words" if lengths and max(lengths) <= 2 else "sentences"
    texts = dict(sorted(texts.items()))
    return Task(title if name is None else name, texts, kind=kind, source=table.source)
