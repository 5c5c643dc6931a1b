"""Models one can look inside: loading, adapters, and the proof that they are read right."""

from ..head import Head
from .architecture import Architecture
from .load import load
from .model import Model
from .registry import register

__all__ = ["Architecture", "Head", "Model", "load", "register"]
