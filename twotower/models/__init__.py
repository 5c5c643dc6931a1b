"""Model loading, architecture adapters, and the check that a model is read correctly."""

from ..head import Head
from .architecture import Architecture
from .load import load
from .model import Model
from .registry import register

__all__ = ["Architecture", "Head", "Model", "load", "register"]
