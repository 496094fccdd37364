"""Gradients by plain autograd, one sample and output at a time: slow, and right if anything is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ntkengine.inputs.batches import Samples
from ntkengine.inputs.embeddings import sparse_tables
from ntkengine.inputs.heap import HEAP
from ntkengine.inputs.readout import Readout
from ntkengine.inputs.running import call_model, wanting_gradients
from ntkengine.inputs.unrounded import unrounded

Found = dict[tuple[int, int], Tensor]


def plain_gradients(
    model: nn.Module,
    selected: Mapping[str, nn.Parameter],
    names: Sequence[str],
    samples: Sequence[Mapping[str, Tensor]],
    readout: Readout,
    outputs: int,
    *,
    foreign: bool,
    reduced: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
) -> dict[str, Found]:
    """Return gradients by parameter and (sample, output); of an embedding the rows touched.

    Args:
        model: frozen, in eval mode.
        selected: parameters by name.
        names: of those wanted.
        samples: inputs of one example each.
        readout: f.
        outputs: C.
        foreign: as `Structure` has it.
        reduced: further parameters, of whose gradients only what these functions make of them is returned; no two of
            the gradients are there at once.
    """
    parameter = next(iter(model.parameters()))
    reduced = reduced or {}
    wanted = [selected[name] for name in (*names, *reduced)]
    found: dict[str, Found] = {name: {} for name in (*names, *reduced)}
    for i, one in enumerate(samples):
        HEAP.relieve()
        given = Samples([dict(one)], microbatch=1, trim=False)
        batch = given.inputs(given.chunks[0], parameter.device, parameter.dtype)
        with (
            wanting_gradients(wanted),
            sparse_tables(model),
            unrounded(parameter.dtype, foreign=foreign),
            _caught(selected, reduced) as caught,
        ):
            f = readout(call_model(model, batch), batch)
            for c in range(outputs):
                caught.clear()
                for name, g in zip(names, _grad(f[0, c], wanted)[: len(names)], strict=True):
                    if g is not None:
                        found[name][i, c] = g.detach().coalesce() if g.is_sparse else g.detach()
                for name, g in caught.items():
                    found[name][i, c] = g
            del f
    return found


@contextmanager
def _caught(
    selected: Mapping[str, nn.Parameter], reduced: Mapping[str, Callable[[Tensor], Tensor]]
) -> Iterator[dict[str, Tensor]]:
    """Within the block, gradients of some parameters are reduced as soon as they are made, and go no further."""
    caught: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[Tensor], Tensor | None]:
        def reduce(gradient: Tensor) -> Tensor | None:
            caught[name] = reduced[name](gradient.detach())
            if gradient.is_sparse:  # little, and must stay so
                return None
            return torch.zeros((), dtype=gradient.dtype, device=gradient.device).expand(gradient.shape)

        return reduce

    handles = [selected[name].register_hook(hook(name)) for name in reduced]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
        for p in (selected[name] for name in reduced):
            if not p._backward_hooks:
                p._backward_hooks = None  # as it was


def stacked(found: Found, m: int, C: int, p: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return gradients by (sample, output), shaped as p, as (m, C, entries); if all are sparse, the rows any has."""
    if len(found) == m * C and not any(g.is_sparse for g in found.values()):
        return torch.stack(list(found.values())).reshape(m, C, p.numel()), None
    rows = None
    if found and all(g.is_sparse for g in found.values()):
        rows = torch.cat([g.indices()[0] for g in found.values()]).unique()
    G = torch.zeros(m, C, *(p.shape if rows is None else (len(rows), *p.shape[1:])), dtype=p.dtype, device=p.device)
    for (i, c), g in found.items():
        if rows is None:
            G[i, c] = g.to_dense() if g.is_sparse else g
        else:
            G[i, c, torch.searchsorted(rows, g.indices()[0])] = g.values()
    return G.reshape(m, C, G[0, 0].numel()), rows


def _grad(f: Tensor, wanted: list[nn.Parameter]) -> Sequence[Tensor | None]:
    if not f.requires_grad:
        return [None] * len(wanted)
    return torch.autograd.grad(f, wanted, retain_graph=True, allow_unused=True)
