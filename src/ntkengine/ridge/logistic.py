"""Kernel logistic regression on a precomputed Gram: cross-entropy in place of squared error.

Shapes: n examples, C classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.validation import check_is_fitted

from ntkengine.arguments import flag, number, real_array, whole
from ntkengine.errors import InputError, NotConverged
from ntkengine.ridge.checks import (
    as_columns,
    as_weights,
    check_cross,
    check_ridge,
    check_target,
    class_labels,
    kernel_of,
    with_classes,
)
from ntkengine.ridge.crossentropy import CrossEntropy
from ntkengine.spectrum.checks import SIZES
from ntkengine.spectrum.matrices import EPS

_MOVED = 1e-3  # of f, relative to 1 + |f − f0|, and of p: no prediction shows it


class KernelLogistic(ClassifierMixin, BaseEstimator):
    """f = f0 + K α minimising Σ_i w_i·(cross-entropy of example i) + (ridge/2)·‖f − f0‖²_K.

    Two classes have one column, the margin: p = 1/(1 + e^−f). More have one column each and a softmax. A K of n·C rows
    is one kernel over all (example, class) pairs, row i·C + c, as `contraction="full"` gives it; with two classes it
    may have n·2 rows too, and then gets a softmax over both.

    Args:
        ridge: > 0, in the unit of K (of trace(K)/rows when `relative`).
        class_weight: None, "balanced" (every class gets the same total weight), or a mapping from class to weight.
        relative: `ridge` is in units of trace(K)/rows.
        tol: the gradient's norm at the end, relative to the start.
        max_iter: Newton steps.

    Attributes:
        classes_: (C,) sorted.
        dual_coef_: (n,), (n, C), α.
        ridge_: in the unit of K.
        loss_: the minimum.
        n_iter_: Newton steps taken.
        n_features_in_: rows of K.
    """

    def __init__(
        self,
        ridge: float = 1.0,
        class_weight: Any = None,
        relative: bool = False,
        tol: float = 1e-8,
        max_iter: int = 200,
    ) -> None:
        self.ridge = ridge
        self.class_weight = class_weight
        self.relative = relative
        self.tol = tol
        self.max_iter = max_iter

    def __sklearn_tags__(self) -> Any:
        """Tell scikit-learn that X is a kernel."""
        tags = super().__sklearn_tags__()
        tags.input_tags.pairwise = True
        return tags

    def fit(self, X: Any, y: Any, sample_weight: Any = None, offset: Any = None) -> KernelLogistic:
        """Fit by Newton's method on the features U√Λ of K = UΛUᵀ; eigenvalues at or below rounding are left out.

        Args:
            X: K(X, X), (n, n) or (n·C, n·C); array-like or Gram-like.
            y: (n,) classes.
            sample_weight: (n,) >= 0; multiplied by the class weights.
            offset: f0(X), (n,) or (n, 1) for two classes, (n, C) else; default 0.

        Returns:
            self.

        Raises:
            InputError: bad parameter, shapes that do not fit, fewer than two classes, a ridge below the noise that X
                carries, or a K so far from positive semi-definite that at this ridge its negative eigenvalues matter.
            NotConverged: the gradient is above `tol`, or f above 0.1 % off; `.partial` is the fitted estimator.

        Cost: 9 rows³ flops once, then as `crossentropy` says.
        """
        ridge, tol = number("ridge", self.ridge, above=0), number("tol", self.tol, above=0)
        relative, max_iter = flag("relative", self.relative), whole("max_iter", self.max_iter, 1)
        check_target(y, type(self).__name__)
        labels = class_labels(y)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        n, C = len(labels), len(self.classes_)
        if C < 2:
            raise InputError(f"y: expected at least two classes, got {'one class' if C else '0 sample(s)'}")
        weights = with_classes(self.class_weight, labels, as_weights(sample_weight, n))
        if len(np.unique(codes[weights > 0])) < 2:
            raise InputError("sample_weight: expected at least two classes with weight, got one class")
        matrix = kernel_of(X)
        rows = len(matrix)
        self._full = rows != n
        if rows not in (n, n * C):
            raise InputError(f"y: expected {rows} labels, one for each row of X, got {n}")
        columns = 1 if C == 2 and not self._full else C
        f0 = _offset(offset, n, columns)
        self.ridge_ = ridge * (float(np.trace(matrix)) / rows if relative else 1.0)
        largest = float(matrix.diagonal().max())
        if largest > SIZES[1] * self.ridge_:  # their ratio would be squared
            raise InputError(f"ridge: expected at least {largest / SIZES[1]:.3g} for this kernel, got {self.ridge!r}")
        check_ridge(X, self.ridge_, float(weights.max()))
        problem = CrossEntropy(matrix, codes, weights, f0, self.ridge_)
        theta, steps = np.zeros(problem.size), 0
        scale = float(np.linalg.norm(problem.gradient(theta)))
        if scale > 0:
            # Of a ball that holds the minimum, by the loss or, since the objective curves by 1 at least, the gradient.
            radius = np.sqrt(2.0 * problem.loss(theta)) or scale
            found = minimize(
                problem.loss,
                theta,
                jac=problem.gradient,
                hessp=problem.hessian,
                method="trust-ncg",
                options={
                    "gtol": min(tol * scale, 0.1 * _MOVED / np.sqrt(problem.values[-1] / self.ridge_)),
                    "maxiter": max_iter,
                    "initial_trust_radius": radius,
                    "max_trust_radius": 2.0 * radius,
                },
            )
            steps = int(found.nit)
            theta = problem.polished(found.x) if steps < max_iter else found.x
        gradient = float(np.linalg.norm(problem.gradient(theta)))
        # At the minimum ridge·α = w·(target − p): no division by small eigenvalues.
        self.dual_coef_ = problem.pull(theta).reshape(n, columns) / self.ridge_
        if columns == 1:
            self.dual_coef_ = self.dual_coef_[:, 0]
        self.loss_, self.n_iter_, self.n_features_in_ = float(problem.loss(theta)), steps, rows
        # α is as far from the minimum as f from it differs from f from θ.
        off, negative = problem.discrepancy(theta, matrix), float(problem.values[0])
        if off > _MOVED and -negative > problem.rounding:
            raise InputError(
                f"X: expected a positive semi-definite kernel, its smallest eigenvalue {negative:.3g} matters "
                f"at the ridge {self.ridge_:.3g}"
            )
        if not off <= _MOVED or (scale != 0 and not gradient <= 10.0 * max(tol, EPS) * scale):  # NaN is no minimum
            message = (
                f"logistic regression: gradient {gradient / scale:.3g} of the start's, {tol:.3g} wanted, "
                f"f off by a relative {off:.2g}"
            )
            raise NotConverged(message, partial=self, residual=gradient / scale)
        return self

    def decision_function(self, X: Any, offset: Any = None) -> np.ndarray:
        """Return f, (t,) for two classes, else (t, C).

        Args:
            X: K(test, train), (t, n), or (t·C, n·C) when fitted so.
            offset: f0(test); give it if `fit` had one.

        Returns:
            Margins or logits.

        Raises:
            InputError: shapes that do not fit, entries not finite.
        """
        check_is_fitted(self, "dual_coef_")
        cross = check_cross(X, self.n_features_in_, len(self.classes_) if self._full else 1, type(self).__name__)
        f = cross @ (self.dual_coef_.reshape(-1) if self._full else self.dual_coef_)
        f = f.reshape(-1, len(self.classes_)) if self._full else f
        if offset is not None:
            f = f + _offset(offset, len(f), f.shape[1] if f.ndim == 2 else 1).reshape(f.shape)
        return f[:, 1] - f[:, 0] if f.ndim == 2 and len(self.classes_) == 2 else f

    def predict_proba(self, X: Any, offset: Any = None) -> np.ndarray:
        """Return (t, C) probabilities; arguments as `decision_function`."""
        f = self.decision_function(X, offset)
        return np.column_stack([expit(-f), expit(f)]) if f.ndim == 1 else softmax(f, axis=1)

    def predict(self, X: Any, offset: Any = None) -> np.ndarray:
        """Return (t,) classes; arguments as `decision_function`."""
        f = self.decision_function(X, offset)
        return self.classes_[(f > 0).astype(int) if f.ndim == 1 else f.argmax(axis=1)]


def _offset(offset: Any, n: int, columns: int) -> np.ndarray:
    if offset is None:
        return np.zeros((n, columns))
    offset = real_array("offset", offset)
    if np.shape(offset) not in {(n, columns), (n,) if columns == 1 else (n, columns)}:
        raise InputError(f"offset: expected shape ({n}, {columns}), got {np.shape(offset)}")
    return as_columns("offset", offset, n).reshape(n, columns)
