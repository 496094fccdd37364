"""Kernel ridge regression on a precomputed Gram."""

from ntkengine.ridge.cg import Iterated, conjugate_gradients
from ntkengine.ridge.direct import CholeskySolution, cholesky_solve
from ntkengine.ridge.estimator import KernelRidge
from ntkengine.ridge.logistic import KernelLogistic
from ntkengine.ridge.nystrom import Preconditioner, nystrom, preconditioner
from ntkengine.ridge.outofcore import cholesky_on_disk
from ntkengine.ridge.pivoted import LowRank, random_cholesky
from ntkengine.ridge.solve import RidgePath
from ntkengine.ridge.tuning import Choice, RidgeCurve, choose, draw_folds, ridge_curve, ridge_grid

__all__ = [
    "CholeskySolution",
    "Choice",
    "Iterated",
    "KernelLogistic",
    "KernelRidge",
    "LowRank",
    "Preconditioner",
    "RidgeCurve",
    "RidgePath",
    "cholesky_solve",
    "cholesky_on_disk",
    "choose",
    "conjugate_gradients",
    "draw_folds",
    "nystrom",
    "preconditioner",
    "random_cholesky",
    "ridge_curve",
    "ridge_grid",
]
