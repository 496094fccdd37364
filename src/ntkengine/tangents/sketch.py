"""What a sketch keeps of a gradient, and how far its inner products are from the exact ones.

The gradient G (R × I) of a parameter gives way to m diagonal blocks of a two-sided random projection,
    H_b = √m P_bᵀ G Q_b,  b = 1 … m,  P = [P_1 … P_m] (R × m·r),  Q = [Q_1 … Q_m] (I × m·i),
k = m·r·i numbers. P and Q are independent; their columns are random orthonormal ones times √(R/(m·r)) and √(I/(m·i)),
so that E Σ_b ⟨H_b, H'_b⟩ = ⟨G, G'⟩. With G = Σ_t d_t a_tᵀ both factors are projected before the outer product.

Variance. Of P alone, E[(P_b P_bᵀ)_rs (P_b' P_b'ᵀ)_r's'] = α δ_rs δ_r's' + β (δ_rr' δ_ss' + δ_rs' δ_sr'), with one pair
(α, β) for b = b' and one for b ≠ b', which traces and P_bᵀP_b' = 0 fix; likewise for Q. The product of both has nine
terms, each at most ‖G‖²‖G'‖²: `Sketch.coefficients`. In short, with c columns on a side,
    variance ≲ [2(1 − c/R)/c + 2(1 − c/I)/c + 4/k] ‖G‖²‖G'‖² for gradients of one direction, 1/k for unrelated ones.
One block of √k columns a side has the same k, but c = √k: gradients that share a direction, as those of one model do,
would be off by k^(-1/4). Blocks let c grow with k.
Source: moments, Collins and Śniady 2006 (arXiv math-ph/0402073); Kronecker projections and their weakness at low rank,
Jin, Kolda and Ward 2021 (arXiv 1909.04801), Ahle et al. 2020 (arXiv 1909.01410).
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

COLUMNS = 8  # a side is projected to at most k / COLUMNS columns
FOLDED = 8192  # a longer side is first added up, with random signs, into this many entries
_LONGEST = 2048  # columns of a side whose other side is short


@dataclass(frozen=True)
class Sketch:
    """How one parameter is sketched.

    Attributes:
        name: the parameter.
        rows: R.
        columns: I.
        blocks: m.
        block: (r, i).
        seed: of the job; with the name it fixes P and Q.
        lookup: rows are looked up: tokens are matched as they are, and only columns are projected, to i.
    """

    name: str
    rows: int
    columns: int
    blocks: int
    block: tuple[int, int]
    seed: int
    lookup: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """The sketched gradient as a matrix: blocks below each other, (m·r, i)."""
        return self.blocks * self.block[0], self.block[1]

    @property
    def features(self) -> int:
        """Numbers kept of a gradient; of a lookup, for each token."""
        return self.block[1] if self.lookup else self.blocks * self.block[0] * self.block[1]

    @property
    def projected(self) -> tuple[int, int]:
        """Columns of P and of Q."""
        return self.blocks * self.block[0], self.blocks * self.block[1]

    @property
    def folded(self) -> tuple[int, int]:
        """Entries of a row and of a column once long sides are folded; a vector is folded into its k and no further."""
        if self.lookup:
            return self.rows, min(self.columns, FOLDED)
        return _folded(self.rows, self.columns, self.features)

    @property
    def label(self) -> str:
        """What a plan calls it: blocks and their size."""
        if self.lookup:
            return f"sketched to {self.block[1]} columns"
        size = f"{self.block[0]}×{self.block[1]}"
        return f"sketched {size}" if self.blocks == 1 else f"sketched {self.blocks}·{size}"

    @property
    def entropy(self) -> int:
        """The random numbers' seed: of the job's seed and the parameter's name, the same in every process."""
        digest = hashlib.sha256(f"{self.seed}:{self.name}".encode()).digest()
        return int.from_bytes(digest[:8], "little") >> 1

    def flops(self, tokens: int, outputs: int) -> float:
        """Return the projection's floating-point operations for one sample.

        Args:
            tokens: of its factors; 0 for an explicit gradient.
            outputs: C.
        """
        c_R, c_I = self.projected
        if self.lookup:
            return 2.0 * tokens * outputs * self.columns * c_I
        if not tokens:
            return 2.0 * outputs * self.rows * (self.columns * c_I + self.features)
        return 2.0 * tokens * (self.columns * c_I + outputs * (self.rows * c_R + self.features))

    def bytes(self, entry: int) -> int:
        """Return what P and Q take.

        Args:
            entry: bytes of one of their entries.
        """
        sides = zip(self.folded, (0 if self.lookup else self.projected[0], self.projected[1]), strict=True)
        return entry * sum(folded * columns for folded, columns in sides if columns < folded or self.blocks > 1)

    def coefficients(self) -> np.ndarray:
        """Return (3, 3): E⟨H, H'⟩² = Σ_pq coefficient_pq · term_pq, before any folding.

        With W = GᵀG' and V = GG'ᵀ the terms are
            ⟨G, G'⟩²  ‖W‖²        tr W²
            ‖V‖²      ‖G‖²‖G'‖²   ‖V‖²
            tr V²     ‖W‖²        ⟨G, G'⟩².
        """
        m, (r, i) = self.blocks, self.block
        same_P, other_P = _moments(1, 1, 1) if self.lookup else _moments(self.folded[0], m, r)
        same_Q, other_Q = _moments(self.folded[1], m, i)
        return m**3 * np.outer(same_P, same_Q) + m**3 * (m - 1) * np.outer(other_P, other_Q)

    @property
    def variance(self) -> float:
        """Bound on the variance of ⟨H, H'⟩ / (‖G‖‖G'‖), near where all gradients are one of rank 1."""
        found = self.coefficients()
        both = max(0.0, float(found[0, 0] + found[2, 2]) - 1.0)
        found[0, 0] = found[2, 2] = 0.0
        bound = both + float(found.clip(0).sum())
        for side, folded in zip((self.rows, self.columns), self.folded, strict=True):
            if folded < side:
                bound = (1.0 + bound) * (1.0 + 2.0 / folded) - 1.0
        return bound


def sketch_of(
    name: str, shape: tuple[int, int], kind: str, tokens: int, outputs: int, features: int, seed: int
) -> Sketch | None:
    """Return how a parameter is sketched; None when it is exact: small, or cheaper from its few tokens.

    Args:
        name: the parameter.
        shape: (R, I).
        kind: what its uses are: "outer", "lookup", "dense" or "mixed".
        tokens: of its factors, on average; 0 for a dense kind.
        outputs: C.
        features: k.
        seed: of the job.
    """
    R, I = shape  # noqa: E741
    if kind == "lookup":
        kept = _most(features)
        return Sketch(name, R, I, 1, (R, kept), seed, lookup=True) if kept < I else None
    size = R * I
    if size <= features or kind == "outer" and tokens**2 * (I + outputs * R) <= features * outputs:
        return None
    if min(R, I) == 1:
        return Sketch(name, R, I, 1, (features, 1) if I == 1 else (1, features), seed)
    return Sketch(name, R, I, *_best(*_folded(R, I, features), features), seed)


def _folded(R: int, I: int, features: int) -> tuple[int, int]:  # noqa: E741
    if min(R, I) == 1:
        return min(R, features), min(I, features)
    return min(R, FOLDED), min(I, FOLDED)


def _most(features: int) -> int:
    """Return the most columns of a side: a fixed share of k, so that the error falls as 1/√k; √k when k is small."""
    return max(features // COLUMNS, math.isqrt(features), 1)


@lru_cache(maxsize=4096)
def _best(R: int, I: int, features: int) -> tuple[int, tuple[int, int]]:  # noqa: E741
    """Return (m, (r, i)) of at most `features` numbers with the least bound on the variance."""
    most = _most(features)
    c_R, c_I = (min(a, max(most, min(_LONGEST, features // min(b, most)))) for a, b in ((R, I), (I, R)))
    best, least = (1, (1, 1)), float("inf")
    for m in range(1, min(c_R, c_I, features) + 1):
        limit = features // m
        for r in {min(c_R // m, limit), max(1, min(c_R // m, limit // max(1, c_I // m)))}:
            size = r, min(c_I // m, limit // r)
            found = Sketch("", R, I, m, size, 0).variance
            if found < least:
                best, least = (m, size), found
    return best


def _moments(length: int, blocks: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Return (α, β, β) of one block and of two, for blocks that are the identity over m in the mean."""
    if length == 1:
        return np.array([1.0, 0.0, 0.0]), np.zeros(3)
    scale = (length / (blocks * columns)) ** 2 / (length * (length + 2.0) * (length - 1.0))
    same, other = scale * columns * (length - columns), -scale * columns**2
    mean = scale * columns * (length + 2.0) * (length - 1.0)  # of P_b P_bᵀ, times its scale
    alpha = mean - same * (length + 1.0)
    return np.array([alpha, same, same]), np.array([-other * (length + 1.0), other, other])
