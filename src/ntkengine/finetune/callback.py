"""A callback of transformers' Trainer that says when training leaves the linear regime.

The only module here that needs transformers; it is imported when `ntkengine.LinearityCallback` is first used.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from ntkengine.arguments import listed, number, whole
from ntkengine.descent import norm
from ntkengine.errors import InputError
from ntkengine.finetune.linearize import Linearized
from ntkengine.finetune.measuring import Examples
from ntkengine.inputs.parameters import select_parameters
from ntkengine.inputs.readout import ReadoutFunction, resolve_readout
from ntkengine.inputs.running import call_model, coarsest, evaluation
from ntkengine.inputs.sources import Source
from ntkengine.losses import divergence
from ntkengine.tangents.trial import settled

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Linearity:
    """How far a model in training is from its expansion at the start, on the probe examples.

    Attributes:
        step: optimiser steps done.
        epoch: passes over the training examples done.
        displacement: ‖θ_t − θ_0‖.
        moved: ‖f_θt − f_θ0‖ over all outputs of the probe examples.
        gap: ‖f_θt − f̄(θ_t − θ_0)‖, f̄ the exact first-order expansion at θ_0.
        relative_gap: the gap divided by `moved`; None while that is 0.
        divergence: mean over probe examples of KL(softmax f_θt ‖ softmax f̄).
    """

    step: int
    epoch: float
    displacement: float
    moved: float
    gap: float
    relative_gap: float | None
    divergence: float


class LinearityCallback(TrainerCallback):
    """Records the distance between the model in training and its linearisation, on probe examples.

    `Trainer(..., callbacks=[LinearityCallback(inputs)])`. θ_0 is where `train()` starts: after `resume_from_checkpoint`
    the checkpoint. The probe examples run in eval mode, without autocast, between two steps; training itself is what it
    would be without the callback.

    Args:
        inputs: probe examples, as for `compute_gram`; some dozens do.
        params: what the expansion is in, as for `compute_gram`; everything the Trainer trains must be in it.
        readout: f, likewise.
        every: steps between measurements; the first step and the last are measured too. The last is not where another
            callback ends training after it and the best checkpoint is loaded without being saved at that step.
        threshold: relative gap above which training has left the linear regime.

    Attributes:
        history: measurements of the last run, in order.
        left_at: step of the first measurement above the threshold, or None.

    Raises:
        InputError: arguments that cannot be used; at the start of training a model in pieces (FSDP, DeepSpeed, tensor
            parallel); later a parameter or a setting that changed outside the expansion.
        CheckFailed: at the start of training, as `linearize` and `fine_tune`.

    Cost: a measurement is about three forward passes of the probe examples; a copy of the parameters.
    """

    def __init__(
        self,
        inputs: Source,
        *,
        params: str | Iterable[str] = "trainable",
        readout: str | ReadoutFunction = "logits",
        every: int = 10,
        threshold: float = 0.5,
    ) -> None:
        self.inputs, self.every = inputs, whole("every", every, 1)
        self.threshold = number("threshold", threshold, above=0, what="a number")
        self.params: str | list[str] = params if isinstance(params, str) else listed("params", params, "globs")
        self.readout = resolve_readout(readout, "full")
        self.history: list[Linearity] = []
        self.left_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, _control: Any, **given: Any) -> None:
        """Expand the model where it stands."""
        model: nn.Module = given["model"]
        if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None) or getattr(model, "tp_size", None):
            raise InputError("LinearityCallback: the model is split over processes, and no one of them has all of it")
        self.history, self.left_at = [], None
        if not state.is_world_process_zero:
            return
        self._model, self._selected = model, select_parameters(model, self.params)
        with evaluation(model):
            samples = settled(model, self.inputs, self.readout, self._selected)
        self._probes = Examples(samples, next(iter(self._selected.values())))
        self._linear = Linearized(model, self._selected, self.readout)
        first = self._probes.batch(samples.chunks[0].rows)
        self._linear.compare(first)
        with torch.no_grad(), evaluation(model):
            dtype = coarsest(model, self.readout(call_model(model, first), first))
        self._start = self._outputs()
        # Gaps that the model's own rounding explains say nothing about linearity.
        self._rounding = torch.finfo(dtype).eps * float(self._start.norm())

    def on_step_end(self, _args: Any, state: Any, control: Any, **_given: Any) -> None:
        """Measure after the first step, every so many, and where training is to stop."""
        due = state.global_step % self.every == 0 or not self.history
        if due or control.should_training_stop or state.global_step == state.max_steps:
            self._measure_once(state)

    def on_save(self, _args: Any, state: Any, control: Any, **_given: Any) -> None:
        """Measure where an evaluation has stopped training, before the best checkpoint is loaded."""
        if control.should_training_stop:
            self._measure_once(state)

    def on_train_end(self, args: Any, state: Any, _control: Any, **_given: Any) -> None:
        """Let go of the model, after measuring what the run ended with, if that is what it is."""
        if not state.is_world_process_zero:
            return
        if not (args.load_best_model_at_end and state.best_model_checkpoint):
            self._measure_once(state)
        del self._model, self._selected, self._linear, self._probes, self._start

    def table(self) -> list[tuple[str, ...]]:
        """Return rows for printing, the first naming the columns."""
        rows = [asdict(m) for m in self.history]
        return [
            tuple(Linearity.__dataclass_fields__),
            *(tuple("" if v is None else f"{v:.4g}" for v in row.values()) for row in rows),
        ]

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        with evaluation(self._model):
            return self._probes.outputs(lambda batch: self.readout(call_model(self._model, batch), batch))

    def _measure_once(self, state: Any) -> None:
        if state.is_world_process_zero and (not self.history or self.history[-1].step != state.global_step):
            self._measure(state)

    @torch.no_grad()
    def _measure(self, state: Any) -> None:
        delta = self._linear.displacement
        for d, p, start in zip(delta, self._selected.values(), self._linear.origin.values(), strict=True):
            d.copy_(p - start)
        f, g = self._outputs(), self._probes.outputs(self._linear)
        gap, moved = float((f - g).norm()), float((f - self._start).norm())
        found = Linearity(
            step=state.global_step,
            epoch=float(state.epoch or 0.0),
            displacement=norm([d.detach() for d in delta]),
            moved=moved,
            gap=gap,
            relative_gap=gap / moved if moved > 0 else None,
            divergence=divergence(f, g),
        )
        self.history.append(found)
        beyond = not gap <= self.threshold * moved and not gap <= 10 * self._rounding  # also when not a number
        if beyond and self.left_at is None:
            self.left_at = found.step
            log.warning(
                "training left the linear regime by step %d: the linearised model misses %.0f %% of the change of the "
                "outputs (threshold %.0f %%), with the parameters %.3g from their start",
                found.step,
                100 * gap / moved,
                100 * self.threshold,
                found.displacement,
            )
