"""Contractions of gradient factors: float64 references that every fast path is held to."""

from ntk_kernels.naive import ghost, lookup, materialise, syrk

__all__ = ["ghost", "lookup", "materialise", "syrk"]
