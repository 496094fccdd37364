"""Tangent features themselves, their squared norms, and columns of a Gram for a few landmarks.

Φ has a row for each row of the Gram, and K = Φ Φᵀ:
    "full"            (N·C, P), row n·C + c: the gradient of output c of example n
    "trace"           (N, C·P): the gradients of its C outputs side by side
    "sum-of-outputs"  (N, P)

Shapes: N examples, C outputs, P parameters, p of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from reprlib import repr as shown
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.arguments import choice, real_array
from ntkengine.errors import InputError
from ntkengine.gram.check import Check
from ntkengine.gram.engine import compute_gram
from ntkengine.gram.planning import planned
from ntkengine.gram.run import root_of
from ntkengine.gram.strategies import feature_tiles
from ntkengine.gram.task import Task, check_settings
from ntkengine.gram.transforms import Preconditioner
from ntkengine.inputs.batches import check_inputs
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.running import evaluation
from ntkengine.inputs.sources import Source, as_inputs
from ntkengine.tangents.sweep import Sweep

_CONTRACTIONS = ("trace", "full", "sum-of-outputs")


def tangent_features(
    model: nn.Module,
    inputs: Source,
    *,
    readout: str | ReadoutFunction = "logits",
    params: str | Iterable[str] = "trainable",
    contraction: str = "full",
    transform: str | Preconditioner = "sgd",
    precision: str = "high",
    memory_gib: float | None = None,
    seed: int = 0,
    check: bool = True,
) -> np.ndarray:
    """Return Φ: for few parameters, such as LoRA's, or more rows than parameters, it is smaller than the Gram.

    Args:
        model: as for `compute_gram`.
        inputs: likewise.
        readout: likewise.
        params: likewise.
        contraction: "trace", "full" or "sum-of-outputs".
        transform: "sgd" or a `Preconditioner`, whose square root is multiplied in.
        precision: "exact" or "high": the passes' dtype, and Φ's.
        memory_gib: as for `compute_gram`; Φ comes on top.
        seed: of the probe, and of the draw of the check.
        check: compare the features of two examples, alone and among the others, with plain autograd.

    Returns:
        (rows, columns) float64 or float32, rows in the order of the examples; columns ordered by the sweep, the same
        for the same model.

    Raises:
        InputError: as `compute_gram`.
        CheckFailed: a gradient that plain autograd does not reproduce.

    Cost: one sweep; rows·columns numbers.
    """
    blocks: list[np.ndarray] = []
    order, outputs = None, 0
    for tile, order in _tiles(  # noqa: B007  (the last one holds for all)
        model, inputs, readout, params, contraction, transform, precision, memory_gib, seed, check
    ):
        outputs = tile.shape[1]
        blocks.append(tile.cpu().numpy().copy())
    if order is None:
        raise InputError("params: the outputs depend on none of the selected parameters")
    whole = np.concatenate(blocks, axis=2)[order]
    n, width = len(whole), whole.shape[2]
    return whole.reshape(n * outputs, width) if contraction == "full" else whole.reshape(n, outputs * width)


class Landmarks:
    """Columns of a Gram by index, for `ridge.random_cholesky`: K against a few chosen examples.

    Args:
        model: as for `compute_gram`.
        inputs: N examples, likewise.
        options: of `compute_gram`: readout, params, contraction ("trace" or "sum-of-outputs"), transform, precision,
            memory_gib, seed, check. The diagonal is checked as `tangent_features` are, the first columns asked for as
            any Gram is; later ones are not.

    Attributes:
        diagonal: (N,) float64 of K.
    """

    def __init__(self, model: nn.Module, inputs: Source, **options: Any) -> None:
        tensors = as_inputs(inputs, model)
        self.model, self.inputs, self.options = model, dict(tensors), options
        contraction = options.get("contraction", "trace")
        choice("contraction", contraction, ("trace", "sum-of-outputs"))
        unknown = set(options) - {
            "readout", "params", "contraction", "transform", "precision", "memory_gib", "seed", "backend", "check",
        }  # fmt: skip
        if unknown:
            raise InputError(f"options: landmarks take no {', '.join(sorted(unknown))}")
        self._check = options.get("check", True)
        self.diagonal = np.zeros(check_inputs(tensors))
        precision = options.get("precision", "high")
        found = _tiles(
            model,
            tensors,
            options.get("readout", "logits"),
            options.get("params", "trainable"),
            contraction,
            options.get("transform", "sgd"),
            "high" if precision == "fast" else precision,
            options.get("memory_gib"),
            options.get("seed", 0),
            self._check,
        )
        for tile, order in found:
            self.diagonal += tile.double().square().sum(dim=(1, 2)).cpu().numpy()[order]

    def __call__(self, index: np.ndarray) -> np.ndarray:
        """Return columns `index` of K, (N, len(index)) float64."""
        index = real_array("index", index)
        if index.ndim != 1 or index.dtype.kind not in "iu" or not np.isin(index, np.arange(len(self.diagonal))).all():
            raise InputError(f"index: expected a list of examples in 0..{len(self.diagonal) - 1}, got {shown(index)}")
        rows = torch.from_numpy(index.astype(np.int64))  # torch takes uint8 for a mask
        chosen = {name: value[rows.to(value.device)] for name, value in self.inputs.items()}
        gram = compute_gram(self.model, self.inputs, chosen, **{**self.options, "check": self._check})
        self._check = False
        return np.asarray(gram.values)


def _tiles(
    model: nn.Module,
    inputs: Source,
    readout: Any,
    params: Any,
    contraction: str,
    transform: Any,
    precision: str,
    memory_gib: float | None,
    seed: int,
    check: bool,
) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Yield (features (N, C, p) in sweep order, in a buffer that is reused; positions of the examples in them)."""
    choice("contraction", contraction, _CONTRACTIONS)
    choice("precision", precision, ("exact", "high"))
    check_settings(memory_gib, seed, check=check)
    if transform != "sgd" and not isinstance(transform, Preconditioner):
        raise InputError(f"transform: expected 'sgd' or a Preconditioner, got {transform!r}")
    task = Task.prepare(model, inputs, None, None, readout, params, contraction, transform, precision)
    with ExitStack() as running:
        running.enter_context(evaluation(task.model))
        structure, plan, layout, samples, _ = planned(task, precision, False, memory_gib, seed)
        frame, order = task.frame(structure.outputs), samples.unsort(0)
        truth = Check(task, samples, frame, structure, seed, layout) if check else None
        if truth is not None:
            truth.sweep()
        sweep = Sweep(
            task.model,
            task.selected,
            structure,
            samples,
            task.readout,
            hidden=layout.hidden,
            factor_bytes={row.parameter: row.bytes for row in plan.parameters},
            limit=layout.factor_bytes,
        )
        for _, found in sweep.segments():
            while found:
                factors = found.pop()
                if factors.kind == "zero":
                    continue
                for tile, _ in feature_tiles(factors, frame, root_of(factors.name, task.roots, structure)):
                    if truth is not None:
                        truth.features(tile, samples)
                    yield tile, order
                del factors
        if truth is not None:
            truth.added_entries(task.dtype)
