"""Sizing: what fits on a machine, and how fast it runs."""
