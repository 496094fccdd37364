"""Which parameters a job sketches, and what that should cost in accuracy."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from ntkengine.gram.run import Sums
from ntkengine.gram.spread import Spread
from ntkengine.inputs.batches import Samples
from ntkengine.tangents.sketch import Sketch, sketch_of
from ntkengine.tangents.structure import Structure

log = logging.getLogger(__name__)


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
