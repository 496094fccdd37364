"""Inputs read by a worker process of their own, which may die, hang or run out of memory without taking the campaign.

An input is made anew from (seed, reader, number), so a worker that died is replaced by one that goes on behind it.
"""

from __future__ import annotations

import importlib
import logging
import multiprocessing
import resource
import shutil
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from bench.fresh import status
from bench.fuzzing.proofs import ProofError
from bench.fuzzing.readers import READERS, Reader
from ntkengine.errors import InputError

ROOM = 1 << 30  # bytes of address space a reader may take, above what the worker has
_FINE = ("refused", "read")
OUTCOMES = (*_FINE, "wrong", "raised", "memory", "died", "hung")


@dataclass
class Tally:
    """What became of one reader's inputs.

    Attributes:
        outcomes: how many by outcome; all but refused and read are faults.
        peak_bytes: the most memory above what the worker had before.
        seconds: in the reader.
        faults: number of the input and what happened.
    """

    outcomes: Counter[str] = field(default_factory=Counter)
    peak_bytes: int = 0
    seconds: float = 0.0
    faults: list[tuple[int, str]] = field(default_factory=list)

    @property
    def inputs(self) -> int:
        """How many."""
        return self.outcomes.total()


def run_campaign(
    counts: Mapping[str, int], seeds: Path, folder: Path, seed: int = 0, limit_s: float = 20.0, first: int = 0
) -> dict[str, Tally]:
    """Return the tally of every reader.

    Args:
        counts: inputs by reader.
        seeds: the folder of sound inputs.
        folder: where inputs are made, and those kept that met a fault.
        seed: of the damage.
        limit_s: an input may take.
        first: number of the first input.
    """
    tallies = {name: Tally() for name in counts}
    left = [(name, k) for name, count in counts.items() for k in range(first, first + count)]
    context = multiprocessing.get_context("spawn")
    slow: tuple[str, int] | None = None
    while left:
        here, there = context.Pipe()
        worker = context.Process(target=_work, args=(there, left, seeds, folder, seed), daemon=True)
        worker.start()
        there.close()
        try:
            here.recv()  # it has loaded its libraries
            while left:
                name, k = left[0]
                if not here.poll(limit_s):
                    worker.kill()
                    if slow != left[0]:  # a busy machine stalls too: what hangs hangs again
                        slow = left[0]
                        break
                    _note(tallies[name], k, "hung", f"no answer in {limit_s} s")
                    _keep(folder, *left.pop(0))
                    break
                outcome, said, seconds, peak = here.recv()
                tally = tallies[name]
                tally.seconds += seconds
                tally.peak_bytes = max(tally.peak_bytes, peak)
                _note(tally, k, outcome, said)
                left.pop(0)
        except EOFError:
            worker.join()
            name, k = left.pop(0)
            _note(tallies[name], k, "died", f"worker ended with {worker.exitcode}")
            _keep(folder, name, k)
        finally:
            worker.kill()
            worker.join()
            here.close()
    return tallies


def make_input(reader: Reader, number: int, seeds: Path, work: Path, seed: int) -> None:
    """Put an input into its working folder, always the same for the same numbers."""
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    reader.damage(work, seeds, np.random.default_rng([seed, zlib.crc32(reader.name.encode()), number]))


def _note(tally: Tally, number: int, outcome: str, said: str) -> None:
    tally.outcomes[outcome] += 1
    if outcome not in _FINE:
        tally.faults.append((number, f"{outcome}: {said}"))


def _keep(folder: Path, name: str, number: int) -> None:
    kept = folder / "kept" / f"{name.replace(' ', '-').replace(',', '')}-{number}"
    if (folder / "work").is_dir() and not kept.exists():
        shutil.copytree(folder / "work", kept, symlinks=True)


def _work(link: Connection, plan: list[tuple[str, int]], seeds: Path, folder: Path, seed: int) -> None:
    for name in ("torch", "transformers"):  # they count as the worker's own memory
        importlib.import_module(name)

    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    before = ""
    link.send("ready")
    for name, number in plan:
        if name != before:
            before, room = name, _bytes("VmSize") + ROOM
            resource.setrlimit(resource.RLIMIT_AS, (room, resource.RLIM_INFINITY))
        make_input(READERS[name], number, seeds, folder / "work", seed)
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        held, start = _bytes("VmRSS"), time.perf_counter()
        outcome, said = _outcome(READERS[name], folder / "work", seeds)
        if outcome not in _FINE:
            _keep(folder, name, number)
        link.send((outcome, said, time.perf_counter() - start, max(0, _bytes("VmHWM") - held)))


def _outcome(reader: Reader, work: Path, seeds: Path) -> tuple[str, str]:
    try:
        reader.read(work, seeds / reader.home)
    except ProofError as error:
        return "wrong", str(error)
    except MemoryError:
        return "memory", traceback.format_exc(limit=-4)
    except (InputError, *reader.refusals) as error:
        if isinstance(error, InputError) and "\n" in str(error):
            return "wrong", f"more than one line: {error!r}"
        return "refused", ""
    except BaseException:  # whatever it is, it is a fault
        return "raised", traceback.format_exc(limit=-5)
    return "read", ""


def _bytes(key: str) -> int:
    return int(status(key) * 2**30)  # exact: kernels count in KiB


def table(tallies: Mapping[str, Tally]) -> str:
    """Return the tallies as text."""
    heads = ("reader", "inputs", *OUTCOMES, "MiB", "s")
    rows: list[tuple[Any, ...]] = [heads]
    for name, t in tallies.items():
        rows.append((name, t.inputs, *(t.outcomes[k] for k in OUTCOMES), t.peak_bytes >> 20, f"{t.seconds:.1f}"))
    sums = [sum(row[k] for row in rows[1:]) for k in range(1, 2 + len(OUTCOMES))]
    peak = max((t.peak_bytes for t in tallies.values()), default=0) >> 20
    rows.append(("all", *sums, peak, f"{sum(t.seconds for t in tallies.values()):.1f}"))
    return "\n".join(f"{row[0]:24}" + "".join(f"{cell!s:>9}" for cell in row[1:]) for row in rows)
