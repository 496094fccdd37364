"""The long campaign of malformed inputs against every reader: each must be refused in plain words, or read right."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.fuzzing.campaign import OUTCOMES, run_campaign, table
from bench.fuzzing.readers import READERS
from bench.fuzzing.seeds import make_seeds
from bench.record import record

LIMIT_S = 20.0  # for one input


def main(arguments: Sequence[str] = ()) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench run fuzz --", description=__doc__)
    parser.add_argument("--inputs", type=int, default=12_000, help="in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input of every reader")
    parser.add_argument("--reader", action="append", choices=list(READERS), help="only this one (again: this one too)")
    parser.add_argument("--keep", type=Path, help="new folder for the sound inputs, and those that met a fault")
    given = parser.parse_args(arguments)
    chosen = given.reader or list(READERS)
    shares = {name: READERS[name].share for name in chosen}
    counts = {name: round(given.inputs * share / sum(shares.values())) for name, share in shares.items()}
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.keep or Path(scratch) / "run"
        seeds = make_seeds(folder / "seeds")
        tallies = run_campaign(counts, seeds, folder, given.seed, LIMIT_S, given.first)
    print(table(tallies))
    for name, tally in tallies.items():
        for number, said in tally.faults:
            print(f"{name} {number}: {said}")
    faults = sum(len(t.faults) for t in tallies.values())
    told = {
        name: {"inputs": t.inputs, **{k: t.outcomes[k] for k in OUTCOMES}, "peak_bytes": t.peak_bytes, "s": t.seconds}
        for name, t in tallies.items()
    }
    config = {"inputs": sum(counts.values()), "seed": given.seed, "first": given.first, "readers": chosen}
    record(
        "fuzz", config, {"readers": told, "faults": faults, "limit_s": LIMIT_S, "wall_s": time.perf_counter() - start}
    )
    return 1 if faults else 0
