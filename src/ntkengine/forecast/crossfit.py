"""Leave-one-out and GCV when the head was fitted on the same labels: kernels and starts of heads that did not see them.

A head fitted on all labels leaks twice: its outputs are too close to the targets, and the tangent features themselves
are built from weights that know the labels. With one kernel K_k and start f_k for each fold k, from a head fitted
without that fold, example i is scored in the system of its own fold, where nothing has seen its label:
    e_i = [Q_k r_k]_i / [Q_k]_ii,   Q_k = (K_k + ridge·I)⁻¹,   r_k = y − f_k,   k the fold of i.
Shapes: N examples, C outputs, F folds, R ridges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntkengine.arguments import matrix_of, meta_of, real_array
from ntkengine.errors import InputError
from ntkengine.forecast.given import differing
from ntkengine.forecast.system import Kernel, cut
from ntkengine.gram.frame import gram_rows
from ntkengine.ridge import RidgePath
from ntkengine.ridge.solve import SINGULAR

if TYPE_CHECKING:
    from torch import nn

    from ntkengine.gram.result import Gram
    from ntkengine.inputs.heads import HeadFit
    from ntkengine.inputs.sources import Source

_DEFAULTS = {"readout": "logits", "contraction": "trace"}
_FEW = 8  # examples whose entries must be the Gram's
_ALIKE, _DEVIATIONS = 1e-3, 10.0  # of entries that are the same but for rounding; of the Gram's own relative error
_UNKNOWN = 5e-3  # where that was not measured
_OTHERS = ("inputs2", "eval_inputs", "comm", "out", "targets", "eval_targets", "extras")


@dataclass(frozen=True)
class CrossFit:
    """Grams and starts from heads fitted without one fold each.

    Attributes:
        fold: (N,) int, the fold of each example.
        grams: (F, …) float64, each in the layout of the Gram's values.
        outputs: (F, N, C) float64, f0 of every example under each fold's head.
        kind: what the Grams are of, by name; empty when not known.
        start: (N, C), f0 of every example under the head fitted on all, the Gram's own; None when not known.
        rows: m examples.
        corner: of these, their part of the Gram under the head fitted on all, in its layout; None when not known.
    """

    fold: np.ndarray
    grams: np.ndarray
    outputs: np.ndarray
    kind: dict[str, Any] = field(default_factory=dict)
    start: np.ndarray | None = None
    rows: np.ndarray | None = None
    corner: np.ndarray | None = None

    def __repr__(self) -> str:
        F, N, C = np.shape(self.outputs)
        return f"CrossFit({F} folds of {N} examples, C = {C})"

    def check(self, gram: Any, N: int, C: int) -> None:
        """Refuse what does not fit a Gram of N examples and C outputs, as far as is known: shapes, kind, examples.

        Raises:
            InputError: naming it.
        """
        shapes = [np.shape(x) for x in (self.fold, self.grams, self.outputs)]
        F = shapes[1][0] if shapes[1] else 0
        if shapes[0] != (N,) or len(shapes[1]) < 3 or shapes[2] != (F, N, C):
            raise InputError(
                f"cross_fit: expected fold ({N},), grams (F, …) and outputs (F, {N}, {C}), got shapes "
                f"{', '.join(map(str, shapes))}"
            )
        fold = real_array("cross_fit.fold", self.fold)
        if fold.dtype.kind not in "iu" or not set(fold.tolist()) <= set(range(F)):
            raise InputError(f"cross_fit: expected a fold in 0..{F - 1} of each example, got {shown(fold.tolist())}")
        theirs, own = _kind(gram), getattr(gram, "outputs", None)
        if self.start is not None and own is not None and np.shape(own) == self.start.shape:
            row = differing(np.asarray(own), self.start)
            if row is not None:
                raise InputError(
                    "cross_fit: expected the Gram's examples in its order, under the head it was made with; the "
                    f"outputs of example {row} differ"
                )
        for name in self.kind.keys() & theirs.keys():
            here, there = self.kind[name], theirs[name]
            if here != there:
                odd = sorted(set(here) ^ set(there))[0] if name == "params" else ""
                told = f"one of which has {odd} and the other has not" if odd else f"got {here!r} and {there!r}"
                raise InputError(f"cross_fit: expected the {name} of the Gram, {told}")
        if self.rows is not None and self.corner is not None:
            _compare_corner(gram, N, self.rows, self.corner)

    @classmethod
    def kept_in(cls, gram: Any) -> CrossFit | None:
        """Return what a file of `ntkengine gram` keeps; None: nothing."""
        extras = getattr(gram, "extras", None) or {}
        fold, grams, outputs = (extras.get(name) for name in ("fold", "fold_grams", "fold_outputs"))
        return None if fold is None or grams is None or outputs is None else cls(fold, grams, outputs)

    def held_out(self) -> np.ndarray:
        """Return (N, C): each example's f0 from the head of its own fold."""
        return np.asarray(self.outputs)[np.asarray(self.fold), np.arange(len(self.fold))]  # a file has no such index


def cross_fit(model: nn.Module, inputs: Source, head: HeadFit, **options: Any) -> CrossFit:
    """Return the Grams and outputs of training examples under heads that were fitted without a fold of them.

    What `forecast(cross_fit=...)` takes after a head was fitted on the labels that it is to be scored on.

    Args:
        model: as `fit_head` left it; its fitted head is put back at the end.
        inputs: the examples the head was fitted on, in their order.
        head: of `fit_head` on this model.
        options: readout, params, contraction, precision and other options of `compute_gram`, the same as for the Gram;
            none that add to it or write it.

    Raises:
        InputError: another option, another number of examples, or as `compute_gram`.

    Cost: a Gram a fold, for logits and margins with one forward pass for all (`gram.heldout`); the memory of their N²
    entries.
    """
    from ntkengine.gram.engine import compute_gram
    from ntkengine.gram.heldout import held_out_grams
    from ntkengine.inputs.batches import Samples
    from ntkengine.inputs.sources import as_inputs

    if not hasattr(head, "each_fold"):
        raise InputError(f"head: expected what fit_head returned, got {type(head).__name__}")
    other = next((name for name in _OTHERS if options.get(name) is not None), None)
    if other is not None:
        raise InputError(f"{other}: expected none, as only the train Gram under each head is computed")
    tensors = as_inputs(inputs, model)
    written = getattr(dict(model.named_modules()).get(head.module), "weight", np.empty(0)).shape
    if tuple(written) != head.weights[0][0].shape:
        raise InputError(
            f"head: expected one fitted on this model, got one of {head.module}, {head.weights[0][0].shape}"
        )
    if (count := Samples([tensors]).total) != len(head.fold):
        raise InputError(f"inputs: expected the {len(head.fold)} examples the head was fitted on, got {count}")

    kind: dict[str, Any] = {}

    def under(_: int | None, **changed: Any) -> Gram:
        found = compute_gram(model, tensors, **options | changed)
        kind.update(_kind(found) | {name: options.get(name, _DEFAULTS[name]) for name in changed})
        return found

    grams, outputs = held_out_grams(model, tensors, head, under, options, options.get("memory_gib"))
    rows = np.sort(np.random.default_rng(0).permutation(count)[:_FEW])
    few = {k: v[torch.from_numpy(rows).to(v.device)] for k, v in tensors.items()}
    check = options.get("sketch") is not None  # the only way to a sketch
    corner = compute_gram(model, few, **options | {"check": check, "progress": None})
    readout = options.get("readout", "logits")
    start = head.fitted[:, 1:] - head.fitted[:, :1] if readout == "margin" else head.fitted
    same = readout in ("logits", "margin") and start.shape == outputs.shape[1:]
    start_or_none = start if same else None
    return CrossFit(head.fold, np.asarray(grams), outputs, kind, start_or_none, rows, np.asarray(corner.values))


def _compare_corner(gram: Any, N: int, rows: np.ndarray, corner: np.ndarray) -> None:
    """Refuse a Gram of another model, whose outputs may be the same: at their start adapters change none."""
    values = np.asarray(matrix_of(gram))
    if values.shape[-1] % N or corner.shape[-1] != len(rows) * (values.shape[-1] // N):
        return  # another layout, which is refused by name
    width = values.shape[-1] // N
    at = gram_rows(rows, width)
    found = values[..., at[:, None], at]
    known = meta_of(gram).get("noise_relative")
    allowed = max(_ALIKE, _DEVIATIONS * (_UNKNOWN if known is None else float(known)))
    size = np.sqrt(np.abs(np.einsum("...ii->...i", corner)))
    off = np.abs(found - corner) / np.maximum(size[..., :, None] * size[..., None, :], np.finfo(float).tiny)
    if not off.max() <= allowed:
        i, j = (int(rows[x // width]) for x in np.unravel_index(off.argmax(), off.shape)[-2:])
        raise InputError(
            f"cross_fit: expected the model that the Gram is of; their entries between examples {i} and {j} differ by "
            f"{off.max():.1e} relative: another adapter, or weights that were changed since"
        )


def _kind(gram: Any) -> dict[str, Any]:
    plan, meta = getattr(gram, "plan", None), meta_of(gram)
    if plan is None or "readout" not in meta:
        return {}
    names = sorted([*(row.parameter for row in plan.parameters), *plan.unused])
    return {
        "params": names,
        "readout": meta["readout"],
        "contraction": gram.contraction,
        "transform": gram.transform,
        "precision": meta.get("precision"),
        "sketch": (meta.get("sketch") or {}).get("features"),
    }


@dataclass(frozen=True)
class Systems:
    """The folds' decomposed systems; with no cross-fit, one system scored on all examples."""

    parts: list[tuple[Kernel, list[RidgePath], np.ndarray]]

    @classmethod
    def of(cls, gram: Any, cross_fit: CrossFit, targets: np.ndarray) -> Systems:
        """Decompose every fold's kernel, of a cross-fit that was checked; cost F eigendecompositions."""
        N, C = targets.shape
        parts = []
        for k in range(len(cross_fit.grams)):
            kernel = cut(_Like(cross_fit.grams[k], gram), N, C, None)
            parts.append((kernel, kernel.paths(targets - cross_fit.outputs[k]), np.asarray(cross_fit.fold) == k))
        return cls(parts)

    def left_out(self, ridge: float) -> np.ndarray:
        """Return (N, C) leave-one-out residuals, each example's from its own system."""
        joined = [kernel.joined([path.loo_residuals(ridge) for path in paths]) for kernel, paths, _ in self.parts]
        out = np.zeros_like(joined[0])
        for (_, _, rows), residuals in zip(self.parts, joined, strict=True):
            out[rows] = residuals[rows]
        return out

    def least_ridge(self, share: float) -> float:
        """Return the least ridge that every system can be solved with, where noise is a share of its λ_max."""
        ends = [(float(p.eigenvalues[0]), float(p.eigenvalues[-1])) for _, paths, _ in self.parts for p in paths]
        return max(max(-2.0 * low, max(share, 2.0 * SINGULAR) * high) for low, high in ends)

    def gcv(self, ridge: float) -> float:
        """Return GCV: the mean over examples and outputs of (residual of the fit / mean leverage left)²."""
        total, count = 0.0, 0
        for kernel, paths, rows in self.parts:
            left = [p.train_residual(ridge) / np.mean(ridge / (p.eigenvalues + ridge)) for p in paths]
            scored = kernel.joined(left)[rows]
            total, count = total + float((scored**2).sum()), count + scored.size
        return total / count


class _Like:
    """Another Gram of the same kind: values of one fold, everything else of the whole."""

    def __init__(self, values: np.ndarray, gram: Any) -> None:
        self.values = values
        self.contraction = getattr(gram, "contraction", None)
        self.noise = getattr(gram, "noise", None) or 0.0
