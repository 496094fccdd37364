"""The Gram's own error bar: ‖K̃ − K‖₂ from a part of it, with a margin."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import numpy as np
import torch

from ntkengine.errors import CheckFailed
from ntkengine.gram.again import run_again
from ntkengine.gram.frame import Frame, gram_rows
from ntkengine.gram.layout import Layout
from ntkengine.gram.run import Sums
from ntkengine.gram.spread import Spread
from ntkengine.gram.task import Task
from ntkengine.gram.transforms import SIGNS
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.structure import Structure

log = logging.getLogger(__name__)

USUAL = 1e-5  # relative error that float32 passes stay below in most models
LIMIT = {"exact": 1e-5, "high": 1e-2, "fast": 0.5}  # by precision: relative error that is no rounding any more
_MARGIN = 2.25  # over an estimate from a part of the entries


@dataclass(frozen=True)
class Noise:
    """How far K̃ is from the exact Gram.

    Attributes:
        norm: of ‖K̃ − K‖₂, 2.25 times the estimate where it is carried over from a part. Unit: gradient².
        relative: ‖E‖_F / ‖K‖_F over the recomputed entries.
        rows: samples recomputed.
        outputs: largest error of f over them.
    """

    norm: float
    relative: float
    rows: int
    outputs: float


def estimate_noise(
    task: Task,
    structure: Structure,
    samples: Samples,
    frame: Frame,
    sums: Sums | Spread,
    layout: Layout,
    room: float,
    *,
    seed: int,
    expected: float,
    limit: float,
    sketched: bool,
) -> Noise:
    """Return the noise of a finished Gram, from a random block of it recomputed in float64.

    The block's error E_m is carried over to all N rows as E_m = ε K_m + R_m, ε by least squares. The first part, errors
    that are all one way, as those of sketches and bfloat16 are, grows to |ε| λ_max(K). The rest is carried by what
    rounding does: a gradient φ_j is off by a δ_j of its own, so R = W + Wᵀ with W_ij = φ_i·δ_j, that is W = Φ G with
    independent entries of some size σ in G. In the block ‖R_m‖_F² ≈ 2σ² m tr K_m, which gives σ; then
    ‖R‖₂ ≈ σ (√(N λ_max(K)) + √tr K), Chevet's bound of ‖Φ G‖₂: what W + Wᵀ has when one eigenvalue dominates, 1/√2 of
    it when all are equal. Their root of squares is taken 2.25 times, as it depends on the rows drawn: over models,
    precisions and sketches it was then 1 to 6 times ‖E‖₂. Errors are heavy-tailed where gradients are, so half of the
    rows are those of the largest diagonal entries; an outlier among the others, whose gradient is small and far off, it
    cannot see.
    A Gram that is not symmetric has no such λ_max: there ‖E‖₂ ≈ ‖E_m‖₂ (N/m)^q, with q between ½ (independent
    errors) and 1 (one way) read off the growth from half the block to the whole, likewise 2.25 times.
    Never below ‖E_m‖₂, nor below 2⁻⁵³ ‖K‖_F, the rounding of the stored entries.

    Args:
        task: the job in float64, its model frozen and in eval mode.
        structure: from the probe, on that model. A Gram that is itself float64 is recomputed in another layout, sample
            by sample and uncut.
        samples: the job's samples.
        frame: the job's frame.
        sums: the job's finished sums.
        layout: the job's.
        room: bytes that recomputing may take.
        seed: of the draw.
        expected: relative error above which a warning is logged.
        limit: relative error that is no rounding any more.
        sketched: the Gram is a sketch: its error is measured, and only f's is judged.

    Raises:
        CheckFailed: an error above the limit.

    Cost: a float64 sweep of m samples, an eighth of the job's but between 8 and 16, twice that for a sketch; 80 N²
        flops for λ_max.
    Source: Vershynin 2018, section 8.7 (Chevet's inequality).
    """
    rng = np.random.default_rng(seed)
    w = frame.width
    rows = recomputed(samples.total, sketched=sketched)
    picked: list[tuple[int, np.ndarray]] = []
    for g, n in enumerate(samples.sizes):
        start, stop = samples.span(g)
        if start < frame.columns[1] and frame.columns[0] < stop or not frame.square:
            picked.append((g, np.sort(rng.choice(n, size=min(n, rows), replace=False))))
    if frame.symmetric and len(picked) == 1:
        g, drawn = picked[0]
        picked = [(g, _with_least(drawn, -_sizes(sums.diagonal(), samples.unsort(g))))]
    if frame.transform in SIGNS:  # a loss that is nearly zero has a gradient whose every sign rounding may turn
        picked = [(g, _with_least(r, np.abs(sums.outputs[samples.places(g)]).max(1))) for g, r in picked]
    groups = [{k: v[torch.from_numpy(r).to(v.device)] for k, v in samples.groups[g].items()} for g, r in picked]
    again, few = run_again(task, structure, groups, picked, frame, layout, room)
    exact = again.total.finish().cpu().numpy()
    f = np.concatenate([sums.outputs[samples.places(g, r)] for g, r in picked])
    true = np.concatenate([again.outputs[few.places(i)] for i in range(len(picked))])
    off = np.abs(f - true)

    def places(i: int) -> np.ndarray:
        g, r = picked[i]
        return gram_rows(samples.places(g, r[few.order[i]]), w)

    error = sums.pick(places(0), places(len(picked) - 1)) - exact
    sizes = samples.sizes[picked[0][0]], samples.sizes[picked[-1][0]]
    if frame.symmetric and len(picked) == 1:
        norm = max(_carried(error, exact, sums, places(0) - frame.rows[0] * w))
    else:
        norm = max(_extrapolate(layer, sizes, w) for layer in error)
    floor = 2.0**-53 * sums.norm()
    scale = float(np.linalg.norm(exact))
    relative = float(np.linalg.norm(error)) / scale if scale else 0.0
    noise = Noise(max(norm, floor), relative, len(picked[0][1]), float(off.max()))
    worst = max(0.0 if sketched else relative, float(off.max() / (np.abs(true).max() or 1.0)))
    _judge(noise, worst, frame, expected=float("inf") if sketched else expected, limit=limit)
    return noise


def _judge(noise: Noise, worst: float, frame: Frame, *, expected: float, limit: float) -> None:
    """Refuse, or warn of, what was found by recomputing.

    Args:
        noise: found.
        worst: relative error of the Gram or of f.
        frame: the job's.
        expected: relative error of the Gram above which a warning is logged.
        limit: relative error that is no rounding any more.

    Raises:
        CheckFailed: an error above the limit.
    """
    if worst > limit:
        if frame.transform in SIGNS:
            raise CheckFailed(
                f"recomputed in float64, in other batches, the Gram differs by a relative {worst:.0e}: rounding turns "
                "too many signs, as where a loss is nearly zero; precision='exact' settles them"
            )
        constant = ", or the sum of its outputs is a constant" if frame.contraction == "sum-of-outputs" else ""
        msg = (
            f"recomputed in float64, in other batches, the Gram or f differs by a relative {worst:.0e}, which is no "
            "rounding: the model's outputs depend on the batch (`ntkengine doctor --model`), or its float32 is "
            f"unusable (precision='exact' tells){constant}"
        )
        raise CheckFailed(msg)
    if noise.relative > expected:
        log.warning(
            "this Gram is known to a relative %.0e only: the model rounds more than most (`ntkengine doctor --model` "
            "measures it); for more, run inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH) or with "
            "precision='exact'",
            noise.relative,
        )


def recomputed(samples: int, *, sketched: bool) -> int:
    """Return how many samples of each group are recomputed."""
    return (2 if sketched else 1) * min(16, max(8, samples // 8))


def _sizes(diagonal: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Return each example's diagonal entries, (layers, rows) in sweep order, added up; place[i] is where i is."""
    return np.asarray(np.abs(diagonal).sum(0).reshape(len(place), -1).sum(1)[place])


def _with_least(drawn: np.ndarray, key: np.ndarray) -> np.ndarray:
    """Return the draw with half of it, at random, replaced by the examples of the least key.

    Args:
        drawn: sorted examples; if they are all, none is replaced.
        key: of every example.
    """
    if len(drawn) == len(key):
        return drawn
    least = np.argsort(key, kind="stable")[: len(drawn) // 2]
    rest = np.setdiff1d(drawn, least)
    kept = np.random.default_rng(len(key)).permutation(rest)[: len(drawn) - len(least)]
    return np.sort(np.r_[least, kept])


def _carried(error: np.ndarray, exact: np.ndarray, sums: Sums | Spread, rows: np.ndarray) -> list[float]:
    """Return ‖E‖₂ of every layer of a symmetric Gram from its error on a block of its rows and columns, and K there."""
    diagonal = np.abs(sums.diagonal())
    n = diagonal.shape[1]
    largest = _largest(sums, diagonal.shape) if len(rows) < n else np.zeros(len(diagonal))
    found = []
    for E, K, of_layer, top in zip(error, exact, diagonal, largest, strict=True):
        block, some, square = float(np.linalg.norm(E, 2)), float(of_layer[rows].sum()), float(np.vdot(K, K))
        if len(rows) < n and some > 0.0:
            one_way = float(np.vdot(E, K)) / square if square else 0.0
            sigma = float(np.linalg.norm(E - one_way * K)) / np.sqrt(2.0 * len(rows) * some)
            rest = sigma * float(np.sqrt(n * top) + np.sqrt(of_layer.sum()))
            block = _MARGIN * max(block, float(np.hypot(one_way * top, rest)))
        found.append(block)
    return found


def _largest(sums: Sums | Spread, shape: tuple[int, ...]) -> np.ndarray:
    """Return ‖K‖₂ of every layer by forty steps of the power method, from below."""
    x, size = np.random.default_rng(0).standard_normal(shape), np.zeros(shape[0])
    for _ in range(40):
        norm = np.linalg.norm(x, axis=1, keepdims=True)
        x = sums.times(x / np.where(norm > 0, norm, 1.0))
        size = np.linalg.norm(x, axis=1)
    return np.asarray(size)


def _extrapolate(error: np.ndarray, sizes: tuple[int, int], width: int) -> float:
    """Return ‖E‖₂ for `sizes` samples from the block E_m of a few."""
    m = error.shape[0] // width, error.shape[1] // width
    whole = float(np.linalg.norm(error, 2))
    grow = np.sqrt(sizes[0] / m[0] * sizes[1] / m[1])
    if grow <= 1 or whole == 0:
        return whole
    h = max(1, m[0] // 2) * width, max(1, m[1] // 2) * width
    quarters = [
        np.linalg.norm(b, 2)
        for rows in (error[: h[0]], error[h[0] :])
        for b in (rows[:, : h[1]], rows[:, h[1] :])
        if b.size
    ]
    half = float(np.sqrt(np.mean(np.square(quarters))))
    q = float(np.clip(np.log2(whole / half), 0.5, 1.0)) if half > 0 else 1.0
    return _MARGIN * whole * float(grow**q)
