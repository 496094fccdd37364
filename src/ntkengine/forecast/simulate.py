"""Training step by step in the tangent space: a recipe run on Gram matrices instead of on the model.

With the model linear in θ around its start, every gradient is J ᵀu for some u (N, C), so are θ_t − θ_0, momentum and
proximal gradients, and all that a step needs are products with the modules' Grams:
    f_t = f0 + Σ_l K_l A_l,   θ_t − θ_0 = ⊕_l J_lᵀ A_l.
SGD, with or without momentum, proximal terms and any batches, is exact: what comes out is the linearised model trained
on those batches. Adam divides every entry of a gradient by its own second moment, which Grams do not tell apart; here
each module has one, ‖g_l‖²/P_l, its mean over the module's entries.

Shapes: N train and M eval examples, C outputs, L modules.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any

import numpy as np
import scipy.linalg
import torch

from ntkengine.arguments import number, real_array
from ntkengine.errors import InputError, NonFinite
from ntkengine.forecast.outcome import Outcome, outcome
from ntkengine.forecast.scores import tells_classes
from ntkengine.losses import as_targets, correct, losses, slopes
from ntkengine.recipe import Recipe
from ntkengine.spectrum.checks import check_size

_ROUNDING = 1e-3  # relative: more than any precision leaves


@dataclass(frozen=True)
class Simulation:
    """Where a recipe takes the linearised model.

    Attributes:
        recipe: the recipe.
        outputs: (N, C) float64, f after it.
        eval_outputs: (M, C), or None.
        train_losses: (N,) loss of each example after it.
        eval_losses: (M,), or None.
        eval_correct: (M,) bool; None without eval examples, or where targets name no class.
        batch_losses: (steps,) loss of each step's batch before the step.
        displacement: ‖θ_t − θ_0‖.
        movement: root mean square of f_t − f_0 over the eval outputs; over the training ones without eval.
    """

    recipe: Recipe
    outputs: np.ndarray
    eval_outputs: np.ndarray | None
    train_losses: np.ndarray
    eval_losses: np.ndarray | None
    eval_correct: np.ndarray | None
    batch_losses: np.ndarray
    displacement: float
    movement: float

    @property
    def outcome(self) -> Outcome:
        """What the run is forecast to reach, with intervals."""
        held = None if self.eval_losses is None else self.eval_losses[None]
        hits = None if self.eval_correct is None else self.eval_correct[None]
        return outcome(self.train_losses[None], held, hits, self.movement)


def simulate(
    grams: Sequence[np.ndarray],
    targets: Any,
    recipe: Recipe | dict[str, Any],
    *,
    offset: np.ndarray,
    sizes: Sequence[int] | None = None,
    crosses: Sequence[np.ndarray] | None = None,
    eval_targets: Any = None,
    eval_offset: np.ndarray | None = None,
) -> Simulation:
    """Run a recipe on the Grams of a model's modules.

    Args:
        grams: L symmetric matrices, (N, N), one kernel for every output; or (N·C, N·C), row n·C + c. One for all
            parameters will do for SGD. Their sum is positive semi-definite up to 1e-3 of its norm.
        targets: as for `fine_tune`.
        recipe: the recipe, or a mapping of its fields.
        offset: (N, C), f0.
        sizes: P_l, parameters of each module; needed for Adam.
        crosses: eval × train counterparts of `grams`, in the same layout.
        eval_targets: of the eval examples.
        eval_offset: (M, C), f0 there.

    Raises:
        InputError: shapes that do not fit, matrices that are no Grams, or some of what eval examples need without the
            rest.
        NonFinite: the run diverges, in its last step too.

    Cost: N³/3 flops, 4·L·N²·C a step with Adam, 2·N²·C with SGD (times C for the larger matrices); 2·L·M·N·C at the
        end.
    """
    recipe = Recipe.of(recipe)
    f0 = _outputs("offset", offset)
    N, C = f0.shape
    every = list(grams) if isinstance(grams, Sequence) or (isinstance(grams, np.ndarray) and grams.ndim) else []
    if not every:
        raise InputError(f"grams: expected at least one matrix in a list, got {shown(grams)}")
    K = [_symmetric(_checked("grams", G, N, N, C)) for G in every]
    if recipe.optimizer == "adam":
        listed = sizes if isinstance(sizes, Sequence | np.ndarray) and np.ndim(sizes) == 1 else ()
        P = np.asarray([number("sizes", size, above=0) for size in listed])
        if len(P) != len(K):
            raise InputError(f"sizes: expected the parameters of each of {len(K)} modules for Adam, got {shown(sizes)}")
    else:
        P = np.ones(len(K))
    if len({G.shape for G in K}) > 1:
        raise InputError(f"grams: expected matrices of one shape, got {K[0].shape} and others")
    _check_positive(np.add.reduce(K))
    X, f0_eval = _held(crosses, eval_offset, eval_targets, len(K), K[0].shape[1], N, C)
    if recipe.optimizer == "sgd":
        K = [np.add.reduce(K)]
    y = as_targets("targets", targets, recipe.loss, N, C)
    run = _Run(K, P, recipe, f0)
    history = []
    for step, rows in enumerate(recipe.batches(N)):
        f = torch.from_numpy(run.outputs[rows])
        yb = y[torch.from_numpy(rows)]
        history.append(float(losses(f, yb, recipe.loss).mean()))
        if not np.isfinite(history[-1]):
            raise NonFinite(f"simulate: the loss is not finite at step {step}; a lower learning rate may help")
        u = np.zeros((N, C))
        u[rows] = slopes(f, yb, recipe.loss).numpy() / len(rows)
        run.step(u, step, recipe.rate(step, N))
    after = None
    if X and f0_eval is not None:
        after = f0_eval + run.image([np.add.reduce(X)] if len(K) == 1 else X)
    if not (np.isfinite(run.outputs).all() and (after is None or np.isfinite(after).all())):
        raise NonFinite("simulate: outputs are not finite after the last step; a lower learning rate may help")
    y_eval = None
    if eval_targets is not None and after is not None:
        y_eval = as_targets("eval_targets", eval_targets, recipe.loss, len(after), C, y)
    scored = None if after is None or y_eval is None else torch.from_numpy(after)
    start = f0 if after is None or f0_eval is None else f0_eval
    return Simulation(
        recipe=recipe,
        outputs=run.outputs,
        eval_outputs=after,
        train_losses=losses(torch.from_numpy(run.outputs), y, recipe.loss).numpy(),
        eval_losses=None if scored is None or y_eval is None else losses(scored, y_eval, recipe.loss).numpy(),
        eval_correct=None
        if scored is None or y_eval is None or not tells_classes(y, y_eval)
        else correct(scored, y_eval).numpy(),
        batch_losses=np.array(history),
        displacement=float(np.sqrt(max(0.0, sum(float((a * b).sum()) for a, b in zip(run.A, run.KA, strict=True))))),
        movement=float(np.sqrt(np.mean(((run.outputs if after is None else after) - start) ** 2))),
    )


class _Run:
    """The state of a run: A_l, so that θ − θ_0 = ⊕ J_lᵀ A_l, and the optimiser's, all in the span of the gradients."""

    def __init__(self, K: list[np.ndarray], sizes: np.ndarray, recipe: Recipe, f0: np.ndarray) -> None:
        self.K, self.sizes, self.recipe, self.f0 = K, sizes, recipe, f0
        self.outputs = f0.copy()
        self.A = [np.zeros_like(f0) for _ in K]
        self.KA = [np.zeros_like(f0) for _ in K]
        self._first = [np.zeros_like(f0) for _ in K]  # momentum
        self._second = np.zeros(len(K))

    def image(self, crosses: list[np.ndarray]) -> np.ndarray:
        """Return Σ_l X_l A_l, (M, C)."""
        return np.add.reduce([_times(X, A) for X, A in zip(crosses, self.A, strict=True)])

    def step(self, u: np.ndarray, step: int, rate: float) -> None:
        """Move by one step along −Jᵀu, the gradient of the batch's loss."""
        r = self.recipe
        proximal = r.proximal if r.pulls([u] * len(self.K), self.KA) else 0.0
        for i, K in enumerate(self.K):
            g = u + proximal * self.A[i]
            if r.optimizer == "sgd":
                self._first[i] = r.momentum * self._first[i] + g
                move = self._first[i]
            else:
                b1, b2 = r.betas
                self._first[i] = b1 * self._first[i] + (1 - b1) * g
                Kg = _times(K, u) + proximal * self.KA[i]
                square = max(0.0, float((g * Kg).sum())) / self.sizes[i]
                self._second[i] = b2 * self._second[i] + (1 - b2) * square
                scale = np.sqrt(self._second[i] / (1 - b2 ** (step + 1))) + r.eps
                move = self._first[i] / (1 - b1 ** (step + 1)) / scale
            self.A[i] -= rate * move
            self.KA[i] = _times(K, self.A[i])
        self.outputs = self.f0 + np.add.reduce(self.KA)


def _times(K: np.ndarray, U: np.ndarray) -> np.ndarray:
    """Return K U for U (N, C): each output by itself, or all of them coupled."""
    if K.shape[1] == len(U):
        return K @ U
    return (K @ U.reshape(-1)).reshape(-1, U.shape[1])


def _held(
    crosses: Sequence[Any] | None, offset: Any, targets: Any, modules: int, columns: int, N: int, C: int
) -> tuple[list[np.ndarray], np.ndarray | None]:
    """Return the cross Grams and f0 of eval examples, or neither."""
    if crosses is None or offset is None:
        if crosses is not None or offset is not None or targets is not None:
            raise InputError("eval_offset: expected together with crosses, got one or none of them")
        return [], None
    f0 = _outputs("eval_offset", offset, "M", C)
    if not isinstance(crosses, Sequence | np.ndarray) or len(crosses) != modules:
        got = len(crosses) if hasattr(crosses, "__len__") else type(crosses).__name__
        raise InputError(f"crosses: expected one for each of {modules} grams, got {got}")
    X = [_checked("crosses", G, len(f0), N, C) for G in crosses]
    if C > 1 and any(G.shape[1] != columns for G in X):
        raise InputError(f"crosses: expected {columns} columns, as in grams, got {sorted({G.shape[1] for G in X})}")
    return X, f0


def _checked(name: str, K: Any, rows: int, columns: int, outputs: int) -> np.ndarray:
    array = real_array(name, K)
    wide = (rows * outputs, columns * outputs)
    if array.shape not in ((rows, columns), wide):
        shapes = " or ".join(map(str, dict.fromkeys(((rows, columns), wide))))
        raise InputError(f"{name}: expected shape {shapes}, got {array.shape}")
    if not np.isfinite(array).all():
        raise InputError(f"{name}: expected finite numbers, got NaN or infinity")
    check_size(name, float(np.abs(array).max()))
    return array.astype(np.float64, copy=False)


def _outputs(name: str, given: Any, rows: str = "N", outputs: int | None = None) -> np.ndarray:
    found = real_array(name, given).astype(np.float64)
    if found.ndim != 2 or not found.size or outputs not in (None, found.shape[1]):
        raise InputError(f"{name}: expected ({rows}, {outputs or 'C'}) numbers, got shape {found.shape}")
    if not np.isfinite(found).all():
        raise InputError(f"{name}: expected finite numbers, got NaN or infinity")
    return found


def _symmetric(K: np.ndarray) -> np.ndarray:
    """Return K without the skew that rounding may leave; InputError for more of it."""
    skew, largest = float(np.abs(K - K.T).max()), float(np.abs(K).max())
    if skew > _ROUNDING * largest:
        raise InputError(
            f"grams: expected symmetric matrices, got max|K - K^T| = {skew:.3g} with max|K| = {largest:.3g}"
        )
    return 0.5 * (K + K.T) if skew else K


def _check_positive(K: np.ndarray) -> None:
    """Refuse a sum of kernels with an eigenvalue below −1e-3·‖K‖_F."""
    norm = float(np.linalg.norm(K))
    try:
        scipy.linalg.cholesky(K + _ROUNDING * (norm or 1.0) * np.eye(len(K)), lower=True, overwrite_a=True)
    except np.linalg.LinAlgError:
        lowest = float(np.linalg.eigvalsh(K)[0])
        raise InputError(
            f"grams: expected a positive semi-definite sum, its smallest eigenvalue is {lowest:.3g} with the norm "
            f"{norm:.3g}"
        ) from None
