"""The engine against every peer, on the same work, in one run.

Each contender is a fresh process with a time limit: what fails, is too slow or cannot be installed is told in the table
and loses nobody else. Nothing is timed that is not right on the first samples. Errors are relative Frobenius norms: on
those samples against autograd in float64. Differences from the engine are over all samples: the Frobenius norm, and the
largest of an entry, |ΔK[n, m]| / √(K[n, n] K[m, m]). Memory is the peak above the loaded model. All on the CPU.

`python -m bench run peers [-- PEER… --samples N --tiny --limit SECONDS]`; `--tiny` records nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.fresh import FailedError, fresh
from bench.peers import ENGINES, PEERS, Peer
from bench.peers.environments import interpreter
from bench.peers.work import WORKS, Config, tiny
from bench.record import record

FEW = 8
REPEATS, MOST_S = 5, 30.0
_OF_ENGINES: dict[str, Config] = {
    "engine": {},
    "engine-unchecked": {"check": "no"},
    "engine-fast": {"precision": "fast"},
    "engine-fast-unchecked": {"precision": "fast", "check": "no"},
}


@dataclass
class Contest:
    """Contenders on one work.

    Attributes:
        config: of the work.
        folder: for Grams.
        limit_s: seconds a contender may take.
        found: by contender, figures and `K`, or `failure`.
    """

    config: Config
    folder: Path
    limit_s: float
    found: dict[str, dict[str, Any]] = field(default_factory=dict)

    def run(self, name: str) -> dict[str, Any]:
        """Return a contender's figures and Gram, or why there are none; nothing is run twice."""
        if name not in self.found:
            try:
                self.found[name] = self._run(name)
            except FailedError as error:
                self.found[name] = {"failure": str(error)}
        return self.found[name]

    def _run(self, name: str) -> dict[str, Any]:
        if name in ENGINES:
            peer, options = Peer(name, "", (), "engine"), _OF_ENGINES[name]
        else:
            peer = PEERS[name]
            options = dict(peer.options)
        python = interpreter(peer)
        reference = self.folder / "reference.npy"
        if not reference.exists():
            self._start("autograd", self.config, None, reference)
        target = self.folder / f"{name}.npy"
        compiles = {"compiles": peer.compiles}
        found = self._start(peer.module, self.config | options, str(reference), target, python=python, **compiles)
        K, truth = np.load(target).astype(np.float64), np.load(reference)
        part = K[: len(truth), : len(truth)]
        return found | {"K": K, "error": float(np.linalg.norm(part - truth) / np.linalg.norm(truth))}

    def _start(
        self,
        module: str,
        config: Config,
        reference: str | None,
        target: Path,
        python: Path | None = None,
        compiles: bool = False,
    ) -> dict[str, Any]:
        job = {
            "module": module,
            "config": config,
            "compiles": compiles,
            "few": FEW,
            "reference": reference,
            "target": str(target),
            "repeats": REPEATS,
            "most_s": MOST_S,
        }
        chosen = {"python": python} if python else {}
        alone = {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu"}
        return fresh("bench.peers.contender", json.dumps(job), environment=alone, limit_s=self.limit_s, **chosen)


def main(arguments: list[str]) -> int:
    """Run the peers named, by default all; print a table, record a line each; return 1 if one has no figures."""
    parser = argparse.ArgumentParser(prog="python -m bench run peers --", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="PEER", help=", ".join(PEERS))
    parser.add_argument("--tiny", action="store_true", help="tiny work, nothing recorded")
    parser.add_argument("--samples", type=int, help="N (default 64)")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a contender may take (default 600)")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.names if name not in PEERS]:
        parser.error(f"no peer {unknown[0]!r}: one of {', '.join(PEERS)}")
    if given.samples is not None and given.samples < FEW:
        parser.error(f"--samples: expected at least {FEW}, got {given.samples}")
    size = {} if given.samples is None else {"N": given.samples}
    pairs = [(name, work) for name in given.names or PEERS for work in PEERS[name].works]
    contests: dict[str, Contest] = {}
    rows, bad = [], False
    with tempfile.TemporaryDirectory() as folder:
        for name, work in pairs:
            if work not in contests:
                config = (tiny(WORKS[work]) if given.tiny else WORKS[work]) | size
                where = Path(folder) / work
                where.mkdir()
                contests[work] = Contest(config, where, given.limit)
            values = versus(contests[work], name)
            if not given.tiny:
                record("peers", {"peer": name, "work": work, **contests[work].config}, values)
            rows.append(row(name, work, values))
            print(f"{len(rows)}/{len(pairs)} {name}, {work}", file=sys.stderr, flush=True)
            bad |= "ratio" not in values
    print("\n".join([HEAD, *rows]))
    return int(bad)


def versus(contest: Contest, name: str) -> dict[str, Any]:
    """Return a line's figures: of the engine, of the peer, and how they differ; or the peer's `failure`."""
    engine, unchecked, peer = (contest.run(x) for x in ("engine", "engine-unchecked", name))
    values = {f"engine_{k}": v for k, v in engine.items() if k != "K"}
    values |= {f"engine_unchecked_{k}": v for k, v in unchecked.items() if k != "K"}
    values |= {f"peer_{k}": v for k, v in peer.items() if k != "K"}
    if any("failure" in x for x in (engine, unchecked, peer)):
        return values
    return values | {
        "ratio": peer["seconds"] / engine["seconds"],
        "ratio_unchecked": peer["seconds"] / unchecked["seconds"],
        "gib_ratio": peer["gib"] / engine["gib"],
        **differences(peer["K"], engine["K"]),
    }


def differences(K: np.ndarray, engine: np.ndarray) -> dict[str, float]:
    """Return how far a Gram is from the engine's: in the Frobenius norm, and at its worst entry."""
    scale = np.sqrt(np.outer(engine.diagonal(), engine.diagonal()))
    return {
        "relative_difference": float(np.linalg.norm(K - engine) / np.linalg.norm(engine)),
        "largest_difference": float((np.abs(K - engine) / scale).max()),
    }


HEAD = """\
| peer | how | work | time | engine | × | × unchecked | GiB | engine | × | largest difference | Frobenius | \
error of float64 | engine's |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|"""


def row(name: str, work: str, values: dict[str, Any]) -> str:
    """Return a line's row of the table."""
    cells = [name, PEERS[name].how, work]
    failed = [
        f"{who}: {values[f'{who}_failure']}"
        for who in ("peer", "engine", "engine_unchecked")
        if f"{who}_failure" in values
    ]
    if failed:
        return f"| {' | '.join([*cells, failed[0].replace('|', '/')])} |"
    cells += [f"{values[f'{who}_seconds']:.2f} s" for who in ("peer", "engine")]
    cells += [f"{values['ratio']:.1f}", f"{values['ratio_unchecked']:.1f}"]
    cells += [f"{values[f'{who}_gib']:.2f}" for who in ("peer", "engine")] + [f"{values['gib_ratio']:.1f}"]
    names = ("largest_difference", "relative_difference", "peer_error", "engine_error")
    return f"| {' | '.join([*cells, *(f'{values[name]:.1e}' for name in names)])} |"
