"""Prompts: tasks, demonstrations, and the role of each token."""

from .build import build_prompts
from .positions import At, at
from .prompts import Prompts
from .strings import prompts_from_strings
from .task import Task, bundled_tasks, load_task

__all__ = [
    "At",
    "Prompts",
    "Task",
    "at",
    "build_prompts",
    "bundled_tasks",
    "load_task",
    "prompts_from_strings",
]
