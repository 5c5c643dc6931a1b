"""Runs: one configuration, and what is done with it."""
