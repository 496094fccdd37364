"""A fitted head as an array that a Gram's file keeps, so that its job goes on with the very same head.

A head fitted again on another kind of processor has other last digits, and every number after it has too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ntkengine.inputs.heads import HeadFit

HEAD = "head_weights"  # among a file's further arrays
_NEAR = 1e-2  # of a head's norm: rounding of the features, as far as a small ridge lets it grow


def head_array(fit: HeadFit) -> np.ndarray:
    """Return W and b side by side, (folds + 1, C, d + 1): each fold's, fitted without it, then the model's own.

    float32 where that holds every digit, as it does of heads up to float32, else float64.
    """
    found = np.stack([np.hstack([W, b[:, None]]) for W, b in fit.weights])
    short = found.astype(np.float32)
    return short if np.array_equal(short, found) else found


def as_kept(fit: HeadFit, kept: np.ndarray) -> HeadFit:
    """Return a fit with the kept weights, if those are its own but for rounding; else the fit itself."""
    own = head_array(fit).astype(np.float64)
    kept = np.asarray(kept, dtype=np.float64)
    if kept.shape != own.shape or np.array_equal(kept, own):
        return fit
    off, size = (np.linalg.norm(x, axis=(1, 2)) for x in (kept - own, own))
    if not (off <= _NEAR * size).all():
        return fit
    return replace(fit, weights=[(x[:, :-1], x[:, -1]) for x in kept])
