"""Benchmarks: `python -m bench list | run | compare | plot`. Results are JSON lines under bench/results."""
