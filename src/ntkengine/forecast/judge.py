"""One subset of modules after another: its training forecast, its kernel described.

A subset's kernel is a sum, K_S = Σ_{l∈S} K_l, so one per-module Gram serves all of the 2^L. For LoRA of rank r at its
usual start (B = 0, A uniform with variance 1/(3 d_in)) each K_l enters with the factor its expectation over A has,
(α/r)²·r/(3 d_in).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ntkengine.errors import InputError, NonFinite
from ntkengine.forecast.crossed import rehearse_folds
from ntkengine.forecast.given import differing
from ntkengine.forecast.lora import rehearse
from ntkengine.forecast.outcome import Outcome, outcome
from ntkengine.forecast.ranking import Choice
from ntkengine.forecast.scores import centred_alignment, tells_classes
from ntkengine.forecast.simulate import simulate
from ntkengine.losses import as_targets, correct, losses
from ntkengine.recipe import Recipe
from ntkengine.spectrum import condition_from_eigenvalues

if TYPE_CHECKING:
    from ntkengine.gram.linear import TangentFactors


class Judge:
    """Forecasts a subset; remembers those it has done."""

    def __init__(
        self,
        gram: Any,
        targets: Any,
        recipe: Recipe,
        factors: TangentFactors | Sequence[TangentFactors] | None,
        fold: np.ndarray | None,
        rank: int,
        alpha: float,
        eval_targets: Any,
        repeats: int,
        seed: int,
    ) -> None:
        modules = dict(getattr(gram, "modules", None) or {})
        if gram is None and factors is None:
            raise InputError("gram: expected a Gram with per_module, or factors, got neither")
        if gram is not None and not modules:
            raise InputError("gram: expected one computed with per_module=True, got one without modules")
        if gram is not None and gram.contraction not in ("trace", "full"):
            raise InputError(f"gram: expected one of contraction 'trace' or 'full', got {gram.contraction!r}")
        if getattr(gram, "transform", "sgd") != "sgd":
            raise InputError(f"gram: expected the plain inner product, transform 'sgd', got {gram.transform!r}")
        by_fold = isinstance(factors, Sequence)
        parts = () if factors is None else tuple(factors) if isinstance(factors, Sequence) else (factors,)
        for part in parts:
            if not hasattr(part, "maps"):
                raise InputError(f"factors: expected those of tangent_factors, got {type(part).__name__}")
        if by_fold and fold is None:
            raise InputError("fold: expected the fold of each example, as factors are given by fold, got none")
        if fold is not None and not by_fold:
            raise InputError("factors: expected one for each fold, as fold is given, got one for all or none")
        self.gram, self.recipe, self.factors, self.rank = gram, recipe, factors, rank
        self.alpha, self.targets, self.fold, self.repeats, self.seed = alpha, targets, fold, repeats, seed
        self.eval_targets = getattr(gram, "eval_targets", None) if eval_targets is None else eval_targets
        if self.eval_targets is None and fold is None:
            raise InputError("eval_targets: expected held-out examples to rank by, got none")
        self.parts = parts
        self.shapes = _shapes(gram, parts[0] if parts else None)
        if gram is not None and parts:
            _refuse_apart(gram, parts[0], alike=not by_fold)
        self.names = [n for n in self.shapes if not modules or n in modules]
        if not self.names:
            raise InputError(
                "gram: expected linear maps among its modules, got none; compute it with params='*.weight'"
            )
        if modules:
            _refuse_more_than_weights(gram, self.names)
        self._done: dict[tuple[str, ...], Choice] = {}
        self._kernels: dict[str, np.ndarray] = {}
        self._ends: dict[str, tuple[float, float]] = {}
        way = (
            "trained on the network's first order in its weights"
            if factors is not None
            else ("simulated on expected LoRA kernels: A's part is left out, and Adam has one second moment a module")
        )
        self.assumptions = [
            f"LoRA of rank {rank}, α = {self.alpha:g}, {way}.",
            "Only the adapters are trained, without dropout; the head stays as it is.",
            "Intervals add the draw of eval examples, seeds, and a share for what the first order leaves out, measured "
            "on real runs, not derived.",
        ]
        if gram is not None:
            self.assumptions.append(
                "Condition numbers are of the kernel averaged over random starts of A; that of one start is usually "
                "larger, the more so the lower the rank."
            )
        if fold is not None:
            self.assumptions.append("Every example is scored out of its fold: neither head nor adapters saw it.")

    def choice(self, name: str, modules: tuple[str, ...]) -> Choice:
        """Return a subset's forecast."""
        if modules not in self._done:
            try:
                outcome = self._rehearsed(modules) if self.factors is not None else self._simulated(modules)
            except NonFinite as error:
                raise NonFinite(f"subset {name!r}: {error}") from None
            count = self.rank * sum(sum(self.shapes[m]) for m in modules)
            self._done[modules] = Choice(name, modules, count, outcome, **self._described(modules))
        return replace(self._done[modules], name=name)

    def start(self) -> Outcome:
        """Return the same figures of the model as it is, which cost nothing further."""
        loss = self.recipe.loss
        if self.fold is not None:
            f = torch.stack([torch.from_numpy(part.outputs) for part in self.parts])
            y = y_eval = as_targets("targets", self.targets, loss, f.shape[1], f.shape[2])
            where = torch.as_tensor(self.fold).long()
            every, rest = torch.arange(len(where)), torch.arange(len(f))[:, None] != where
            seen = torch.stack([losses(part, y, loss) for part in f])
            train, held = (seen * rest).sum(0) / rest.sum(0), f[where, every]
        else:
            both = [self.gram.outputs, self.gram.eval_outputs] if not self.parts else []
            for part in self.parts:  # one
                both = np.split(part.outputs, [part.train])
            now, held = (torch.as_tensor(np.asarray(outputs, dtype=np.float64)) for outputs in both)
            y = as_targets("targets", self.targets, loss, len(now), now.shape[1], self.eval_targets)
            y_eval = as_targets("eval_targets", self.eval_targets, loss, len(held), now.shape[1], y)
            train = losses(now, y, loss)
        right = correct(held, y_eval)[None].numpy() if tells_classes(y, y_eval) else None
        return outcome(train[None].numpy(), losses(held, y_eval, loss)[None].numpy(), right, movement=0.0)

    def work(self, modules: Sequence[str]) -> float:
        """Return about how many flops a subset's rehearsals take, in proportion at least; 0 where they are not known.

        Every token of every epoch meets A and B three times, forward and backward.
        """
        met = [int(part.maps[m].starts[part.train]) * sum(self.shapes[m]) for part in self.parts for m in modules]
        return 6.0 * self.rank * sum(met) * self.recipe.epochs * self.repeats

    def _rehearsed(self, modules: tuple[str, ...]) -> Outcome:
        options: dict[str, Any] = {"rank": self.rank, "alpha": self.alpha, "repeats": self.repeats, "seed": self.seed}
        given: Any = self.factors
        if self.fold is not None:
            return rehearse_folds(given, self.fold, self.targets, self.recipe, modules, **options).outcome
        return rehearse(given, self.targets, self.recipe, modules, eval_targets=self.eval_targets, **options).outcome

    def _simulated(self, modules: tuple[str, ...]) -> Outcome:
        crosses = getattr(self.gram, "cross_modules", None) or {}
        if any(m not in crosses for m in modules):
            raise InputError("gram: expected one with eval examples, so that it has cross Grams by module")
        return simulate(
            [self._kernel(m) for m in modules],
            self.targets,
            self.recipe,
            offset=self.gram.outputs,
            sizes=[self.rank * self.shapes[m][0] for m in modules],
            crosses=[np.asarray(crosses[m]) * self._factor(m) for m in modules],
            eval_targets=self.eval_targets,
            eval_offset=self.gram.eval_outputs,
        ).outcome

    def _factor(self, module: str) -> float:
        """Return what a full kernel is multiplied by: its expected LoRA kernel; a trace kernel stands for C outputs."""
        outputs = self.gram.outputs.shape[1] if self.gram.contraction == "trace" else 1
        return (self.alpha / self.rank) ** 2 * self.rank / (3.0 * self.shapes[module][1]) / outputs

    def _kernel(self, module: str) -> np.ndarray:
        if module not in self._kernels:
            self._kernels[module] = np.asarray(self.gram.modules[module], dtype=np.float64) * self._factor(module)
        return self._kernels[module]

    def _described(self, modules: tuple[str, ...]) -> dict[str, Any]:
        if self.gram is None:
            return {}
        K = np.add.reduce([self._kernel(m) for m in modules])
        values = np.linalg.eigvalsh(K)[::-1]
        noise = float(self.gram.noise) * max(self._factor(m) for m in modules)
        for m in modules:
            if m not in self._ends:
                own, off = np.linalg.eigvalsh(self._kernel(m)), float(self.gram.noise) * self._factor(m)
                self._ends[m] = max(0.0, float(own[0]) - off), float(own[-1]) + off
        y = self._named()
        return {
            "condition": condition_from_eigenvalues(values, noise),
            "trace": float(values.sum()),
            "alignment": centred_alignment(K, y, noise) if len(K) == len(y) else None,
            "weyl": (sum(self._ends[m][0] for m in modules), sum(self._ends[m][1] for m in modules)),
        }

    def _named(self) -> np.ndarray:
        """Return the targets as numbers a kernel can be aligned with, (N, C); classes as a column each."""
        N, C = self.gram.outputs.shape
        y = as_targets("targets", self.targets, self.recipe.loss, N, C).numpy()
        return y if y.ndim == 2 else np.eye(max(2, C))[y]


def _shapes(gram: Any, factors: TangentFactors | None) -> dict[str, tuple[int, int]]:
    """Return (d_out, d_in) of every linear map."""
    if factors is not None:
        return {n: (m.gradients.shape[2], m.inputs.shape[1]) for n, m in factors.maps.items()}
    plan = getattr(gram, "plan", None)
    rows = [] if plan is None else plan.parameters
    return {r.module: (r.rows, r.columns) for r in rows if r.path == "outer" and min(r.rows, r.columns) > 1}


def _refuse_apart(gram: Any, factors: TangentFactors, *, alike: bool) -> None:
    """Refuse a Gram and factors of other maps, or of other examples or another model, whose outputs differ.

    Args:
        gram: with modules.
        factors: of one model.
        alike: whether it should be the Gram's, head and all.
    """
    missing = next((n for n in factors.maps if n not in gram.modules), None)
    if missing is not None:
        raise InputError(f"gram: expected every map of the factors among its modules, {missing} is not there")
    here, there = np.asarray(gram.outputs), factors.outputs[: factors.train]
    if here.shape != there.shape or (alike and differing(here, there) is not None):
        raise InputError("factors: expected those of the Gram's model and examples, the outputs of the two differ")


def _refuse_more_than_weights(gram: Any, names: Sequence[str]) -> None:
    """Refuse modules' kernels that are not of one weight alone, before any adapter: LoRA's would be taken from them."""
    plan, met = getattr(gram, "plan", None), set()
    for row in [] if plan is None else [row for row in plan.parameters if row.module in names]:
        if row.module in met:
            raise InputError(
                f"gram: expected weights alone, {row.module} has others; compute it with params='*.weight'"
            )
        met.add(row.module)
        name = getattr(row, "parameter", f"{row.module}.weight")
        if name.rpartition(".")[0] != row.module:
            raise InputError(f"gram: expected one of a model before adapters are put on, {name} is an adapter's")
