"""A few numbers of each gradient, to compare those of all parameters at once where whole ones would not fit.

A gradient G (R × I) is reduced to PᵀGQ with few random columns, those of a one-block sketch (`tangents.sketch`). Two
gradients that differ by a share of their size differ in it by about that share.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from ntkengine.tangents.factors import Dense, Lookup, Use
from ntkengine.tangents.paths import matrix_shape
from ntkengine.tangents.projection import Projection
from ntkengine.tangents.sketch import Sketch
from ntkengine.tangents.structure import Structure

_SIDE = 8  # columns of P and of Q
_NUMBERS = _SIDE**2  # a parameter of no more entries is taken whole


def reductions(
    structure: Structure, selected: Mapping[str, nn.Parameter], names: Iterable[str], seed: int
) -> dict[str, Sketch]:
    """Return what is kept of the gradients of some parameters; of small ones nothing, as they are compared whole.

    Args:
        structure: from the probe, which says which way a parameter's matrix lies.
        selected: parameters by name.
        names: of those wanted.
        seed: of the random columns.
    """
    found = {}
    for name in names:
        R, I = structure.shapes.get(name) or matrix_shape(selected[name])  # noqa: E741
        if R * I > _NUMBERS:
            block = (min(_SIDE, R), min(_SIDE, I)) if min(R, I) > 1 else (min(_NUMBERS, R), min(_NUMBERS, I))
            found[name] = Sketch(name, R, I, 1, block, seed)
    return found


def reducer(sketch: Sketch, *, transposed: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that takes a gradient, shaped as its parameter, to its numbers.

    Args:
        sketch: of the parameter.
        transposed: whether the sketch is of the parameter's matrix transposed.
    """

    def of(gradient: Tensor) -> Tensor:
        use: Use
        if gradient.is_sparse and not transposed:  # of an embedding: the rows that were touched
            g = gradient.coalesce()
            use = Lookup(g.indices(), g.values()[None, None])
        else:
            matrix = (gradient.to_dense() if gradient.is_sparse else gradient).reshape(matrix_shape(gradient))
            use = Dense((matrix.T if transposed else matrix)[None, None])
        (found,) = Projection(sketch, gradient.dtype, gradient.device)([use])
        assert isinstance(found, Dense)
        return found.g.reshape(-1)

    return of
