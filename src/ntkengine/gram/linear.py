"""Every example's gradient of linear maps, kept as factors: what adapters of these maps see of the network.

To first order in a change ΔW of a map's weight, f(x) moves by Σ_t δ_tᵀ ΔW a_t, with the map's inputs a_t and output
gradients δ_t on the tokens of x. The factors take tokens·(d_in + C·d_out) numbers a map, whatever is adapted and
however often.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ntkengine.arguments import called
from ntkengine.errors import InputError
from ntkengine.gram.check import Check
from ntkengine.gram.planning import planned
from ntkengine.gram.task import Task, check_settings
from ntkengine.gram.truth import PASSES
from ntkengine.inputs.batches import Samples
from ntkengine.inputs.heads import warn_of_new_head
from ntkengine.inputs.parameters import module_of
from ntkengine.inputs.readout import ReadoutFunction
from ntkengine.inputs.running import evaluation
from ntkengine.inputs.sources import Source
from ntkengine.tangents.factors import Outer, ParameterFactors
from ntkengine.tangents.structure import Structure
from ntkengine.tangents.sweep import Sweep


@dataclass(frozen=True)
class LinearFactors:
    """One map's inputs and output gradients, tokens of all examples one after the other, in the examples' order.

    Tokens on which no output depends are left out.

    Attributes:
        inputs: (Z, d_in).
        gradients: (Z, C, d_out).
        starts: (examples + 1,) int64: example i has tokens [starts[i], starts[i + 1]).
    """

    inputs: Tensor
    gradients: Tensor
    starts: np.ndarray


@dataclass(frozen=True)
class TangentFactors:
    """The factors of a model's linear maps on train and eval examples, one after the other.

    Attributes:
        maps: by module name.
        outputs: (N + M, C) float64, f at the start.
        train: N.
    """

    maps: dict[str, LinearFactors]
    outputs: np.ndarray
    train: int

    @property
    def nbytes(self) -> int:
        """What they take."""
        inputs = {m.inputs.data_ptr(): m.inputs.nbytes for m in self.maps.values()}
        return sum(inputs.values()) + sum(m.gradients.nbytes for m in self.maps.values())


def tangent_factors(
    model: nn.Module,
    inputs: Source,
    eval_inputs: Source | None = None,
    *,
    params: str | Iterable[str] = "all",
    readout: str | ReadoutFunction = "logits",
    memory_gib: float | None = None,
    seed: int = 0,
    check: bool = True,
    progress: Callable[[float, float, str], None] | None = None,
) -> TangentFactors:
    """Return the factors of the linear maps among the selected parameters.

    Args:
        model: as for `compute_gram`; before any adapter is put on.
        inputs: N train examples.
        eval_inputs: M further ones.
        params: which weights; those that are no plain linear map's (norms, biases, embeddings, weights that several
            modules share) are left out.
        readout: as for `compute_gram`.
        memory_gib: bound on what is returned.
        seed: of the probe, and of the draw of the check.
        check: compare the gradients of two examples of each kind, alone and among the others, with plain autograd.
        progress: called with (flops done, flops in all, stage) after every segment: see `show_progress`.

    Raises:
        InputError: nothing selected is a linear map, an adapter's is, or the factors would not fit `memory_gib`.
        CheckFailed: a gradient that plain autograd does not reproduce.

    Cost: one sweep: two forward passes, C backward passes; tokens·(d_in + C·d_out) numbers a map.
    """
    check_settings(memory_gib, seed, check=check)
    called("progress", progress)
    task = Task.prepare(model, inputs, None, eval_inputs, readout, params, "full", "sgd", "high")
    adapter = next((n for n in task.selected if module_of(n) != (n.rpartition(".")[0] or n)), None)
    if adapter is not None:
        raise InputError(f"params: expected a model before adapters are put on, {adapter} is an adapter's")
    warn_of_new_head(model, readout)
    limit = None if memory_gib is None else memory_gib * 2**30
    maps: dict[str, LinearFactors] = {}
    held = 0
    with ExitStack() as running:
        running.enter_context(evaluation(task.model))
        structure, plan, layout, samples, _ = planned(task, "high", False, None, seed)
        alone = _alone(structure)
        truth = None
        if check:
            truth = Check(task, samples, task.frame(structure.outputs), structure, seed, layout, whole=PASSES)
            truth.sweep()
        sweep = Sweep(task.model, task.selected, structure, samples, task.readout, hidden=layout.hidden)
        order = np.concatenate([c.rows + samples.span(c.group)[0] for c in samples.chunks])
        depth = structure.stack.depth + 1
        for done, (stage, found) in enumerate(sweep.segments(), start=1):
            if progress is not None:
                progress(plan.pass_flops * min(1.0, done / depth), plan.pass_flops, stage)
            beside: list[LinearFactors] = []  # maps of one segment, some of which read the same inputs
            while found:
                factors = found.pop()
                if factors.kind != "outer" or factors.name not in alone:
                    continue
                kept, read = _sharing(_flat(factors, order), beside)
                if truth is not None:
                    truth.gradients(factors.name, partial(_gradient, kept, samples))
                held += read + kept.gradients.nbytes
                if limit is not None and held > limit:
                    raise InputError(
                        f"memory_gib: expected room for the factors of every map, {memory_gib} GiB are full after "
                        f"{len(maps)} of them; take fewer examples or maps"
                    )
                maps[module_of(factors.name)] = kept
                beside.append(kept)
                del factors
        outputs = np.empty_like(sweep.outputs)
        outputs[order] = sweep.outputs
    if not maps:
        raise InputError("params: expected weights of linear maps that the outputs depend on, got none")
    names = [module_of(name) for name in task.selected]
    return TangentFactors({n: maps[n] for n in names if n in maps}, outputs, samples.sizes[0])


def _gradient(factors: LinearFactors, samples: Samples, group: int, row: int) -> Tensor:
    """Return the gradient (C, d_out·d_in) of example `row` of a group of inputs."""
    i = samples.span(group)[0] + row
    tokens = slice(factors.starts[i], factors.starts[i + 1])
    return torch.einsum("zcr,zi->cri", factors.gradients[tokens], factors.inputs[tokens]).flatten(1)


def _alone(structure: Structure) -> set[str]:
    """Return the parameters that one module alone uses: an adapter put on it then sees all their uses."""
    owners: dict[str, set[str]] = {}
    for paths in structure.paths.values():
        for path in paths:
            owners.setdefault(path.parameter, set()).update(module for module, _, _ in path.owners)
    return {name for name, modules in owners.items() if len(modules) == 1}


def _sharing(found: LinearFactors, beside: list[LinearFactors]) -> tuple[LinearFactors, int]:
    """Return a map's factors, with the inputs of one beside it where they are the same, and what its inputs take."""
    for other in beside:
        if np.array_equal(found.starts, other.starts) and torch.equal(found.inputs, other.inputs):
            return replace(found, inputs=other.inputs), 0
    return found, found.inputs.nbytes


def _flat(factors: ParameterFactors, order: np.ndarray) -> LinearFactors:
    """Return a parameter's factors token by token; `order`: the example at each position of the sweep."""
    a, d, owner = [], [], []
    first = 0
    for size, uses in zip(factors.sizes, factors.chunks, strict=True):
        for use in uses:
            assert isinstance(use, Outer)
            gradients = use.d.transpose(1, 2)  # (n, T, C, R)
            used = gradients.flatten(2).any(2)
            a.append(use.a[used])
            d.append(gradients[used])
            where = torch.from_numpy(order[first : first + size]).to(used.device)
            owner.append(where[:, None].expand(used.shape)[used])
        first += size
    owners = torch.cat(owner)
    sort = torch.argsort(owners, stable=True)
    starts = np.searchsorted(owners[sort].cpu().numpy(), np.arange(len(order) + 1))
    return LinearFactors(torch.cat(a)[sort], torch.cat(d)[sort].contiguous(), starts)
