"""Experiments on real text: `python -m bench.experiments.NAME DATA`, DATA a folder with sst2/ and cola/."""
