"""Edits of heads: what they are, as data, and how a walk carries them out."""
