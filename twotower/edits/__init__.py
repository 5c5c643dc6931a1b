"""Edits of heads: data classes that describe them, and code that applies them in a walk."""
