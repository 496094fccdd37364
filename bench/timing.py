"""One way to time: the result is judged first, then a warm-up, then repeated runs: median, 20th and 80th percentile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch


class WrongError(Exception):
    """A result is not what it should be: it is not timed."""


@dataclass(frozen=True)
class Timed:
    """What repeated runs took.

    Attributes:
        times: seconds of every run.
        result: of the last.
    """

    times: list[float]
    result: Any = None

    @property
    def seconds(self) -> float:
        """The median."""
        return statistics.median(self.times)

    def values(self, name: str = "seconds") -> dict[str, float]:
        """Return the figures of a line: the median under `name`, its percentiles, and the number of runs."""
        low, high = percentiles(self.times)
        return {name: self.seconds, f"{name}_p20": low, f"{name}_p80": high, f"{name}_runs": len(self.times)}


def percentiles(times: Sequence[float]) -> tuple[float, float]:
    """Return the 20th and the 80th percentile."""
    if len(times) == 1:
        return times[0], times[0]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], deciles[7]


def gate(error: float, bound: float, what: str) -> float:
    """Return an error that is within its bound.

    Raises:
        WrongError: it is above, or NaN.
    """
    if not error <= bound:
        msg = f"{what}: error {error:.1e}, at most {bound:.0e} expected; not timed"
        raise WrongError(msg)
    return error


def timed(
    run: Callable[[], Any],
    *,
    judge: Callable[[Any], Any] | None = None,
    warm: bool = True,
    repeats: int = 5,
    least: int = 1,
    most_s: float = float("inf"),
    device: torch.device | None = None,
) -> Timed:
    """Time a call.

    Args:
        run: what is timed.
        judge: called with the warm-up's result before anything is timed; raises where it is wrong.
        warm: run once beforehand. False: the caller has warmed up, and judged, on something smaller.
        repeats: runs at most.
        least: runs at least.
        most_s: no further run is begun after so many seconds.
        device: where it runs; on a GPU the events of its stream are read, each call begins with a cold cache.

    Raises:
        WrongError: by `judge`.
    """
    if judge is not None and not warm:
        msg = "judge: the result of a warm-up is judged, and warm is False"
        raise ValueError(msg)
    if warm:
        result = run()
        if judge is not None:
            judge(result)
        del result
    clock = _gpu if device is not None and device.type == "cuda" else _cpu
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < least or (len(times) < repeats and time.perf_counter() - began < most_s):
        result = None  # the last one's memory is not held beside the next
        seconds, result = clock(run)
        times.append(seconds)
    return Timed(times, result)


def in_turn(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Timed]:
    """Time several calls in turn, a first round to warm up: what changes meanwhile, changes for all."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    results = {}
    for k in range(repeats + 1):
        for name, run in runs.items():
            seconds, results[name] = _cpu(run)
            if k:
                times[name].append(seconds)
    return {name: Timed(times[name], results[name]) for name in runs}


@lru_cache(maxsize=1)
def _written_before(device: int) -> torch.Tensor:
    """Return what a GPU writes before each timed call: it is busy while the host queues the call, its cache is cold.

    Otherwise a call of several launches would be charged for the host's time, which a loop of calls hides.
    """
    return torch.empty(1 << 30, dtype=torch.uint8, device=f"cuda:{device}")


def _cpu(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def _gpu(run: Callable[[], Any]) -> tuple[float, Any]:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    ahead = _written_before(torch.cuda.current_device())
    torch.cuda.synchronize()
    ahead.zero_()
    begin.record()
    result = run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3, result
