"""A validated call of the engine: what is refused, and the model in the precision it will run in."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.arguments import SEEDS, choice, flag, number, whole
from ntkengine.errors import InputError
from ntkengine.gram.backend import BACKENDS, uses_kernels
from ntkengine.gram.frame import CONTRACTIONS, Frame
from ntkengine.gram.transforms import TRANSFORMS, Preconditioner, name_of
from ntkengine.inputs.batches import Samples, check_inputs
from ntkengine.inputs.differentiable import check_differentiable
from ntkengine.inputs.parameters import check_values, select_parameters
from ntkengine.inputs.readout import Readout, ReadoutFunction, resolve_readout
from ntkengine.inputs.running import evaluation
from ntkengine.inputs.sources import as_inputs
from ntkengine.inputs.strangers import refuse_strangers
from ntkengine.inputs.streaming import converted


@dataclass
class Task:
    """What to run on what.

    Attributes:
        model: the model, or a copy of it in another precision; the one that is probed and checked.
        selected: its selected parameters by name.
        samples: the samples of all groups.
        readout: f.
        contraction: how outputs enter.
        transform: the inner product's name.
        roots: by selected parameter, the square root of a diagonal preconditioner; None without one.
        two: whether rows and columns are different inputs.
        preconditioner: that `roots` are of.
        kernels: whether contractions run in Triton kernels.
    """

    model: nn.Module
    selected: dict[str, nn.Parameter]
    samples: Samples
    readout: Readout
    contraction: str
    transform: str
    roots: dict[str, Tensor] | None
    two: bool
    preconditioner: Preconditioner | None = None
    kernels: bool = False

    @classmethod
    def prepare(
        cls,
        model: nn.Module,
        inputs: Any,
        inputs2: Any,
        eval_inputs: Any,
        readout: str | ReadoutFunction,
        params: str | Iterable[str],
        contraction: str,
        transform: str | Preconditioner,
        precision: str,
        backend: str = "torch",
    ) -> Task:
        """Return the task of a call's arguments, its inputs as `as_inputs` takes them.

        Raises:
            InputError: arguments that cannot be used.
        """
        check_values(model)
        check_differentiable(model)
        groups = [as_inputs(inputs, model)] + [as_inputs(g, model) for g in (inputs2, eval_inputs) if g is not None]
        for group in groups:
            check_inputs(group)
        chosen = resolve_readout(readout, contraction)
        names = list(select_parameters(model, params))
        samples = Samples(groups)
        running = in_precision(model, "exact" if precision == "exact" else "high", chosen, samples)
        by_name = dict(running.named_parameters())
        selected = {n: by_name[n] for n in names}
        scale = transform if isinstance(transform, Preconditioner) else None
        roots = None if scale is None else scale.roots(selected)
        two = inputs2 is not None
        task = cls(running, selected, samples, chosen, contraction, name_of(transform), roots, two, scale)
        task.kernels = uses_kernels(backend, task.device, torch.bfloat16 if precision == "fast" else task.dtype)
        return task

    @property
    def dtype(self) -> torch.dtype:
        """What the model runs in."""
        return next(p.dtype for p in self.model.parameters() if p.is_floating_point())

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(iter(self.model.parameters())).device

    def on(self, model: nn.Module, dtype: torch.dtype) -> Task:
        """Return the task with a copy of its model in another dtype, and what belongs to it."""
        by_name = dict(model.named_parameters())
        selected = {n: by_name[n] for n in self.selected}
        # Anew: their rounding to this task's own dtype is part of its error.
        roots = None if self.preconditioner is None else self.preconditioner.roots(selected, dtype)
        return replace(self, model=model, selected=selected, roots=roots)

    def fast(self, running: ExitStack) -> Task:
        """Return the task in bfloat16."""
        model = in_precision(self.model, "fast", self.readout, self.samples)
        running.enter_context(evaluation(model))
        return self.on(model, torch.bfloat16)

    def frame(self, outputs: int) -> Frame:
        """Return the wanted rows and columns, once C is known."""
        first = self.samples.span(0)
        if self.two:
            return Frame(first, self.samples.span(1), outputs, self.contraction, self.transform)
        return Frame((0, self.samples.total), first, outputs, self.contraction, self.transform)


def in_precision(
    model: nn.Module, precision: str, readout: Readout, samples: Samples, *, lazy: bool = False
) -> nn.Module:
    """Return the model itself when all its floating parameters have the wanted dtype, else a converted copy.

    `"exact"` wants float64, `"high"` float32 (or float64, when that is what the model is in), `"fast"` bfloat16.
    A lazy copy converts each large weight only while its module runs.

    Raises:
        InputError: a weight of another library's that has no such dtype; f of the samples depends on the model's own
            parameters where the copy is run.
    """
    wanted = {"exact": torch.float64, "high": torch.float32, "fast": torch.bfloat16}[precision]
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if dtypes == {wanted} or dtypes == {torch.float64} and precision != "fast":
        return model
    try:
        copy = converted(model, wanted, lazy=lazy)
    except (AssertionError, NotImplementedError) as error:
        kinds = sorted({type(p.data).__name__ for p in model.parameters()} - {"Tensor"})
        name = str(wanted).removeprefix("torch.")
        reason = f" ({str(error).splitlines()[0][:100]})" if str(error) else ""
        raise InputError(f"model: its weights, {', '.join(kinds)}, cannot be made {name}{reason}") from error
    refuse_strangers(model, copy, readout, samples)
    return copy


def refuse(
    transform: Any,
    precision: str,
    backend: str,
    contraction: str,
    inputs2: Any,
    eval_inputs: Any,
    sketch: Any = None,
    check: bool = True,
) -> None:
    """Refuse arguments that are wrong.

    Raises:
        InputError: saying what was expected.
    """
    choice("contraction", contraction, CONTRACTIONS)
    choice("precision", precision, ("exact", "high", "fast"))
    choice("backend", backend, BACKENDS)
    best = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    uses_kernels(backend, best, torch.float64 if precision == "exact" else torch.float32)
    if not isinstance(transform, Preconditioner):
        choice("transform", transform, TRANSFORMS)
    _refuse_sketch(sketch, name_of(transform), check)
    if inputs2 is not None and eval_inputs is not None:
        msg = "eval_inputs: goes with a Gram of inputs against themselves; leave out inputs2"
        raise InputError(msg)


def _refuse_sketch(sketch: Any, transform: str, check: bool) -> None:
    if sketch is None:
        return
    if not isinstance(sketch, int) or isinstance(sketch, bool) or sketch < 1:
        msg = f"sketch: expected a whole number of features, at least 1, got {sketch!r}"
        raise InputError(msg)
    if transform != "sgd":
        msg = (
            f"sketch: expected transform 'sgd', got {transform!r}, which needs the gradient's own entries: a sketch "
            "has only random mixtures of them"
        )
        raise InputError(msg)
    if not check:
        msg = "sketch: expected check=True, got False: without the check the error of a sketch is not measured"
        raise InputError(msg)


def check_settings(memory_gib: float | None, seed: int, **flags: bool) -> None:
    """Refuse a bound on memory, a seed, or settings that are true or false, which are none.

    Raises:
        InputError: naming it.
    """
    if memory_gib is not None:
        number("memory_gib", memory_gib, above=0, what="a number")
    whole("seed", seed, 0, SEEDS)
    for name, value in flags.items():
        flag(name, value)


def check_rows(name: str, rows: Any, n: int | None) -> None:
    """Refuse rows that do not go one by one with n examples (None: there are none to go with)."""
    if rows is None:
        return
    if n is None:
        msg = f"{name}: given without eval_inputs"
        raise InputError(msg)
    if not hasattr(rows, "__len__") or isinstance(rows, type):
        msg = f"{name}: expected {n} rows, one for each example, got {type(rows).__name__}"
        raise InputError(msg)
    if len(rows) != n:
        msg = f"{name}: expected {n} rows, one for each example, got {len(rows)}"
        raise InputError(msg)
