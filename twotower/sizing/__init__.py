"""Sizing: memory plans and benchmarks."""
