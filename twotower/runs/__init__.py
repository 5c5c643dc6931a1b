"""Runs: their configuration, and how it is carried out."""
