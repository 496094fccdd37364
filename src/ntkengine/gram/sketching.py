"""Which parameters a job sketches, when it may, and what that should cost in accuracy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkengine.errors import InputError
from ntkengine.gram.run import Sums
from ntkengine.gram.spread import Spread
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.sketch import Sketch, sketch_of
from ntkengine.tangents.structure import Structure

log = logging.getLogger(__name__)


def refuse_sketch(sketch: Any, transform: str, check: bool) -> None:
    """Refuse a sketch that cannot be.

    Args:
        sketch: the argument as given; None: no sketch.
        transform: the inner product's name.
        check: the argument as given.

    Raises:
        InputError: not a whole number above 0, a transform that is not "sgd", or no check.
    """
    if sketch is None:
        return
    if not isinstance(sketch, int) or isinstance(sketch, bool) or sketch < 1:
        msg = f"sketch: expected a whole number of features, at least 1, got {sketch!r}"
        raise InputError(msg)
    if transform != "sgd":
        msg = (
            f"sketch: expected transform 'sgd', got {transform!r}, which needs the gradient's own entries: a sketch "
            "has only random mixtures of them"
        )
        raise InputError(msg)
    if not check:
        msg = "sketch: expected check=True, got False: without the check the error of a sketch is not measured"
        raise InputError(msg)


def choose_sketches(structure: Structure, samples: Samples, features: int | None, seed: int) -> dict[str, Sketch]:
    """Return the sketches by parameter, the same for every layout of a job.

    Args:
        structure: from the probe.
        samples: the job's samples.
        features: k; None: everything is exact.
        seed: of the job.
    """
    if features is None:
        return {}
    found = {}
    for name, shape in structure.shapes.items():
        kind, tokens = structure.factor_kind(name), structure.tokens_of(name, samples.mean_tokens)
        sketch = sketch_of(name, shape, kind, tokens, structure.outputs, features, seed)
        if sketch is not None:
            found[name] = sketch
    if found:
        log.warning(
            "sketch=%d: this Gram is approximate: of %d of %d parameters it keeps random projections, and gram.noise "
            "says how far it is off",
            features,
            len(found),
            len(structure.shapes),
        )
    return found


def predicted_error(sketches: Mapping[str, Sketch], sums: Sums | Spread) -> float | None:
    """Return a bound on ‖E‖_F / ‖K‖_F, root mean square over seeds; None without a square of rows against themselves.

    Parameters have independent projections, so their variances add up: to Σ_l κ_l K_l[n, n] K_l[m, m] for entry (n, m)
    and to Σ_l κ_l (tr K_l)² for the square, at most, with κ_l = `Sketch.variance`.

    Args:
        sketches: of the job.
        sums: its finished sums.
    """
    if not sums.frame.square:
        return None
    norm = sums.norm(square=True)
    variance = sum(sketch.variance * sums.traces.get(name, 0.0) ** 2 for name, sketch in sketches.items())
    return float(np.sqrt(variance)) / norm if norm else 0.0


def described(
    sketch: int, sketches: Mapping[str, Sketch], seed: int, sums: Sums | Spread, error: float
) -> dict[str, Any]:
    """Return what a Gram says of its sketch, as plain JSON types.

    Args:
        sketch: k.
        sketches: of the job.
        seed: of the job.
        sums: its finished sums.
        error: ‖E‖_F / ‖K‖_F over the recomputed entries.
    """
    found = {"features": sketch, "seed": seed, "parameters": len(sketches), "relative_error": error}
    return found | {"predicted": predicted_error(sketches, sums)}
