"""Kernel ridge regression as a scikit-learn estimator on a precomputed Gram."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from scipy.sparse.linalg import LinearOperator
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from ntkengine.arguments import choice, flag, matrix_of, meta_of, number, real_array
from ntkengine.errors import InputError
from ntkengine.ridge.cg import conjugate_gradients
from ntkengine.ridge.checks import (
    as_columns,
    as_weights,
    check_cross,
    check_ridge,
    check_target,
    fold_labels,
    kernel_of,
    with_classes,
)
from ntkengine.ridge.direct import cholesky_solve
from ntkengine.ridge.nystrom import preconditioner
from ntkengine.ridge.outofcore import cholesky_on_disk
from ntkengine.ridge.solve import RidgePath, restored
from ntkengine.ridge.tuning import RidgeCurve, choose, draw_folds, ridge_curve, ridge_grid
from ntkengine.spectrum import DenseOperator, noise_of
from ntkengine.spectrum.panels import IN_MEMORY, PanelOperator, is_on_disk, operator_of
from ntkengine.targets import refuse_bits

log = logging.getLogger(__name__)

SOLVERS = ("auto", "eigen", "cholesky", "out-of-core", "cg")


class KernelRidge(RegressorMixin, BaseEstimator):
    """f(·) = f0(·) + K(·, X) (K(X, X) + ridge·W⁻¹)⁻¹ (y − f0(X)), for a precomputed K; W the sample weights, or 1.

    Two layouts of m outputs. K (n, n) with y (n, m): the outputs share the kernel. K (n·m, n·m) with y (n, m), m > 1:
    one kernel over all (example, output) pairs, row i·m + c, as `contraction="full"` gives it; leave-one-out then
    leaves out all m rows of an example.

    The noise of a Gram-like K is respected by the ridge grid; in grid search scikit-learn passes bare slices, whose
    noise is taken as the rounding of their type.

    Args:
        ridge: "loo", "gcv", "cv" (the minimiser on a log grid), or a number >= 0 in the unit of K (of trace(K)/rows
            when `relative`).
        solver: "eigen"; "cholesky", "out-of-core" (Cholesky with its factor on disk), "cg" (preconditioned conjugate
            gradients: leaves no example out) for one given ridge; or "auto": eigen when the ridge is to be found, else
            Cholesky, on disk for a Gram on disk of more than 12,000 rows, and cg for a LinearOperator.
        relative: a numeric `ridge` is in units of trace(K)/rows.
        class_weight: None, or "balanced": `sample_weight` is scaled so that every class, a distinct row of y, has the
            same total and the sum stays.
        cv: for ridge="cv": a number of random folds, or (n,) the fold of each example.
        tol: for "cg": relative residual.

    Attributes:
        dual_coef_: (n,) or (n, m) float64, in the layout of y.
        ridge_: the ridge used, always in the unit of K.
        path_: RidgeCurve on the grid; None when the ridge was given. With weights, its errors are means of w·e² over
            the examples that have one.
        edge_: "", "lower" or "upper": whether the chosen ridge is at the edge of the grid (see `tuning.Choice`).
        loo_residuals_: y minus the prediction with that example left out, in the layout of y; None with "cg". They are
            honest only if `offset` was not itself fitted on these labels.
        n_features_in_: rows of K.
    """

    def __init__(
        self,
        ridge: str | float = "loo",
        solver: str = "auto",
        relative: bool = False,
        class_weight: str | None = None,
        cv: Any = 5,
        tol: float = 1e-8,
    ) -> None:
        self.ridge = ridge
        self.solver = solver
        self.relative = relative
        self.class_weight = class_weight
        self.cv = cv
        self.tol = tol

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that X is a kernel: it slices rows and columns together."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> KernelRidge:
        """Fit.

        Args:
            X: K(X, X), (n, n) or (n·m, n·m) float64, symmetric; array-like, Gram-like, or for "cg" a LinearOperator or
                a model's `TangentProducts`.
            y: (n,) or (n, m) targets; of a margin's Gram ±1, not 0 and 1.
            sample_weight: (n,) >= 0: Σ_i w_i (y_i − f_i)² + ridge·‖f − f0‖²_K is minimised. Not with "out-of-core".
            offset: f0(X), the shape of y; default 0.

        Returns:
            self.

        Raises:
            InputError: bad parameter, shapes that do not fit, entries not finite, K + ridge·W⁻¹ not positive definite,
                a ridge below the noise that X carries.
            NotConverged: "cg" stopped short.

        Cost: 9 n³ flops for "eigen" plus 2n² per grid point; n³ for "cholesky"; see `outofcore` and `cg`.
        """
        if isinstance(X, LinearOperator) or (callable(X) and hasattr(X, "rows")):  # the latter products of a model
            X = operator_of(X)
        searched, solver = self._check_parameters(X)
        check_target(y, type(self).__name__)
        stored: Any = X if solver == "cg" or (solver == "out-of-core" and is_on_disk(X)) else kernel_of(X)
        rows = np.shape(matrix_of(stored))[0]
        targets = real_array("y", y)
        outputs = targets.shape[1] if targets.ndim == 2 else 1
        full = outputs > 1 and len(targets) * outputs == rows and len(targets) != rows
        own = getattr(X, "outputs", None)
        if getattr(X, "contraction", None) == "full" and own is not None and np.size(own) > len(own) and not full:
            raise InputError(f"y: expected {np.shape(own)}, an example of this 'full' Gram a row, got {targets.shape}")
        block, examples = (outputs, len(targets)) if full else (1, rows)
        residual = as_columns("y", y, examples)
        meta = meta_of(X)
        if meta.get("readout") == "margin":
            refuse_bits("y", residual)
        if offset is not None:
            if isinstance(self.ridge, str) and meta.get("head_fitted"):
                log.warning(
                    "offset: the head behind it was fitted on most of these examples, so leave-one-out errors, and the "
                    "ridge they choose, are too small; forecast(..., cross_fit=cross_fit(...)) has honest ones"
                )
            residual = residual - _like("offset", offset, targets.shape).reshape(residual.shape)
        flat = residual.reshape(rows, 1) if full else residual
        root = np.repeat(np.sqrt(self._weights(sample_weight, targets)), block)[:, None]

        self.path_: RidgeCurve | None = None
        self.edge_ = ""
        if solver in ("out-of-core", "cg"):
            dual, loo = self._stream(stored, flat, block, root, solver)
        else:
            dual, loo = self._decompose(X, stored, flat, block, root, solver, searched)
        check_ridge(X, self.ridge_, float(root.max()) ** 2)
        self.dual_coef_ = dual.reshape(targets.shape)
        self.loo_residuals_ = None if loo is None else loo.reshape(targets.shape)
        self.n_features_in_ = rows
        self._full, self._outputs = full, outputs
        return self

    def predict(self, X: Any, offset: Any = None) -> np.ndarray:
        """Predict.

        Args:
            X: K(test, train), (t, n), or (t·m, n·m) when fitted on the full layout.
            offset: f0(test), (t,) or (t, m) as y; default 0. Give it if `fit` had one.

        Returns:
            (t,) or (t, m) float64.

        Raises:
            InputError: shapes that do not fit, entries not finite.
            sklearn.exceptions.NotFittedError: before `fit`.
        """
        check_is_fitted(self, "dual_coef_")
        cross = check_cross(X, self.n_features_in_, self._outputs if self._full else 1, type(self).__name__)
        if self._full:
            predicted = (cross @ self.dual_coef_.reshape(-1)).reshape(-1, self._outputs)
        else:
            predicted = cross @ self.dual_coef_
        return predicted if offset is None else predicted + _like("offset", offset, predicted.shape)

    def _decompose(
        self, X: Any, matrix: np.ndarray, flat: np.ndarray, block: int, root: np.ndarray, solver: str, searched: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return dual coefficients and leave-one-out residuals, from the problem with rows and columns times √w."""
        seen = root[:, 0] > 0.0  # an example without weight takes no part
        w = root[seen]
        part = matrix if seen.all() else matrix[np.ix_(seen, seen)]
        scaled = part if (w == 1.0).all() else w * part * w.T
        mean = float(np.trace(matrix)) / len(matrix)
        if solver == "eigen":
            path = RidgePath(scaled, w * flat[seen], block)
            if searched:
                folds = None if self.ridge != "cv" else self._folds(len(matrix), block)[seen]
                grid = ridge_grid(path.eigenvalues, noise_of(X) * float(w.max()) ** 2)
                self.path_ = ridge_curve(path, grid, folds)
                choice = choose(self.path_, str(self.ridge))
                self.ridge_, self.edge_ = choice.ridge, choice.edge
            else:
                self.ridge_ = self._given(mean)
            solved = restored(part, w, flat[seen], path.dual(self.ridge_), self.ridge_)
            left = path.left_out(self.ridge_, solved)
        else:
            self.ridge_ = self._given(mean)
            solution = cholesky_solve(scaled, w * flat[seen], self.ridge_, block)
            solved, left = solution.dual, solution.loo_residuals
        dual, loo = np.zeros_like(flat), np.empty_like(flat)
        dual[seen], loo[seen] = w * solved, left / w
        loo[~seen] = flat[~seen] - matrix[~seen] @ dual
        return dual, loo

    def _stream(
        self, stored: Any, flat: np.ndarray, block: int, root: np.ndarray, solver: str
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Return dual coefficients, and leave-one-out residuals or None, without K in memory."""
        if not (root == 1.0).all():
            raise InputError(f"sample_weight: solver {solver!r} takes none; use 'cholesky' or 'eigen'")
        operator = operator_of(stored)  # has looked at every entry
        if isinstance(operator, DenseOperator):
            mean = float(operator.matrix.diagonal().mean())
        elif isinstance(operator, PanelOperator):
            mean = float(operator.diagonal.mean())
        elif self.relative:
            raise InputError("relative: expected a matrix, whose trace can be taken, got a LinearOperator")
        else:
            mean = 1.0
        self.ridge_ = self._given(mean)
        if solver == "out-of-core":
            del operator
            solution = cholesky_on_disk(stored, flat, self.ridge_, block)
            return solution.dual, solution.loo_residuals
        rank = min(len(flat) // 2, 1000)
        P = preconditioner(operator, self.ridge_, rank) if rank and self.ridge_ > 0 else None
        found = conjugate_gradients(operator, flat, self.ridge_, preconditioner=P, tol=self.tol)
        return found.solution, None

    def _check_parameters(self, X: Any) -> tuple[bool, str]:
        """Check the constructor's values; return whether the ridge is to be found, and the solver."""
        choice("solver", self.solver, SOLVERS)
        searched = isinstance(self.ridge, str) and self.ridge in ("loo", "gcv", "cv")
        if not searched:
            number("ridge", self.ridge, 0, what="'loo', 'gcv', 'cv' or a number")
        if self.class_weight is not None:
            choice("class_weight", self.class_weight, ("balanced",))
        flag("relative", self.relative)
        number("tol", self.tol, above=0, below=1)
        if searched and self.solver not in ("auto", "eigen"):
            raise InputError(f"solver: {self.solver!r} needs a numeric ridge, got ridge={self.ridge!r}; use 'eigen'")
        operator = isinstance(X, LinearOperator)
        if operator and (searched or self.solver not in ("auto", "cg")):
            raise InputError("X: a LinearOperator is solved with by 'cg', for a numeric ridge; give a matrix")
        if self.solver != "auto":
            return searched, self.solver
        if operator:
            return searched, "cg"
        large = not searched and is_on_disk(X) and np.shape(matrix_of(X))[0] > IN_MEMORY
        return searched, "eigen" if searched else "out-of-core" if large else "cholesky"

    def _weights(self, sample_weight: Any, targets: np.ndarray) -> np.ndarray:
        weights = as_weights(sample_weight, len(targets))
        if self.class_weight is None:
            return weights
        _, classes = np.unique(targets, axis=0, return_inverse=True)
        return with_classes("balanced", classes.reshape(-1), weights)

    def _folds(self, rows: int, block: int) -> np.ndarray:
        if isinstance(self.cv, str) or not hasattr(self.cv, "__len__"):
            return draw_folds(self.cv, rows, block)
        folds = fold_labels("cv", self.cv, rows // block)
        if len(np.unique(folds)) < 2:
            raise InputError(f"cv: expected a number of folds or the folds of {rows // block} examples")
        return np.repeat(folds, block)

    def _given(self, mean: float) -> float:
        return float(self.ridge) * (float(mean) if self.relative else 1.0)


def _like(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return values as finite float64 of exactly that shape: broadcasting an offset would be silently wrong."""
    found = real_array(name, values)
    if found.shape != shape:
        raise InputError(f"{name}: expected shape {shape}, got {found.shape}")
    return as_columns(name, found, shape[0]).reshape(shape)
