"""Gradients by plain autograd, one sample and output at a time: slow, and right if anything is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ntkengine.inputs.batches import Samples
from ntkengine.inputs.embeddings import sparse_tables
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
    """
    parameter = next(iter(model.parameters()))
    wanted = [selected[name] for name in names]
    found: dict[str, Found] = {name: {} for name in names}
    for i, one in enumerate(samples):
        given = Samples([dict(one)], microbatch=1, trim=False)
        batch = given.inputs(given.chunks[0], parameter.device, parameter.dtype)
        with wanting_gradients(wanted), sparse_tables(model), unrounded(parameter.dtype, foreign=foreign):
            f = readout(call_model(model, batch), batch)
            for c in range(outputs):
                for name, g in zip(names, _grad(f[0, c], wanted), strict=True):
                    if g is not None:
                        found[name][i, c] = g.detach().coalesce() if g.is_sparse else g.detach()
            del f
    return found


def stacked(found: Found, m: int, C: int, p: nn.Parameter) -> tuple[Tensor, Tensor | None]:
    """Return gradients by (sample, output) as (m, C, entries); where all are sparse, of the rows any of them has."""
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
