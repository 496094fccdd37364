"""K v = J(Jᵀ v) without K: one VJP and one JVP sweep over the examples, for as many rows as one likes.

Shapes: N examples, C outputs, P parameters, k vectors, n examples of a microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from scipy.stats import chi2
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ntkengine.arguments import choice, real_array, whole
from ntkengine.errors import CheckFailed, InputError, NonFinite
from ntkengine.gram.alone import Alone, flat
from ntkengine.gram.noise import LIMIT
from ntkengine.gram.task import Task, in_precision
from ntkengine.inputs.batches import Chunk
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.running import call_model, evaluation, wanting_gradients
from ntkengine.inputs.sources import Source
from ntkengine.inputs.unrounded import unrounded
from ntkengine.tangents.trial import check_repeats

_HELD = 1 << 28  # entries of the k parameter-shaped vectors held at once
_ROUNDING = {torch.float64: 1e-14, torch.float32: 1e-6}  # of a product, relative to ‖K‖·‖v‖
_CHECKED, _PROBES = 2, 8  # random vectors whose products are checked, and that the noise is measured with
_CHANCE = 1e-3  # that the noise is below ‖K̃ − K‖₂


class TangentProducts:
    """The map v -> K v of a model, for `spectrum.eigsh`, conjugate gradients and quadrature.

    Jᵀ v is one backward pass of Σ v·f over all microbatches; J u the derivative along v of that backward pass, which
    takes only operations that can be differentiated twice (attention runs in plain matrix products).

    Args:
        model: as for `compute_gram`.
        inputs: likewise.
        readout: likewise.
        params: likewise.
        contraction: "full" (N·C rows, row n·C + c), "trace" (N rows; C sweeps a product) or "sum-of-outputs".
        precision: "exact": float64, products right to rounding. "high": float32; `noise` is then measured by products
            in float64.
        seed: of the vectors that measure the noise and the rounding, and that the products are checked with.

    Attributes:
        rows: of K.
        noise: at least ‖K̃ − K‖₂ with a probability of 99.9 % over z: √(Σ‖(K̃ − K) z‖²/q) over 8 standard normal z, q
            the 0.1 % quantile of χ² with 8 degrees of freedom; some 3 ‖K̃ − K‖_F. 0 for "exact".
        rounding: relative error of a product: at least ten times the asymmetry |uᵀKv − vᵀKu| measured on two vectors,
            and what the check against each example alone leaves, where that is no rounding in its worst direction.
        block: vectors that fit into one product.
        outputs: (N, C) float64 f, of the last product.

    Raises:
        InputError: arguments that cannot be used.
        CheckFailed: f or the gradient of an example depends on others, the backward pass cannot be differentiated, or
            "high" is off by more than 1 %.
        NonFinite: a gradient is not finite.

    Cost: a product of k vectors: two forward passes, and k backward and k double-backward passes (C times that for
        "trace"); k·P numbers. At the start one forward and two backward passes of every example alone, in float64, and
        a product of 2 vectors, or of 8 in both precisions for "high".
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Source,
        *,
        readout: str | ReadoutFunction = "logits",
        params: str | Iterable[str] = "trainable",
        contraction: str = "full",
        precision: str = "exact",
        seed: int = 0,
    ) -> None:
        choice("contraction", contraction, ("full", "trace", "sum-of-outputs"))
        choice("precision", precision, ("exact", "high"))
        whole("seed", seed)
        self._task = Task.prepare(model, inputs, None, None, readout, params, contraction, "sgd", precision)
        count = sum(p.numel() for p in self._task.selected.values())
        self.block, task = int(max(1, min(8, _HELD // count))), self._task
        with evaluation(task.model):
            self._foreign = check_repeats(task.model, task.samples, task.readout, task.selected)
        with self._running() as task:
            self.outputs = self._forward(task)
        self._folded = contraction == "trace"
        self.rows = self.outputs.shape[0] * (1 if self._folded else self.outputs.shape[1])
        self.noise = 0.0
        single = self._task.dtype != torch.float64
        z = np.random.default_rng(seed).standard_normal((self.rows, _PROBES if single else _CHECKED))
        coarse = self._first(z)
        if single:
            with self._in_double():
                fine = self(z)
                resolved = self._resolved(z[:, :_CHECKED], fine)
            squares = float(np.square(coarse - fine).sum())
            relative = squares**0.5 / (float(np.linalg.norm(fine)) or 1.0)
            if not relative <= LIMIT["high"]:
                msg = f"model: float64 products differ from float32 ones by a relative {relative:.1e}: use 'exact'"
                raise CheckFailed(msg)
            # Few rows may round to nothing by chance.
            top = float((np.linalg.norm(fine, axis=0) / np.linalg.norm(z, axis=0)).max())
            least = float(np.finfo(np.float32).eps) * top
            self.noise = max(float(np.sqrt(squares / float(chi2.ppf(_CHANCE, z.shape[1])))), least)
        else:
            resolved = self._resolved(z, coarse)
        sizes = np.linalg.norm(z[:, :2], axis=0) * np.linalg.norm(coarse[:, :2], axis=0)[::-1]
        asymmetry = abs(float(z[:, 0] @ coarse[:, 1] - z[:, 1] @ coarse[:, 0])) / (float(sizes.sum()) or 1.0)
        self.rounding = max(_ROUNDING[self._task.dtype], 10.0 * asymmetry, 10.0 * resolved)

    def _first(self, z: np.ndarray) -> np.ndarray:
        """Return K z, the first product of all: what it raises is told in the user's words."""
        try:
            return self(z)
        except NotImplementedError as error:
            reason = str(error)
        except RuntimeError as error:
            reason = str(error)
            if not any(word in reason for word in ("once_differentiable", "derivative for", "double backward")):
                raise
        msg = f"model: its backward pass cannot be differentiated ({' '.join(reason.split())[:100]})"
        raise CheckFailed(msg + "; compute_gram takes it")

    @contextmanager
    def _in_double(self) -> Iterator[None]:
        """Within the block products are those of a copy of the model in float64."""
        task = self._task
        double = in_precision(task.model, "exact", task.readout, task.samples)
        self._task = task.on(double, torch.float64)
        try:
            yield
        finally:
            self._task = task

    def _resolved(self, z: np.ndarray, product: np.ndarray) -> float:
        """Refuse a model of which K z is not what its examples give alone; return what the comparison leaves.

        Args:
            z: (rows, k).
            product: (rows, >= k) K z.
        """
        with self._running() as task:
            alone = Alone(task, self._forward(task), foreign=self._foreign)
            worst = 0.0
            for start in range(0, z.shape[1], max(1, self.block // 2)):  # two parameter-shaped vectors for each z
                part = slice(start, start + max(1, self.block // 2))
                halves = ((V, self._flat(task, V)) for V in self._cotangents(z[:, part]))
                worst = max(worst, alone.compare(halves, z[:, part], product[:, start : start + z[:, part].shape[1]]))
        return worst

    def _flat(self, task: Task, V: np.ndarray) -> list[Tensor]:
        parameters = list(task.selected.values())
        return [flat(us, parameters) for us in self._pull(task, V)]

    def __call__(self, X: np.ndarray) -> np.ndarray:
        """Return K X, (rows, k) float64, of X (rows, k), k >= 1.

        Raises:
            InputError: X of another shape, or with entries that are no finite numbers.
            NonFinite: a gradient is not finite.
        """
        X = real_array("X", X).astype(np.float64)
        if not np.isfinite(X).all():
            raise InputError("X: expected finite numbers, got NaN or infinity")
        if X.ndim != 2 or X.shape[0] != self.rows or not X.shape[1]:
            raise InputError(f"X: expected shape ({self.rows}, k), got {X.shape}")
        with self._running() as task:
            products = (self._product(task, V) for V in self._cotangents(X))
            if not self._folded:
                return next(products).reshape(X.shape)
            return sum((product[:, c] for c, product in enumerate(products)), np.zeros(X.shape))

    def _cotangents(self, X: np.ndarray) -> Iterator[np.ndarray]:
        """Yield the cotangents of K X, (N, C, k): X itself, or with "trace" one for each output."""
        N, C = self.outputs.shape
        if not self._folded:
            yield X.reshape(N, C, -1)
            return
        for c in range(C):
            V = np.zeros((N, C, X.shape[1]))
            V[:, c] = X
            yield V

    def _product(self, task: Task, V: np.ndarray) -> np.ndarray:
        """Return J(Jᵀ V), (N, C, k), `block` vectors at a time."""
        parts = []
        for start in range(0, V.shape[2], self.block):
            part = V[:, :, start : start + self.block]
            parts.append(self._push(task, self._pull(task, part), part.shape))
        return np.concatenate(parts, axis=2)

    def _pull(self, task: Task, V: np.ndarray) -> list[list[Tensor]]:
        """Return Jᵀ V: for each of the k vectors one tensor a parameter."""
        parameters = list(task.selected.values())
        total = [[torch.zeros_like(p) for p in parameters] for _ in range(V.shape[2])]
        for chunk, f in self._batches(task):
            if not f.requires_grad:
                continue
            v = torch.from_numpy(V[chunk.rows]).to(f)
            for i, sums in enumerate(total):
                last = i + 1 == len(total)
                found = torch.autograd.grad(f, parameters, v[:, :, i], retain_graph=not last, allow_unused=True)
                for held, g in zip(sums, found, strict=True):
                    if g is not None:
                        held += g.to_dense() if g.is_sparse else g
        return total

    def _push(self, task: Task, U: list[list[Tensor]], shape: tuple[int, ...]) -> np.ndarray:
        """Return J U, (N, C, k): the pull-back is linear in its cotangent, and J U its derivative there along U."""
        parameters = list(task.selected.values())
        out = np.zeros(shape)
        for chunk, f in self._batches(task):
            if not f.requires_grad:
                continue
            w = torch.zeros_like(f, requires_grad=True)
            pulled = torch.autograd.grad(f, parameters, w, create_graph=True, allow_unused=True)
            used = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
            for k, u in enumerate(U):
                if not used:
                    continue
                last = k + 1 == len(U)
                directions = [u[i] for i in used]
                (found,) = torch.autograd.grad([pulled[i] for i in used], w, directions, retain_graph=not last)
                if not bool(torch.isfinite(found).all()):
                    bad = int(chunk.rows[int((~torch.isfinite(found)).any(1).nonzero()[0])])
                    raise NonFinite(f"the gradient is not finite for example {bad}, or for one multiplied with it")
                out[chunk.rows, :, k] = found.double().cpu().numpy()
        return out

    def _batches(self, task: Task) -> Iterator[tuple[Chunk, Tensor]]:
        """Yield (microbatch, its f (n, C) with a graph)."""
        for chunk in task.samples.chunks:
            inputs = task.samples.inputs(chunk, task.device, task.dtype)
            with wanting_gradients(task.selected.values()):
                yield chunk, task.readout(call_model(task.model, inputs), inputs)

    def _forward(self, task: Task) -> np.ndarray:
        rows: dict[int, np.ndarray] = {}
        with torch.no_grad():
            for chunk, f in self._batches(task):
                rows.update(zip(chunk.rows.tolist(), f.double().cpu().numpy(), strict=True))
        return np.stack([rows[i] for i in range(len(rows))])

    @contextmanager
    def _running(self) -> Iterator[Task]:
        """Within the block, have the model frozen, in eval mode, and in operations that can be differentiated twice."""
        task = self._task
        with evaluation(task.model), sdpa_kernel(SDPBackend.MATH), unrounded(task.dtype, foreign=self._foreign):
            yield task
