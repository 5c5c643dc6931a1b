"""Exact sweeps: the effects of many changes of heads from one walk."""
