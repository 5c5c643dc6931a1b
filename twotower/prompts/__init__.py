"""Prompts: tasks, demonstrations, and the role of each token."""

from .build import build_prompts
from .bundled import bundled_pairs, bundled_tasks
from .classics import classic_prompts
from .contrast import contrast
from .pair_task import PairTask, load_pairs
from .positions import At, at
from .prompts import Prompts
from .strings import prompts_from_strings
from .task import Task, load_task

__all__ = [
    "At",
    "PairTask",
    "Prompts",
    "Task",
    "at",
    "build_prompts",
    "bundled_pairs",
    "bundled_tasks",
    "classic_prompts",
    "contrast",
    "load_pairs",
    "load_task",
    "prompts_from_strings",
]
