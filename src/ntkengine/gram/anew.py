"""Some examples once more by plain autograd, as given, in a batch of their own: f, and what the Gram says of them.

The trials before a sweep see a dozen examples. Where only a few depend on their padding or on the examples beside them,
or have another's place in a batch, as where an expert's capacity is full, a top-k has ties, or rows are sorted, more of
them must be looked at. With random v over those drawn, vᵀ K v = ‖Σ_n v_n ∇f(x_n)‖²: one backward pass an output sees
every entry between them.

Shapes: m examples drawn, C outputs, w rows an example has in the Gram.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ntkengine.errors import CheckFailed
from ntkengine.gram.frame import Frame, gram_rows
from ntkengine.gram.layout import Layout
from ntkengine.gram.run import Sums
from ntkengine.gram.spread import Spread
from ntkengine.gram.task import Task
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.running import call_model, coarsest, wanting_gradients
from ntkengine.inputs.streaming import is_streamed
from ntkengine.inputs.unrounded import unrounded
from ntkengine.tangents.grouping import grouped
from ntkengine.tangents.rehearsal import agreement, rounding
from ntkengine.tangents.structure import Structure

_LEAST, _SHARE = 24, 16  # examples: a sixteenth of all, but no fewer
_WIDE = 0.1  # of the sweep's tokens: at most, where padding makes examples wide; but a dozen
_TOKENS = 512  # of a batch whose graph, that of the whole model, is kept
_PASSES = 4  # where whole gradients would need more, only f is compared


def compare_anew(
    task: Task,
    structure: Structure,
    samples: Samples,
    sums: Sums | Spread,
    frame: Frame,
    layout: Layout,
    seed: int,
    *,
    sketched: bool,
) -> None:
    """Compare drawn examples, padding and all, with what they were in the sweep.

    Args:
        task: as it was swept, running; in half precision, whose rounding flips what is nearly even, nothing is done.
        structure: from the probe. Where the sweep runs examples one by one, this does too.
        samples: of the sweep.
        sums: finished.
        frame: the job's.
        layout: the job's.
        seed: of the draw.
        sketched: only f is compared.

    Raises:
        CheckFailed: naming the example.

    Cost: a forward and C backward passes of the drawn examples.
    """
    if next(iter(task.selected.values())).dtype not in (torch.float32, torch.float64):
        return
    rng = np.random.default_rng(seed)
    halves = [
        _parted(samples, g, rng.choice(n, drawn_of(samples, g), replace=False)) for g, n in enumerate(samples.sizes)
    ]
    drawn = [np.concatenate(both) for both in halves]
    C = sums.outputs.shape[1]
    v = [rng.standard_normal((len(rows), C)) for rows in drawn]
    if frame.width == 1:
        v = [np.repeat(x[:, :1], C, axis=1) for x in v]
    alone_c = range(C) if frame.width == 1 else (-1,)  # an output at a time, or all of them in one
    entries = {name: p.numel() for name, p in task.selected.items()}
    parts = grouped(entries, layout.gradients // (2 * len(alone_c) * len(drawn)))
    whole = task.transform == "sgd" or task.roots is not None
    if not whole or sketched or len(parts) > _PASSES or is_streamed(task.model):
        parts = [[]]
    found = np.zeros((len(alone_c), len(drawn), len(drawn)))
    for i, names in enumerate(parts):
        pulled = []
        for g, rows in enumerate(drawn):
            given = samples.groups[g]
            few = [{k: x[torch.from_numpy(half).to(x.device)] for k, x in given.items()} for half in halves[g]]
            one = 1 if structure.one_by_one or (names and not layout.keeps) else None
            tokens = _TOKENS if names else layout.microbatch_tokens
            batches = Samples(few, microbatch=one, microbatch_tokens=tokens, trim=False)
            f, sums_of = _pulled(task, structure, batches, names, v[g], alone_c)
            if not i:
                _compare_f(task, samples, g, rows, f, sums.outputs)
            pulled.append(sums_of)
        if names:
            found += [[[_dot(a[c], b[c]) for b in pulled] for a in pulled] for c in range(len(alone_c))]
    if parts[0]:
        _compare_products(task, samples, sums, frame, drawn, v, found)


def _parted(samples: Samples, g: int, rows: np.ndarray) -> list[np.ndarray]:
    """Return rows of a group in two halves, which never share a batch: those next to each other in the sweep apart.

    Else a few examples might form the sweep's own batches again, and what they do to each other would not show.
    """
    rows = rows[np.argsort(samples.places(g, rows))]
    return [half for half in (rows[::2], rows[1::2]) if len(half)]


def drawn_of(samples: Samples, g: int) -> int:
    """Return how many examples of a group run again."""
    n, most = samples.sizes[g], samples.sizes[g]
    if samples.trim[g]:
        most = max(12, int(_WIDE * samples.lengths[g].sum() / samples.width(g)))
    return min(n, most, max(_LEAST, n // _SHARE))


def _pulled(
    task: Task, structure: Structure, batches: Samples, names: Sequence[str], v: np.ndarray, outputs: Sequence[int]
) -> tuple[Tensor, list[list[Tensor]]]:
    """Return f (m, C), and for each output, or all (−1), Σ_n v_n ∇f(x_n) of some parameters, in the examples' order."""
    wanted = [task.selected[name] for name in names]
    total = [[torch.zeros_like(p) for p in wanted] for _ in outputs]
    found = []
    parameter = next(iter(task.selected.values()))
    for chunk in batches.chunks:
        inputs = batches.inputs(chunk, parameter.device, parameter.dtype)
        with wanting_gradients(wanted), unrounded(parameter.dtype, foreign=structure.foreign):
            f = task.readout(call_model(task.model, inputs), inputs)
            found.append(f.detach())
            for c, sums in zip(outputs, total, strict=True) if wanted and f.requires_grad else ():
                V = torch.from_numpy(v[batches.span(chunk.group)[0] + chunk.rows]).to(f)
                if c >= 0:
                    V[:, :c], V[:, c + 1 :] = 0.0, 0.0
                grads = torch.autograd.grad(f, wanted, V, retain_graph=c not in (-1, outputs[-1]), allow_unused=True)
                for sum_, g in zip(sums, grads, strict=True):
                    if g is not None:
                        sum_ += g.to_dense() if g.is_sparse else g
            del f
    roots = task.roots or {}
    for sums in total:
        for name, sum_ in zip(names, sums, strict=True):
            if name in roots:
                sum_ *= roots[name]
    places = np.concatenate([batches.places(part) for part in range(len(batches.sizes))])
    return torch.cat(found)[torch.from_numpy(places)], total


def _compare_f(task: Task, samples: Samples, g: int, rows: np.ndarray, f: Tensor, outputs: np.ndarray) -> None:
    dtype, found = coarsest(task.model, f), f.double().cpu().numpy()
    off = np.linalg.norm(found - outputs[samples.places(g, rows)], axis=1)
    i = int(np.argmax(np.nan_to_num(off, nan=np.inf)))
    # On the scale of all: a margin may be the small difference of large numbers.
    if not off[i] <= (agreement(dtype) + rounding(dtype)) * np.linalg.norm(found, axis=1).max():
        what = "its padding, or on the examples beside it" if samples.trim[g] else "the examples beside it"
        raise CheckFailed(
            f"model: f of example {samples.example(g, int(rows[i]))} is off by {off[i]:.1e} when run again, as given "
            f"and in another batch: it depends on {what}; where rounding decides, as between two experts that are "
            "nearly even, precision='exact' settles it"
        )


def _compare_products(
    task: Task,
    samples: Samples,
    sums: Sums | Spread,
    frame: Frame,
    drawn: Sequence[np.ndarray],
    v: Sequence[np.ndarray],
    found: np.ndarray,
) -> None:
    """Compare vᵀ K v of every pair of groups; found: (outputs or 1, groups, groups)."""
    tolerance = agreement(coarsest(task.model, torch.empty(0, dtype=torch.float64)))
    for (a, i), (b, j) in _pairs(samples, frame, drawn):
        block = sums.pick(i, j)  # (layers, m·w, m·w)
        left, right = (v[g][:, : frame.width].reshape(-1) for g in (a, b))
        got = np.einsum("i,lij,j->l", left, block, right)
        want = found[:, a, b] if frame.layers > 1 else found[:, a, b].sum(keepdims=True)
        sizes = np.linalg.norm(left) * np.linalg.norm(right) * np.linalg.norm(block, axis=(1, 2))
        if not (np.abs(got - want) <= tolerance * sizes).all():
            worst = int(np.argmax(np.abs(got - want) / np.where(sizes > 0, sizes, 1.0)))
            raise CheckFailed(
                f"model: of {len(drawn[a])} examples in a batch of their own, vᵀKv is {want[worst]:.6g} by plain "
                f"autograd and {got[worst]:.6g} in the Gram: gradients depend on the examples beside them, or are "
                "taken for one another's (a module that sorts its rows?)"
            )


def _pairs(
    samples: Samples, frame: Frame, drawn: Sequence[np.ndarray]
) -> Iterator[tuple[tuple[int, np.ndarray], tuple[int, np.ndarray]]]:
    """Yield (group, its rows in the Gram) and (group, columns) of the blocks that the Gram has."""
    places = [(g, gram_rows(samples.places(g, rows), frame.width)) for g, rows in enumerate(drawn)]
    for g, i in places:
        for h, j in places:
            spans = samples.span(g), samples.span(h)
            if all(lo <= s[0] and s[1] <= hi for s, (lo, hi) in zip(spans, (frame.rows, frame.columns), strict=True)):
                yield (g, i), (h, j)


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    return sum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
