"""The long fault campaign: what is lost must be 0."""

from __future__ import annotations

import argparse
import shlex
import tempfile
import time
from pathlib import Path

import numpy as np

from bench.record import record
from tests.campaign import Campaign
from tests.faulty import ROWS, TILE

LIMIT_S = 60.0  # nothing may hang longer


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench run faults --", description=__doc__)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", default="", help='before the interpreter, e.g. "mpirun -n 3"')
    parser.add_argument("--ranks", type=int, default=1, help="how many the launcher starts")
    given = parser.parse_args(arguments)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        common = {"launcher": shlex.split(given.launcher), "ranks": given.ranks, "seed": given.seed}
        campaign = Campaign(Path(folder), **common, limit_s=LIMIT_S)
        _inject(campaign, given.kills)
        heads = Campaign(Path(folder) / "heads", **common, flags=("--fit-head",), limit_s=LIMIT_S)
        for share in np.linspace(0.3, 0.98, max(1, given.kills // 5)):
            heads.killed(float(share), pause_s=0.02)
        campaign.tally["SIGKILL, with held-out heads"] = heads.tally["SIGKILL"]
        campaign.lost += heads.lost
        print(campaign.table())
        for text in campaign.lost:
            print(text)
        values = {
            "faults": {
                kind: dict(zip(("injected", "resumed", "refused", "lost"), row, strict=True))
                for kind, row in campaign.tally.items()
            },
            "lost": len(campaign.lost),
            "job_s": campaign.seconds,
            "limit_s": campaign.limit_s,
            "contractions": campaign.total,
            "wall_s": time.perf_counter() - start,
        }
        config = {
            "kills": given.kills,
            "seed": given.seed,
            "launcher": Path(given.launcher).name,
            "rows": ROWS,
            "tile": TILE,
        }
        record("faults", config, values)
    return 1 if campaign.lost else 0


def _inject(campaign: Campaign, kills: int) -> None:
    rng = np.random.default_rng(campaign.seed)
    # A moment in each of as many equal parts of the job's life; every fifth job is killed again after a resume.
    for i, share in enumerate((np.arange(kills) + rng.random(kills)) / kills):
        campaign.killed(float(share), pause_s=0.02, times=2 if i % 5 == 4 else 1)
    alone = campaign.ranks == 1  # a launcher's processes start anew for every fault
    for share in (0.8, 0.85, 0.9, 0.95):
        campaign.killed(share, checkpoint_s=1.0, pause_s=0.1)
    for rank in range(campaign.ranks):
        total = campaign.operations(rank)
        steps, last = (40, 24) if alone else (4, 6)
        for number in sorted({*range(1, total, max(1, total // steps)), *range(total - last, total + 1)}):
            campaign.killed_at_operation(number, rank)
    for share in (0.1, 0.3, 0.5, 0.7, 0.9) if alone else (0.3, 0.7):
        campaign.stopped(share)
        campaign.full_disk(share)
        if not campaign.full_tmpfs(share):
            print("no tmpfs can be mounted here: the full disk is a limit on the file size only")
    for k in range(8 if alone else 4):
        campaign.damaged_checkpoint(both=k % 4 == 3, truncated=k % 2 == 1)
    for _ in range(5 if alone else 3):
        campaign.flipped_tiles(20)
    if not alone:
        for share in (0.3, 0.7):
            campaign.raises(share)
            campaign.killed(share, pause_s=0.02, launcher=[])
        for harm in ("truncated", "missing", "exchanged"):
            campaign.harmed_shard(harm)
    for number in range(2, 40, 4 if alone else 12):
        campaign.killed_in_repair(number, later=number % 8 == 2)
    campaign.second_process()
    campaign.another_job()
