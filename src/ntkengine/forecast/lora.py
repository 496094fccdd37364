"""LoRA training forecast on a frozen tangent: the adapters are trained as they will be, the network to first order.

A LoRA of rank r changes a weight by ΔW = (α/r) B A. With the network linearised in its weights at the start,
    f(x) = f0(x) + (α/r) Σ_maps Σ_t (Bᵀδ_t)·(A a_t),
which is cheap to train in A and B: r·(d_in + C·d_out) operations a token. Unlike the tangent kernel at the start it
keeps what is not linear in the adapters: A's part, which is nothing while B = 0, and an optimiser that normalises every
entry's step, such as Adam. What it leaves out is how the network bends as ΔW grows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ntkengine.arguments import number, real_array, whole
from ntkengine.descent import Descent, norm
from ntkengine.errors import InputError, NonFinite
from ntkengine.forecast.outcome import Outcome, outcome
from ntkengine.forecast.scores import tells_classes
from ntkengine.losses import as_targets, correct, losses
from ntkengine.recipe import Recipe

if TYPE_CHECKING:
    from ntkengine.gram.linear import TangentFactors


@dataclass(frozen=True)
class Rehearsal:
    """What training a set of adapters is forecast to reach.

    Attributes:
        modules: the maps adapted.
        rank: r.
        alpha: α.
        parameters: trained, r·(d_in + d_out) summed over the maps.
        recipe: of the training.
        train_losses: (R, N) float64, loss of each training example after it, by repeat (start of A, order of batches).
        eval_losses: (R, M), or None without eval examples.
        eval_correct: (R, M) bool; None without eval examples, or where targets name no class.
        batch_losses: (R, steps), the loss of each step's batch before the step.
        displacement: (R,) ‖θ_t − θ_0‖ over A and B.
        movement: root mean square of f_t − f_0 over the eval outputs and repeats; over the training ones without eval.
        seconds: all repeats together.
    """

    modules: tuple[str, ...]
    rank: int
    alpha: float
    parameters: int
    recipe: Recipe
    train_losses: np.ndarray
    eval_losses: np.ndarray | None
    eval_correct: np.ndarray | None
    batch_losses: np.ndarray
    displacement: np.ndarray
    movement: float
    seconds: float

    @property
    def outcome(self) -> Outcome:
        """What the run is forecast to reach, with intervals."""
        return outcome(self.train_losses, self.eval_losses, self.eval_correct, self.movement)


def rehearse(
    factors: TangentFactors,
    targets: Any,
    recipe: Recipe | dict[str, Any],
    modules: Iterable[str] | None = None,
    *,
    rank: int = 8,
    alpha: float | None = None,
    eval_targets: Any = None,
    rows: np.ndarray | None = None,
    eval_rows: np.ndarray | None = None,
    offset: np.ndarray | None = None,
    repeats: int = 1,
    seed: int = 0,
) -> Rehearsal:
    """Train LoRA adapters of some maps by a recipe, with the network held to first order at the start.

    Args:
        factors: of `tangent_factors`, of the model before adapters are put on.
        targets: of the training examples, as for `fine_tune`.
        recipe: the recipe, or a mapping of its fields. Its proximal term acts on A and B.
        modules: names of the maps to adapt; default all of them.
        rank: r.
        alpha: α; default 2r.
        eval_targets: of the eval examples.
        rows: positions among all examples to train on; default the train examples.
        eval_rows: positions to score; default the eval examples.
        offset: (N + M, C), other outputs at the start than `factors.outputs`, such as a held-out head's.
        repeats: runs that differ in the start of A (uniform, Kaiming, as PEFT's) and in the order of batches.
        seed: of the first repeat: A's start; the order of batches is the recipe's seed plus the repeat.

    Raises:
        InputError: unknown modules, or arguments that do not fit.
        NonFinite: the run diverges, in its last step too.

    Cost: steps × tokens of a batch × 6·r·(d_in + C·d_out) flops a map and repeat.
    """
    recipe = Recipe.of(recipe)
    begun = time.perf_counter()
    if not hasattr(factors, "maps"):
        raise InputError(f"factors: expected those of tangent_factors, got {type(factors).__name__}")
    if modules is not None and not isinstance(modules, Iterable):
        raise InputError(f"modules: expected a list of names, got {modules!r}")
    names = list(factors.maps) if modules is None else [modules] if isinstance(modules, str) else list(modules)
    unknown = [n for n in names if n not in factors.maps]
    if unknown or not names:
        raise InputError(f"modules: expected some of {', '.join(list(factors.maps)[:3])}, …, got {unknown or names}")
    if len(set(names)) < len(names):
        raise InputError(f"modules: expected each once, got {max(names, key=names.count)} twice")
    names = [n for n in factors.maps if n in names]  # A is drawn map by map: their order must not matter
    rank, repeats, seed = whole("rank", rank, 1, RANK), whole("repeats", repeats, 1), whole("seed", seed)
    alpha = 2.0 * rank if alpha is None else number("alpha", alpha, above=0, what="a number")
    total, C = factors.outputs.shape
    train = np.arange(factors.train) if rows is None else _positions("rows", rows, total)
    held = np.arange(factors.train, total) if eval_rows is None else _positions("eval_rows", eval_rows, total)
    if eval_targets is not None and not len(held):
        raise InputError("eval_targets: expected factors with eval examples, or eval_rows, got none")
    f0 = torch.from_numpy(factors.outputs if offset is None else real_array("offset", offset).astype(np.float64))
    if f0.shape != (total, C) or not bool(torch.isfinite(f0).all()):
        raise InputError(f"offset: expected {(total, C)} finite numbers, got shape {tuple(f0.shape)}")
    y = as_targets("targets", targets, recipe.loss, len(train), C, eval_targets)
    y_eval = None if eval_targets is None else as_targets("eval_targets", eval_targets, recipe.loss, len(held), C, y)
    scale = alpha / rank
    runs = [
        _Run(factors, names, rank, scale, recipe, f0, seed + k).trained(train, y, recipe.seed + k)
        for k in range(repeats)
    ]
    fitted = [run.outputs(train) for run in runs]
    scored = [] if y_eval is None else [run.outputs(held) for run in runs]
    if not all(bool(torch.isfinite(f).all()) for f in (*fitted, *scored)):
        raise NonFinite("rehearse: outputs are not finite after the last step; a lower learning rate may help")
    moved = [f - f0[torch.from_numpy(train if y_eval is None else held)] for f in scored or fitted]
    return Rehearsal(
        modules=tuple(names),
        rank=rank,
        alpha=scale * rank,
        parameters=rank * sum(_width(factors, n) for n in names),
        recipe=recipe,
        train_losses=np.stack([losses(f, y, recipe.loss).numpy() for f in fitted]),
        eval_losses=None if y_eval is None else np.stack([losses(f, y_eval, recipe.loss).numpy() for f in scored]),
        eval_correct=None
        if y_eval is None or not tells_classes(y, y_eval)
        else np.stack([correct(f, y_eval).numpy() for f in scored]),
        batch_losses=np.stack([run.history for run in runs]),
        displacement=np.array([run.displacement() for run in runs]),
        movement=float(torch.stack(moved).square().mean().sqrt()),
        seconds=time.perf_counter() - begun,
    )


RANK = 1 << 30  # at most


def _positions(name: str, given: object, total: int) -> np.ndarray:
    rows = np.asarray(given)
    if rows.ndim != 1 or not len(rows) or not np.issubdtype(rows.dtype, np.integer):
        raise InputError(f"{name}: expected a list of whole numbers, got shape {rows.shape} of {rows.dtype}")
    if rows.min() < 0 or rows.max() >= total:
        raise InputError(f"{name}: expected positions in 0..{total - 1}, got {rows.min()}..{rows.max()}")
    return rows.astype(np.int64)  # torch takes uint8 for a mask


def _width(factors: TangentFactors, name: str) -> int:
    held = factors.maps[name]
    return int(held.inputs.shape[1] + held.gradients.shape[2])


class _Run:
    """Adapters of some maps, being trained."""

    def __init__(
        self, factors: TangentFactors, names: list[str], rank: int, scale: float, recipe: Recipe, f0: Tensor, seed: int
    ) -> None:
        self.maps, self.scale, self.recipe, self.f0 = [factors.maps[n] for n in names], scale, recipe, f0
        generator = torch.Generator().manual_seed(seed)
        self.A, self.B = [], []
        for held in self.maps:
            x, d = held.inputs, held.gradients
            bound = 1.0 / math.sqrt(x.shape[1])
            start = (torch.rand(rank, x.shape[1], generator=generator, dtype=torch.float64) * 2 - 1) * bound
            self.A.append(start.to(x).requires_grad_())
            self.B.append(torch.zeros(d.shape[2], rank, dtype=x.dtype, device=x.device, requires_grad=True))
        self.start = [a.detach().clone() for a in self.A]
        self.history: list[float] = []

    def outputs(self, rows: np.ndarray) -> Tensor:
        """Return f, (n, C) float64, of some examples."""
        with torch.no_grad():
            return self._f(rows)

    def _f(self, rows: np.ndarray) -> Tensor:
        taken: dict[bytes, tuple[Tensor, Tensor]] = {}
        seen: dict[int, Tensor] = {}
        moved: dict[bytes, Tensor] = {}
        for held, A, B in zip(self.maps, self.A, self.B, strict=True):
            key, shared = held.starts.tobytes(), held.inputs.data_ptr()
            if key not in taken:  # maps that see the same tokens share the lookup
                tokens, owner = _tokens(held.starts, rows)
                taken[key] = tokens.to(held.inputs.device), owner
            tokens, _ = taken[key]
            if shared not in seen:  # maps that read the same inputs share them
                seen[shared] = held.inputs[tokens]
            h = seen[shared] @ A.T
            p = held.gradients[tokens] @ B  # (z, C, r)
            part = (p * h[:, None]).sum(2).double().cpu()
            moved[key] = moved[key] + part if key in moved else part
        f = self.f0[torch.from_numpy(rows)]
        for key, part in moved.items():
            f = f.index_add(0, taken[key][1], part, alpha=self.scale)
        return f

    def trained(self, rows: np.ndarray, y: Tensor, seed: int) -> _Run:
        """Train on some examples; the order of batches is the seed's."""
        r, parameters = self.recipe, [*self.A, *self.B]
        descent = Descent(r, parameters)
        for step, chosen in enumerate(r.batches(len(rows), seed)):
            loss = losses(self._f(rows[chosen]), y[torch.from_numpy(chosen)], r.loss).mean()
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NonFinite(f"rehearse: the loss is not finite at step {step}; a lower learning rate may help")
            self.history.append(value)
            descent.step(torch.autograd.grad(loss, parameters), self._moved(), r.rate(step, len(rows)))
        return self

    def displacement(self) -> float:
        """Return ‖θ_t − θ_0‖ over all A and B."""
        return norm(self._moved())

    def _moved(self) -> list[Tensor]:
        """Return θ_t − θ_0; B starts at 0."""
        return [a.detach() - s for a, s in zip(self.A, self.start, strict=True)] + [b.detach() for b in self.B]


def _tokens(starts: np.ndarray, rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the tokens of some examples, and for each token the position of its example among them."""
    counts = starts[rows + 1] - starts[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return torch.from_numpy(np.repeat(starts[rows], counts) + within), torch.from_numpy(owner)
