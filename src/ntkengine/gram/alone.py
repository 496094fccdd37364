"""Products with K against each example alone: what plain autograd gives of it, one example a pass.

Shapes: N examples, C outputs, P parameters, k vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from ntkengine.errors import CheckFailed
from ntkengine.gram.task import Task
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.running import call_model, wanting_gradients

_LIMIT = 1e-6  # relative: float64 is far below; what a model computes in float32 by means of its own is not above
_FOREIGN = 1e-2  # where kernels of other libraries run, which may round to bfloat16
_FLOAT64 = 1e-12  # relative: more is no rounding of float64


class Alone:
    """Every example of a task in a pass of its own.

    Args:
        task: running, in float64.
        outputs: (N, C) f in the task's batches.
        foreign: kernels of other libraries run, with fewer digits.

    Raises:
        CheckFailed: f of an example is another one alone.
    """

    def __init__(self, task: Task, outputs: np.ndarray, *, foreign: bool) -> None:
        self._task, self._limit = task, _FOREIGN if foreign else _LIMIT
        self._worst_direction = 1.0 if foreign else float(np.sqrt(outputs.size))
        self._samples = Samples(task.samples.groups, microbatch=1)
        self._outputs, self._seen = outputs, False

    def compare(self, halves: Iterable[tuple[np.ndarray, list[Tensor]]], z: np.ndarray, product: np.ndarray) -> float:
        """Compare K z, and Jᵀ V on the way to it, with what the examples' own gradients g_n = J_nᵀ V_n give.

        Σ_n g_n must be Jᵀ V: else gradients mix the examples of a batch. And g_nᵀ (Jᵀ V) must be V_nᵀ (K z)_n: else the
        backward pass has another derivative than J. A part of K that is missing shows in both for almost every z.

        Args:
            halves: (V, Jᵀ V) of the cotangents (N, C, k) whose products K z sums, Jᵀ V as k vectors (P,).
            z: (rows, k).
            product: (rows, k) K z.

        Returns:
            Error of a product, relative to ‖K‖·‖z‖: what the comparison leaves, in its worst direction if it is no
            rounding.

        Raises:
            CheckFailed: naming the example or the parameter.
        """
        N, k = len(self._outputs), z.shape[1]
        left, sizes, worst = np.zeros((N, k)), np.zeros((N, k)), 0.0
        for V, pulled in halves:
            found, norms, sums = self._sweep(V, pulled)
            left, sizes = left + found, sizes + norms
            worst = max(worst, self._check_sums(pulled, sums))
        right = (z * product).reshape(N, -1, k).sum(axis=1)
        off = np.abs(left - right)
        for i in range(k):
            bad = off[:, i] > self._allowed(sizes[:, i])
            if bad.any():
                at = int(np.argmax(off[:, i] - self._allowed(sizes[:, i])))
                msg = (
                    f"model: the derivative of its backward pass is not its Jacobian: zᵀKz of example {at} is "
                    f"{right[at, i]:.6g}, but its gradient gives {left[at, i]:.6g}: a custom autograd function cannot "
                    "be differentiated twice; compute_gram takes it"
                )
                raise CheckFailed(msg)
        norm = np.linalg.norm(product, axis=0)
        worst = max(worst, float((np.linalg.norm(off, axis=0) / np.where(norm > 0, norm, np.inf)).max()))
        return worst * (self._worst_direction if worst > _FLOAT64 else 1.0)

    def _sweep(self, V: np.ndarray, pulled: list[Tensor]) -> tuple[np.ndarray, np.ndarray, list[Tensor]]:
        """Return g_nᵀ (Jᵀ V) and ‖g_n‖·‖Jᵀ V‖, (N, k) each, and Σ_n g_n; compare f the first time."""
        task, parameters = self._task, list(self._task.selected.values())
        sums = [torch.zeros_like(u) for u in pulled]
        dots, sizes = np.zeros((2, *V.shape[::2]))
        f_alone = np.empty_like(self._outputs)
        for chunk in self._samples.chunks:
            inputs, row = self._samples.inputs(chunk, task.device, task.dtype), int(chunk.rows[0])
            with wanting_gradients(parameters):
                f = task.readout(call_model(task.model, inputs), inputs)
                f_alone[row] = f.detach()[0].double().cpu().numpy()
                v = torch.from_numpy(V[row : row + 1]).to(f)
                for i, (u, total) in enumerate(zip(pulled, sums, strict=True) if f.requires_grad else ()):
                    last = i + 1 == len(pulled)
                    found = torch.autograd.grad(f, parameters, v[:, :, i], retain_graph=not last, allow_unused=True)
                    g = flat(found, parameters)
                    total += g
                    dots[row, i], sizes[row, i] = torch.stack([g @ u, g.norm()]).tolist()
        if not self._seen:
            self._check_outputs(f_alone)
            self._seen = True
        return dots, sizes * np.array([float(u.norm()) for u in pulled]), sums

    def _check_outputs(self, alone: np.ndarray) -> None:
        off = np.linalg.norm(alone - self._outputs, axis=1)
        bad = ~(off <= self._allowed(np.linalg.norm(alone, axis=1)))
        if bad.any():
            msg = f"model: f of example {int(np.argmax(bad))} depends on the other examples of its batch"
            raise CheckFailed(msg)

    def _check_sums(self, pulled: list[Tensor], sums: list[Tensor]) -> float:
        """Return how far Jᵀ V in batches is from Σ_n g_n, relative to it; refuse another one."""
        worst, counts = 0.0, [p.numel() for p in self._task.selected.values()]
        for u, total in zip(pulled, sums, strict=True):
            sizes = np.array([float(part.norm()) for part in total.split(counts)])
            offs = np.array([float(part.norm()) for part in (u - total).split(counts)])
            whole = float(np.linalg.norm(sizes))
            bad = offs > self._limit * (sizes + 0.1 * whole)
            if bad.any():
                at = int(np.argmax(offs * bad))
                name, off = list(self._task.selected)[at], offs[at] / (sizes[at] or 1.0)
                msg = (
                    f"model: gradients mix the examples of a batch: that of {name} is off by a relative {off:.1e} from "
                    "the sum of each example's own; compute_gram takes it"
                )
                raise CheckFailed(msg)
            worst = max(worst, float(np.linalg.norm(offs)) / (whole or 1.0))
        return worst

    def _allowed(self, sizes: np.ndarray) -> np.ndarray:
        """Return what may differ: by each one's size, and by rounding where numbers of common size cancel."""
        return self._limit * (sizes + np.median(sizes)) + 1e-13 * sizes.max()


def flat(grads: Sequence[Tensor | None], parameters: Sequence[Tensor]) -> Tensor:
    """Return gradients as one vector (P,); None is zero."""
    parts = (p.new_zeros(()).expand(p.numel()) if g is None else g for g, p in zip(grads, parameters, strict=True))
    return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in parts])
