"""Assign labels to classes, and decide whether labels are permuted between prompts."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from typing import Any

from ..checks import encodable, is_list, shown, yes_or_no
from ..errors import InputError
from .classes import class_name
from .task import Task
from .tokens import CANDIDATE_LABELS


def order_labels(task: Task, labels: Any, permute: bool | None) -> tuple[tuple[str, ...], bool]:
    """Return labels in the order of the task's classes, and whether they are permuted.

    Parameters
    ----------
    task
        Task whose classes get the labels.
    labels
        A list of words, a dict of class to word, or None for neutral words.
    permute
        The user's choice; None to decide from the labels. Labels that are class names are
        then not permuted, because permuted ones would contradict the demonstrations.

    Raises
    ------
    InputError
        If there is not one label per class; if labels are equal or not words; or if only some
        labels are class names and `permute` is None.
    """
    if permute is not None:
        yes_or_no("permute_labels", permute)
    if labels is None:
        names = {_folded(name) for name in task.classes}
        labels = [word for word in CANDIDATE_LABELS if word not in names][: len(task.classes)]
    by_class = isinstance(labels, Mapping)
    if by_class:
        words = _of_dict(task, labels)
    elif isinstance(labels, AbstractSet) or not is_list(labels):
        raise InputError(f"labels={shown(labels)} must be a list of words, one per class")
    else:
        words = list(labels)
    if len(words) != len(task.classes):
        raise InputError(
            f"{task.name!r} has {len(task.classes)} classes ({', '.join(task.classes)}) and there "
            f"are {len(words)} labels; give one label per class"
        )
    for word in words:
        if not isinstance(word, str) or not word or word != word.strip():
            raise InputError(f"label {word!r} must be a word without spaces around it")
        encodable("label", word)
    if len(set(words)) != len(words):
        raise InputError(f"labels must differ: {', '.join(words)}")
    own = None if by_class else _own_names(task, words)
    if permute is None and own is None and not by_class:
        _check_some(task, words)
    permuted = own is None and not by_class if permute is None else bool(permute)
    return tuple(map(str, own or words)), permuted


def _of_dict(task: Task, labels: Mapping[Any, Any]) -> list[Any]:
    """Return labels from a dict, in the order of the classes."""
    named = [(class_name(cls), word) for cls, word in labels.items()]
    by_class = dict(named)
    if set(by_class) != set(task.classes) or len(named) != len(by_class):
        raise InputError(
            f"labels= names the classes {', '.join(str(name) for name, _ in named)}; name each "
            f"class of {task.name!r} once: {', '.join(task.classes)}"
        )
    return [by_class[cls] for cls in task.classes]


def _own_names(task: Task, words: list[str]) -> list[str] | None:
    """Return labels that are the class names, in the order of the classes; else None."""
    if set(words) == set(task.classes):
        return list(task.classes)
    by_name = {_folded(word): word for word in words}
    names = [_folded(cls) for cls in task.classes]
    if len(by_name) < len(words) or set(by_name) != set(names):
        return None
    return [by_name[name] for name in names]


def _check_some(task: Task, words: list[str]) -> None:
    """Check that either all or no labels are class names."""
    names = {_folded(cls) for cls in task.classes}
    some = [word for word in words if _folded(word) in names]
    if some:
        raise InputError(
            f"the label {some[0]!r} is the name of a class of {task.name!r} and other labels are "
            "not; give labels by class, as in labels={"
            + ", ".join(f"{cls!r}: ..." for cls in task.classes[:2])
            + "}, or pass permute_labels=True or False"
        )


def _folded(name: str) -> str:
    return name.strip().casefold()
