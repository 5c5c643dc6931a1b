"""Prompts: tasks, demonstrations, and the role of every token."""

from .build import build_prompts, prompts_from_strings
from .prompts import Prompts
from .task import Task, bundled_tasks, load_task

__all__ = ["Prompts", "Task", "build_prompts", "bundled_tasks", "load_task", "prompts_from_strings"]
