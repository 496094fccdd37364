"""One sweep over all ranks: each sweeps its own samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ntkengine.cluster.comm import Team
from ntkengine.cluster.shards import deal
from ntkengine.gram.checkpoint import Checkpoints
from ntkengine.gram.frame import Frame
from ntkengine.gram.layout import Layout
from ntkengine.gram.spread import Spread
from ntkengine.gram.spreading import Spreading
from ntkengine.gram.task import Task
from ntkengine.gram.teamwork import SpreadKeeper
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import Sweep


def sum_spread(
    team: Team,
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    layout: Layout,
    *,
    factor_bytes: Mapping[str, float],
    pass_flops: float,
    keep_bytes: int,
    tick: Callable[[float, str], None],
    sketches: Mapping[str, Sketch],
    group: Callable[[str], str] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Spread:
    """Return the Gram of all samples in the frame, spread over the ranks.

    Args:
        team: the ranks; each makes this call.
        task: the job, its model frozen and in eval mode.
        structure: from the probe, on that model.
        samples: the job's.
        frame: the wanted Gram.
        layout: of each rank.
        factor_bytes: by parameter, of all samples.
        pass_flops: of the passes over all samples, for `tick`.
        keep_bytes: activations a rank may keep rather than recompute.
        tick: called with this rank's flops done and the segment's name.
        sketches: by parameter, what is kept of its gradient.
        group: parameter name -> the part it is kept under; None keeps no parts.
        checkpoints: of the job, on every rank; None: it has no file.

    Raises:
        Exception: on every rank, what failed on any.
    """
    shards = deal(samples, team.size)
    local = shards[team.rank].part(samples, **structure.microbatches(layout.microbatch_tokens))
    sizes = {name: size / team.size for name, size in factor_bytes.items()}
    spreading = Spreading(
        team,
        structure,
        samples,
        local,
        shards,
        frame,
        task.device,
        window=layout.window,
        bundle_bytes=layout.bundle_bytes,
        factor_bytes=sizes,
        group=group,
        tick=tick,
        roots=task.roots,
        kernels=task.kernels,
        keeper=None if checkpoints is None else SpreadKeeper(checkpoints, team, frame),
    )
    if spreading.keeper is not None:
        with team.together():
            spreading.keeper.start(spreading)
    steps = len(local.chunks) * structure.swept
    mine = pass_flops * shards[team.rank].tokens / sum(shard.tokens for shard in shards)
    sweep = Sweep(
        task.model,
        task.selected,
        structure,
        local,
        task.readout,
        lambda: tick(mine / steps, "passes"),
        keep_bytes,
        layout.hidden,
        sizes,
        layout.factor_bytes,
        sketches,
        spreading.skip,
    )
    return spreading.run(sweep)
