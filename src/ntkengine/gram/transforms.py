"""The inner product between gradients: plain, of signs, or preconditioned.

| transform | ⟨g, g'⟩ becomes | source |
|---|---|---|
| sgd | ⟨g, g'⟩ | the tangent kernel |
| sign | ⟨sign g, sign g'⟩ | SignGD kernel, Malladi et al. 2023 (arXiv 2210.05643) |
| asymmetric-sign | ⟨g, sign g'⟩: rows raw, columns signed | same |
| Preconditioner(d) | ⟨g, d∘g'⟩ | tangent kernel of a preconditioned step |

The sign is that of the whole per-sample gradient, summed over tokens and over every use of a parameter. An entry that
is nothing but rounding has no sign and counts as 0: in an explicit gradient one below `ZERO` of its largest entry, and
all of a parameter whose whole gradient is rounding (a key's bias before a softmax). Not seen is where that is so for
one example only (a query where all tokens are the same): its signs there are rounding's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError

SIGNS = ("sign", "asymmetric-sign")
TRANSFORMS = ("sgd", *SIGNS)
ZERO = {torch.float64: 1e-12, torch.float32: 1e-6}


class Preconditioner:
    """A diagonal preconditioner d: the kernel ⟨g, d∘g'⟩.

    Args:
        scale: d by parameter name, each of its parameter's shape, finite and ≥ 0.

    Raises:
        InputError: a value that is not a tensor, negative, or not finite.
    """

    def __init__(self, scale: Mapping[str, Tensor]) -> None:
        if not isinstance(scale, Mapping):
            raise InputError(f"Preconditioner: expected tensors by parameter name, got {type(scale).__name__}")
        for name, d in scale.items():
            if not isinstance(d, Tensor) or not d.is_floating_point():
                msg = f"Preconditioner: {name}: expected a floating-point tensor, got {type(d).__name__}"
                raise InputError(msg)
            if not bool((torch.isfinite(d) & (d >= 0)).all()):
                msg = f"Preconditioner: {name}: expected finite values ≥ 0, got {float(d.min()):g} … {float(d.max()):g}"
                raise InputError(msg)
        self.scale = {name: d.detach() for name, d in scale.items()}

    @classmethod
    def from_optimizer(
        cls, state: Mapping[str, Any] | torch.optim.Optimizer, model: nn.Module, names: Sequence[str] | None = None
    ) -> Preconditioner:
        """Return d = 1 / (√v̂ + ε) of a `torch.optim.Adam` or `AdamW`, or of its `state_dict()`.

        v̂ = v / (1 − β₂ᵗ) is the bias-corrected second moment (its running maximum with amsgrad). Groups of different
        learning rates enter relative to the largest: d is the step per unit of gradient, up to that rate.

        Args:
            state: the optimizer, a Trainer's too, which knows its parameters; or its `state_dict()`, which does not.
            model: the model whose parameters it trained.
            names: of a state: the parameters' names in the optimizer's order. Needed when the optimizer was made of
                several groups without names; else those the state carries, or, unproved, the model's own order.

        Raises:
            InputError: not an Adam state, an order that cannot be known, shapes that do not fit.
        """
        if isinstance(state, torch.optim.Optimizer):
            inner = getattr(state, "optimizer", state)  # accelerate wraps it
            if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW) or names is not None:
                got = type(inner).__name__ + ("" if names is None else " with names, which it knows")
                raise InputError(f"optimizer: expected an Adam or AdamW, got {got}")
            known = {id(p): name for name, p in model.named_parameters()}
            stepped = [p for group in state.param_groups for p in group["params"]]
            if not all(id(p) in known for p in stepped):
                raise InputError("optimizer: expected one of the model's parameters only, got one of others too")
            names, state = [known[id(p)] for p in stepped], state.state_dict()
        groups, moments = _groups(state)
        order = _order(groups, model, names)
        parameters = dict(model.named_parameters())
        rates = [float(group["lr"]) for group in groups]
        if not any(rates):  # a schedule has ended: the ratios are those it began with
            rates = [float(group.get("initial_lr", 0.0)) for group in groups]
            if not any(rates) and len(groups) > 1:
                msg = "optimizer state: expected learning rates of its groups, got 0 in all; save it before they end"
                raise InputError(msg)
        scale = {}
        for group, rate in zip(groups, rates, strict=True):
            for index in group["params"]:
                if index not in moments:
                    continue  # never stepped: `roots` refuses it if it is selected
                name = order[index]
                found = moments[index]
                v = found.get("max_exp_avg_sq", found["exp_avg_sq"]).to(torch.float64)
                if v.shape != parameters[name].shape:
                    shapes = f"{tuple(v.shape)} for {name} of shape {tuple(parameters[name].shape)}"
                    msg = f"optimizer state: {shapes}; give names in the optimizer's order"
                    raise InputError(msg)
                corrected = v / (1.0 - float(group["betas"][1]) ** float(found["step"]))
                relative = rate / max(rates) if max(rates) > 0 else 1.0
                scale[name] = relative / (corrected.sqrt() + float(group["eps"]))
        return cls(scale)

    def roots(self, selected: Mapping[str, nn.Parameter], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return √d of every selected parameter, in its shape.

        Args:
            selected: parameters by name.
            dtype: of the roots; default each parameter's own.

        Raises:
            InputError: a selected parameter without d, or d of another shape.
        """
        found = {}
        for name, p in selected.items():
            if name not in self.scale:
                msg = f"Preconditioner: {name} is selected but has no scale (an optimizer that never stepped it?)"
                raise InputError(msg)
            if self.scale[name].shape != p.shape:
                got = tuple(self.scale[name].shape)
                msg = f"Preconditioner: {name}: expected shape {tuple(p.shape)}, got {got}"
                raise InputError(msg)
            found[name] = self.scale[name].to(torch.float64).sqrt().to(p.device, dtype or p.dtype)
        return found


def name_of(transform: str | Preconditioner) -> str:
    """Return what a file calls the transform."""
    return "preconditioner" if isinstance(transform, Preconditioner) else transform


def signed(g: Tensor, floor: Tensor | None = None) -> Tensor:
    """Return the signs of g, 0 at or below the floor; what is not finite becomes NaN (`torch.sign` would hide it)."""
    found = g.sign().add_(g - g)
    return found if floor is None else found.mul_((g.abs() > floor) | ~torch.isfinite(g))


def _groups(state: Mapping[str, Any]) -> tuple[list[Mapping[str, Any]], Mapping[int, Mapping[str, Any]]]:
    groups, moments = (state.get(key) if isinstance(state, Mapping) else None for key in ("param_groups", "state"))
    if not isinstance(groups, list) or not isinstance(moments, Mapping) or not moments:
        msg = "optimizer state: expected the state_dict() of an Adam or AdamW that has stepped"
        raise InputError(msg)
    if not all("betas" in g and "eps" in g for g in groups) or not all("exp_avg_sq" in m for m in moments.values()):
        msg = "optimizer state: has no second moments (exp_avg_sq); expected Adam or AdamW"
        raise InputError(msg)
    if not all("amsgrad" in g for g in groups):  # RAdam and NAdam have the same moments, and another step
        msg = f"optimizer state: expected that of Adam or AdamW, whose groups tell amsgrad, got {sorted(groups[0])}"
        raise InputError(msg)
    return groups, moments


def _order(groups: list[Mapping[str, Any]], model: nn.Module, names: Sequence[str] | None) -> dict[int, str]:
    """Return parameter names by the optimizer's index."""
    indices = [index for group in groups for index in group["params"]]
    if names is None and all("param_names" in group for group in groups):
        names = [name for group in groups for name in group["param_names"]]
    if names is None and len(groups) == 1:
        every = [(name, p.requires_grad) for name, p in model.named_parameters()]
        candidates = [[name for name, _ in every], [name for name, trainable in every if trainable]]
        names = next((found for found in candidates if len(found) == len(indices)), None)
    if names is None or len(names) != len(indices):
        msg = f"optimizer state: which of its {len(indices)} parameters is which is unknown; give names in its order"
        raise InputError(msg)
    unknown = set(names) - {name for name, _ in model.named_parameters()}
    if unknown:
        msg = f"optimizer state: the model has no parameter {sorted(unknown)[0]!r}"
        raise InputError(msg)
    return dict(zip(indices, names, strict=True))
