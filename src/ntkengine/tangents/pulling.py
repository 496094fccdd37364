"""A segment's gradients: backward once per output, and each parameter's factors read off them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import CheckFailed
from ntkengine.inputs.parameters import leave_out
from ntkengine.tangents.capture import Call, PathFailed, Pulled
from ntkengine.tangents.factors import Dense, Use
from ntkengine.tangents.paths import matrix_shape, uses_of
from ntkengine.tangents.structure import Path, Structure
from ntkengine.tangents.verify import calls_of, uses_in_graph


class Puller:
    """Reads factors off a segment's graph.

    Args:
        model: as it runs.
        selected: parameters by name.
        structure: from `probe`.
    """

    def __init__(self, model: nn.Module, selected: Mapping[str, nn.Parameter], structure: Structure) -> None:
        self.model, self.selected, self.structure = model, selected, structure

    def pull(
        self,
        out: Tensor,
        cotangent: Tensor | None,
        leaf: list[Tensor],
        recorded: Mapping[str, list[Call]],
        paths: list[Path],
        n: int,
    ) -> tuple[dict[str, list[Use]], Tensor | None]:
        """Return the factors of the parameters, and the cotangent of the segment's input, (n, C, …).

        Args:
            out: what the segment made of a microbatch.
            cotangent: of it, (n, C, …); None where f does not depend on it.
            leaf: the segment's input, if its cotangent is wanted.
            recorded: calls of the parameters' modules.
            paths: the parameters.
            n: samples of the microbatch.

        Raises:
            CheckFailed: a use of a parameter that the probe has not seen.
        """
        calls = [(m, call) for m, found in recorded.items() for call in found if call.edge is not None]
        self._all_seen(out, paths, recorded)
        own = [path for path in paths if not path.owners]
        targets: list[Any] = [*leaf, *(call.edge for _, call in calls), *(self.selected[p.parameter] for p in own)]
        uses: dict[str, list[Use]] = {path.parameter: [] for path in paths}
        if not targets or not out.requires_grad or cotangent is None:
            return uses, None
        C = cotangent.shape[1]
        held = [_Outputs(C, axis=1) for _ in leaf] + [_Outputs(C) for _ in targets[len(leaf) :]]
        # One output at a time: batched over outputs it took 1.05 to 1.5 times as long on a CPU (C from 2 to 10).
        for c in range(C):
            grads = list(torch.autograd.grad(out, targets, cotangent[:, c], retain_graph=c < C - 1, allow_unused=True))
            for outputs in held:
                outputs.put(c, grads.pop(0))  # and let go of it: what waits is one output's
        below, stacked = [d.value for d in held[: len(leaf)]], [d.value for d in held[len(leaf) :]]
        pulled: dict[str, list[Pulled]] = defaultdict(list)
        for (m, call), d in zip(calls, stacked, strict=False):
            if d is not None:
                pulled[m].append(Pulled(call, d))
        for path in paths:
            for m, local, kind in path.owners:
                uses[path.parameter] += self._uses(path, m, local, kind, pulled.get(m, []), n)
        for path, g in zip(own, stacked[len(calls) :], strict=True):
            if g is not None:
                uses[path.parameter].append(Dense(g.reshape(1, C, *matrix_shape(self.selected[path.parameter]))))
        down = below[0] if below else None
        return uses, None if down is None else down.transpose(0, 1)

    def _uses(self, path: Path, module: str, local: str, kind: str, pulled: list[Pulled], n: int) -> list[Use]:
        owner = self.model.get_submodule(module)
        try:
            return uses_of(kind, owner, module, local, pulled, n)
        except PathFailed as error:
            msg = f"{path.parameter} (of {type(owner).__name__}): {error}, unlike on the probed samples"
            raise CheckFailed(msg) from error

    def _all_seen(self, out: Tensor, paths: list[Path], recorded: Mapping[str, list[Call]]) -> None:
        """Refuse a parameter that this microbatch uses outside its modules' recorded calls."""
        met = uses_in_graph(out, {path.parameter: self.selected[path.parameter] for path in paths if path.owners})
        for path in paths:
            if not path.owners:
                continue
            calls, used = calls_of(path.owners, recorded, met), met.counts[path.parameter]
            if used > calls * self.structure.per_call.get(path.parameter, 1):
                msg = (
                    f"{path.parameter}: used {used} times, but only {calls} times through its module, "
                    f"unlike on the probed samples; {leave_out(path.parameter)}"
                )
                raise CheckFailed(msg)


class _Outputs:
    """Gradients of a tensor (n, …, O), output by output.

    Args:
        C: number of outputs.
        axis: of the tensor before which memory has that of outputs: by default (n, …, C, O), where a token's gradients
            lie side by side, as products want.

    Attributes:
        value: (C, n, …, O); None while no output has reached the tensor.
    """

    def __init__(self, C: int, axis: int = -1) -> None:
        self.C, self.axis = C, axis
        self.value: Tensor | None = None

    def put(self, c: int, g: Tensor | None) -> None:
        """Store the gradient of output c; None: it is zero."""
        if g is None:
            if self.value is not None:
                self.value[c].zero_()
            return
        if self.C == 1:
            self.value = g[None]
            return
        if self.value is None:
            at = 0 if g.ndim < 2 else self.axis % g.ndim
            self.value = g.new_empty(*g.shape[:at], self.C, *g.shape[at:]).movedim(at, 0)
            self.value[:c].zero_()
        self.value[c].copy_(g)
