"""Kernel ridge regression on a precomputed Gram."""

from ntkengine.ridge.cg import Iterated, conjugate_gradients
from ntkengine.ridge.estimator import KernelRidge
from ntkengine.ridge.nystrom import LowRank, Preconditioner, nystrom, preconditioner, random_cholesky
from ntkengine.ridge.solve import CholeskySolution, RidgePath, cholesky_solve
from ntkengine.ridge.tuning import Choice, RidgeCurve, choose, ridge_curve, ridge_grid

__all__ = [
    "CholeskySolution",
    "Choice",
    "Iterated",
    "KernelRidge",
    "LowRank",
    "Preconditioner",
    "RidgeCurve",
    "RidgePath",
    "cholesky_solve",
    "choose",
    "conjugate_gradients",
    "nystrom",
    "preconditioner",
    "random_cholesky",
    "ridge_curve",
    "ridge_grid",
]
