"""Where kernels are tested, and how far they may be from float64."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Relative Frobenius error of sums of given inputs: a constant, and what tensor cores lose in a run of terms.
GRADE = {torch.float32: (1e-6, 0.0), torch.float16: (1e-6, 2e-9), torch.bfloat16: (1e-6, 2e-9)}


def close(got, truth, dtype=torch.float32, terms=0, *, most=3.0):
    """Assert a small relative Frobenius error, and that no entry is off by `most` times that of the largest."""
    got, truth = got.double().cpu(), truth.double().cpu()
    assert got.shape == truth.shape
    assert torch.isfinite(got).all()
    constant, run = GRADE[dtype]
    tolerance = constant + run * terms
    assert (got - truth).norm() <= tolerance * truth.norm()
    assert (got - truth).abs().max() <= most * tolerance * truth.abs().max()


def randn(*shape, dtype=torch.float32, seed=0):
    """Return fresh normal numbers on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
