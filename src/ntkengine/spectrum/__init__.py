"""The spectrum of a Gram matrix, each number with its error."""

from ntkengine.spectrum.certify import Ritz
from ntkengine.spectrum.condition import ConditionNumber, condition_from_eigenvalues, condition_number
from ntkengine.spectrum.density import SpectralDensity, spectral_density
from ntkengine.spectrum.functions import Estimate, effective_dimension, effective_rank, log_determinant
from ntkengine.spectrum.implicit import DeviceOperator, FactorOperator, ImplicitOperator
from ntkengine.spectrum.lanczos import eigsh
from ntkengine.spectrum.matrices import as_matrix, noise_of
from ntkengine.spectrum.operators import DenseOperator, GramOperator
from ntkengine.spectrum.panels import PanelOperator
from ntkengine.spectrum.sharded import ShardedOperator

__all__ = [
    "ConditionNumber",
    "DenseOperator",
    "DeviceOperator",
    "Estimate",
    "FactorOperator",
    "GramOperator",
    "ImplicitOperator",
    "PanelOperator",
    "Ritz",
    "ShardedOperator",
    "SpectralDensity",
    "as_matrix",
    "condition_from_eigenvalues",
    "condition_number",
    "effective_dimension",
    "effective_rank",
    "eigsh",
    "log_determinant",
    "noise_of",
    "spectral_density",
]
