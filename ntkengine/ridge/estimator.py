"""Kernel ridge regression as a scikit-learn estimator on a precomputed Gram."""

from __future__ import annotations

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, RegressorMixin
from sklearn.utils.validation import check_is_fitted

from ntkengine.errors import InputError
from ntkengine.ridge.solve import RidgePath, as_columns, cholesky_solve
from ntkengine.ridge.tuning import choose, ridge_curve, ridge_grid
from ntkengine.spectrum import as_matrix, noise_of


class KernelRidge(RegressorMixin, BaseEstimator):
    """f(·) = f0(·) + K(·, X) (K(X, X) + ridge·I)⁻¹ (y − f0(X)), for a precomputed K.

    Two layouts of m outputs. K (n, n) with y (n, m): the outputs share the kernel. K (n·m, n·m) with y (n, m), m > 1:
    one kernel over all (example, output) pairs, row i·m + c, as `contraction="full"` gives it; leave-one-out then
    leaves out all m rows of an example.

    The noise of a Gram-like K is respected by the ridge grid; in grid search scikit-learn passes bare slices, whose
    noise is taken as the rounding of their type.

    Args:
        ridge: "loo", "gcv" (the minimiser on a log grid), or a number >= 0 in the unit of K (of trace(K)/rows when
            `relative`).
        solver: "eigen", "cholesky" (one given ridge only), or "auto": eigen when the ridge is to be found, else
            Cholesky.
        relative: a numeric `ridge` is in units of trace(K)/rows.

    Attributes:
        dual_coef_: (n,) or (n, m) float64, in the layout of y.
        ridge_: the ridge used, always in the unit of K.
        path_: RidgeCurve on the grid; None when the ridge was given.
        edge_: "", "lower" or "upper": whether the chosen ridge is at the edge of the grid (see `tuning.Choice`).
        loo_residuals_: y minus the prediction with that example left out, in the layout of y. They are honest only if
            `offset` was not itself fitted on these labels.
        n_features_in_: rows of K.
    """

    def __init__(self, ridge: str | float = "loo", solver: str = "auto", relative: bool = False) -> None:
        self.ridge = ridge
        self.solver = solver
        self.relative = relative

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that X is a kernel: it slices rows and columns together."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        tags.target_tags.multi_output = True
        return tags

    def fit(self, X: Any, y: Any, offset: Any = None) -> KernelRidge:
        """Fit.

        Args:
            X: K(X, X), (n, n) or (n·m, n·m) float64, symmetric; array-like or Gram-like.
            y: (n,) or (n, m) targets.
            offset: f0(X), the shape of y; default 0.

        Returns:
            self.

        Raises:
            InputError: bad parameter, shapes that do not fit, entries not finite, K + ridge·I not positive definite.

        Cost: 9 n³ flops for "eigen" plus 2n² per grid point; n³ for "cholesky".
        """
        searched = self._check_parameters()
        matrix = as_matrix(X)
        rows = len(matrix)
        targets: np.ndarray = np.asarray(y)
        outputs = targets.shape[1] if targets.ndim == 2 else 1
        full = outputs > 1 and len(targets) * outputs == rows and len(targets) != rows
        examples = len(targets) if full else rows
        residual = as_columns("y", y, examples)
        if offset is not None:
            residual = residual - _like("offset", offset, targets.shape).reshape(residual.shape)
        block = outputs if full else 1
        flat = residual.reshape(rows, 1) if full else residual

        self.path_ = None
        self.edge_ = ""
        if self.solver == "eigen" or searched:
            path = RidgePath(matrix, flat, block)
            if searched:
                self.path_ = ridge_curve(path, ridge_grid(path.eigenvalues, noise_of(X)))
                choice = choose(self.path_, str(self.ridge))
                self.ridge_, self.edge_ = choice.ridge, choice.edge
            else:
                self.ridge_ = self._given(matrix)
            dual, loo = path.dual(self.ridge_), path.loo_residuals(self.ridge_)
        else:
            self.ridge_ = self._given(matrix)
            solution = cholesky_solve(matrix, flat, self.ridge_, block)
            dual, loo = solution.dual, solution.loo_residuals
        self.dual_coef_ = dual.reshape(targets.shape)
        self.loo_residuals_ = loo.reshape(targets.shape)
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
        cross = np.asarray(X, dtype=np.float64)
        if cross.ndim != 2 or cross.shape[1] != self.n_features_in_:
            raise InputError(f"X: expected K(test, train) of shape (t, {self.n_features_in_}), got {cross.shape}")
        if not np.isfinite(cross).all():
            raise InputError("X: expected finite entries, got NaN or infinity")
        if not self._full:
            predicted = cross @ self.dual_coef_
        else:
            outputs = self._outputs
            if len(cross) % outputs:
                raise InputError(f"X: expected a multiple of {outputs} rows (one per output), got {len(cross)}")
            predicted = (cross @ self.dual_coef_.reshape(-1)).reshape(-1, outputs)
        return predicted if offset is None else predicted + _like("offset", offset, predicted.shape)

    def _check_parameters(self) -> bool:
        """Check the constructor's values; return whether the ridge is to be found."""
        if self.solver not in ("auto", "eigen", "cholesky"):
            raise InputError(f"solver: expected 'auto', 'eigen' or 'cholesky', got {self.solver!r}")
        searched = isinstance(self.ridge, str)
        number = isinstance(self.ridge, int | float | np.number) and 0 <= float(self.ridge) < np.inf
        if not number and self.ridge not in ("loo", "gcv"):
            raise InputError(f"ridge: expected 'loo', 'gcv' or a number >= 0, got {self.ridge!r}")
        if searched and self.solver == "cholesky":
            raise InputError(f"solver: 'cholesky' needs a numeric ridge, got ridge={self.ridge!r}; use 'eigen'")
        return searched

    def _given(self, matrix: np.ndarray) -> float:
        return float(self.ridge) * (float(np.trace(matrix)) / len(matrix) if self.relative else 1.0)


def _like(name: str, values: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Return values as finite float64 of exactly that shape: broadcasting an offset would be silently wrong."""
    if np.shape(values) != shape:
        raise InputError(f"{name}: expected shape {shape}, got {np.shape(values)}")
    return as_columns(name, values, shape[0]).reshape(shape)
