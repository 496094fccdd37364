"""Kernel ridge regression on a precomputed Gram."""

from ntkengine.ridge.estimator import KernelRidge
from ntkengine.ridge.solve import CholeskySolution, RidgePath, cholesky_solve
from ntkengine.ridge.tuning import Choice, RidgeCurve, choose, ridge_curve, ridge_grid

__all__ = [
    "CholeskySolution",
    "Choice",
    "KernelRidge",
    "RidgeCurve",
    "RidgePath",
    "cholesky_solve",
    "choose",
    "ridge_curve",
    "ridge_grid",
]
