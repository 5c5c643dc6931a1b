"""Models one can look inside: loading, adapters, and the proof that they are read right."""

from .architecture import Architecture
from .load import load
from .model import Head, Model
from .registry import register

__all__ = ["Architecture", "Head", "Model", "load", "register"]
