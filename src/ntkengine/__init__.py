"""Exact empirical neural tangent kernels of language models, and what they forecast about fine-tuning.

Names are imported when first used, so that importing the package, or asking the command line for help, is quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ntkengine.errors import CheckFailed, InputError, NonFinite, NotConverged, RankFailed, Stopped
    from ntkengine.finetune import FineTuning, fine_tune, linearize
    from ntkengine.finetune.bounds import linearity_bounds
    from ntkengine.finetune.callback import LinearityCallback
    from ntkengine.forecast import CrossFit, Forecast, cross_fit, forecast
    from ntkengine.forecast.lora import rehearse
    from ntkengine.forecast.simulate import simulate
    from ntkengine.forecast.subsets import rank_subsets
    from ntkengine.gram.engine import compute_gram
    from ntkengine.gram.features import Landmarks, tangent_features
    from ntkengine.gram.foresight import plan_gram
    from ntkengine.gram.jacobian import TangentProducts
    from ntkengine.gram.linear import TangentFactors, tangent_factors
    from ntkengine.gram.plan import Plan
    from ntkengine.gram.result import Gram
    from ntkengine.gram.transforms import Preconditioner
    from ntkengine.inputs.examples import Examples, read_examples, tokenize
    from ntkengine.inputs.heads import fit_head
    from ntkengine.inputs.language import LabelWords, SequenceLoss, TokenLoss
    from ntkengine.inputs.models import load_model
    from ntkengine.inputs.readout import encode_targets
    from ntkengine.recipe import Recipe
    from ntkengine.report.progress import show_progress
    from ntkengine.ridge import KernelLogistic, KernelRidge
    from ntkengine.spectrum import (
        condition_number,
        effective_dimension,
        effective_rank,
        eigsh,
        log_determinant,
        spectral_density,
    )
    from ntkengine.store import open_gram, verify_gram

_HOME = {
    "errors": ("CheckFailed", "InputError", "NonFinite", "NotConverged", "RankFailed", "Stopped"),
    "finetune": ("FineTuning", "fine_tune", "linearize"),
    "finetune.bounds": ("linearity_bounds",),
    "finetune.callback": ("LinearityCallback",),
    "forecast": ("CrossFit", "Forecast", "cross_fit", "forecast"),
    "forecast.lora": ("rehearse",),
    "forecast.simulate": ("simulate",),
    "forecast.subsets": ("rank_subsets",),
    "gram.engine": ("compute_gram",),
    "gram.foresight": ("plan_gram",),
    "gram.features": ("Landmarks", "tangent_features"),
    "gram.jacobian": ("TangentProducts",),
    "gram.linear": ("TangentFactors", "tangent_factors"),
    "gram.plan": ("Plan",),
    "gram.result": ("Gram",),
    "gram.transforms": ("Preconditioner",),
    "inputs.examples": ("Examples", "read_examples", "tokenize"),
    "inputs.heads": ("fit_head",),
    "inputs.language": ("LabelWords", "SequenceLoss", "TokenLoss"),
    "inputs.models": ("load_model",),
    "inputs.readout": ("encode_targets",),
    "recipe": ("Recipe",),
    "report.progress": ("show_progress",),
    "ridge": ("KernelLogistic", "KernelRidge"),
    "spectrum": (
        "condition_number",
        "effective_dimension",
        "effective_rank",
        "eigsh",
        "log_determinant",
        "spectral_density",
    ),
    "store": ("open_gram", "verify_gram"),
}
_WHERE = {name: module for module, names in _HOME.items() for name in names}

__version__ = "0.1.0"
__all__ = [
    "CheckFailed",
    "CrossFit",
    "Examples",
    "FineTuning",
    "Forecast",
    "Gram",
    "InputError",
    "KernelLogistic",
    "KernelRidge",
    "LabelWords",
    "Landmarks",
    "LinearityCallback",
    "NonFinite",
    "NotConverged",
    "Plan",
    "Preconditioner",
    "RankFailed",
    "Recipe",
    "SequenceLoss",
    "Stopped",
    "TangentFactors",
    "TangentProducts",
    "TokenLoss",
    "compute_gram",
    "condition_number",
    "cross_fit",
    "effective_dimension",
    "effective_rank",
    "eigsh",
    "encode_targets",
    "fine_tune",
    "fit_head",
    "forecast",
    "linearity_bounds",
    "linearize",
    "load_model",
    "log_determinant",
    "open_gram",
    "plan_gram",
    "rank_subsets",
    "read_examples",
    "rehearse",
    "show_progress",
    "simulate",
    "spectral_density",
    "tangent_factors",
    "tangent_features",
    "tokenize",
    "verify_gram",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        msg = f"module 'ntkengine' has no attribute {name!r}"
        raise AttributeError(msg)
    value = getattr(import_module(f"ntkengine.{_WHERE[name]}"), name)
    globals()[name] = value  # `ntkengine.forecast` is the function, not the room of the same name
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
