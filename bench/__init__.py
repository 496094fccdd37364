"""Benchmarks: `python -m bench NAME`. Results are JSON lines under bench/results."""
