"""Float64 references in plain torch, written to be read: no tiling, no cleverness.

Shape suffixes: N, M samples, C outputs, T, U tokens, I, O inputs and outputs of a linear map, V vocabulary, p features.
"""

from __future__ import annotations

import torch
from torch import Tensor


def syrk(phi_Np: Tensor) -> Tensor:
    """Return Φ Φᵀ, (N, N) float64, of tangent features Φ (N, p)."""
    phi = phi_Np.to(torch.float64)
    return phi @ phi.T


def materialise(a_NTI: Tensor, d_NCTO: Tensor) -> Tensor:
    """Return per-sample gradients Σ_t d_t a_tᵀ, (N, C, O, I) float64, of a linear map."""
    return torch.einsum("ncto,nti->ncoi", d_NCTO.to(torch.float64), a_NTI.to(torch.float64))


def ghost(a_NTI: Tensor, d_NCTO: Tensor, a_MUI: Tensor, d_MCUO: Tensor) -> Tensor:
    """Return Σ_c Σ_{t,u} (a_nt·a_mu)(d_nct·d_mcu), (N, M) float64: inner products of gradients never formed."""
    a = torch.einsum("nti,mui->nmtu", a_NTI.to(torch.float64), a_MUI.to(torch.float64))
    d = torch.einsum("ncto,mcuo->nmtu", d_NCTO.to(torch.float64), d_MCUO.to(torch.float64))
    return (a * d).sum((2, 3))


def lookup(ids_NT: Tensor, d_NCTI: Tensor, vocabulary: int) -> Tensor:
    """Return the Gram of an embedding table's gradients summed over outputs, (N, N) float64.

    The gradient of row v is the sum of d over the tokens equal to v.
    """
    one_hot_NTV = torch.nn.functional.one_hot(ids_NT, vocabulary).to(torch.float64)
    rows_NCVI = torch.einsum("ntv,ncti->ncvi", one_hot_NTV, d_NCTI.to(torch.float64))
    return torch.einsum("ncvi,mcvi->nm", rows_NCVI, rows_NCVI)
