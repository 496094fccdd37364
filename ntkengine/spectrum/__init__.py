"""The spectrum of a Gram matrix, each number with its error."""

from ntkengine.spectrum.density import (
    ConditionNumber,
    SpectralDensity,
    condition_from_eigenvalues,
    condition_number,
    effective_dimension,
    effective_rank,
    spectral_density,
)
from ntkengine.spectrum.lanczos import Ritz, eigsh
from ntkengine.spectrum.operators import DenseOperator, as_matrix, noise_of

__all__ = [
    "ConditionNumber",
    "DenseOperator",
    "Ritz",
    "SpectralDensity",
    "as_matrix",
    "condition_from_eigenvalues",
    "condition_number",
    "effective_dimension",
    "effective_rank",
    "eigsh",
    "noise_of",
    "spectral_density",
]
