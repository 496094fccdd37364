"""How much a model's outputs and gradients depend on batch composition and padding, by precision and attention."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkengine.errors import InputError
from ntkengine.inputs.running import call_model, evaluation
from ntkengine.inputs.streaming import converted

LENGTHS = (5, 14, 27, 40)  # tokens of the examples
_EXACT = 1e-5  # relative; above it float64 shows more than rounding, even where a model computes positions in float32
_PADDING = 16


@dataclass(frozen=True)
class Invariance:
    """Relative differences of f and of its gradient at the embeddings, the larger; the worst of the examples.

    Attributes:
        precision: dtype the model ran in.
        attention: the model's own implementation, or "math": PyTorch's plain attention.
        batch: one example in a batch of several, against alone.
        right: padded on the right, against alone.
        left: padded on the left, against alone.
        rounding: alone, against alone in float64.
    """

    precision: str
    attention: str
    batch: float
    right: float
    left: float
    rounding: float

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON types."""
        return asdict(self)


def batch_invariance(model: nn.Module) -> list[Invariance]:
    """Return the differences in float64, float32 and bfloat16, with the model's attention and with plain attention.

    Args:
        model: a classifier from `load_model`; it is run on random tokens of different lengths.

    Raises:
        InputError: no input embeddings to look at.
    Cost: about 80 forward and backward passes of one example, and a float64 copy of the model.
    """
    inputs = _examples(model)
    own = str(getattr(getattr(model, "config", None), "_attn_implementation", "own"))
    rows = []
    truth: list[Probe] = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        running = converted(model, dtype)
        for attention in (own, "math") if own == "sdpa" and dtype != torch.float64 else (own,):
            with evaluation(running), _attention(attention):
                found = _conditions(running, inputs)
            truth = truth or found["alone"]
            differences = {k: _worst(v, found["alone"]) for k, v in found.items() if k != "alone"}
            rounding = _worst(found["alone"], truth)
            rows.append(Invariance(str(dtype).removeprefix("torch."), attention, **differences, rounding=rounding))
    return rows


def advice(rows: list[Invariance]) -> list[str]:
    """Return what the differences mean for a user, one sentence each."""
    exact, found = rows[0], []
    if max(exact.batch, exact.right) > _EXACT:
        found.append(
            "f depends on the batch or on padding in float64 too: the model looks at padding or mixes examples; the "
            "Gram is that of the padded inputs as given"
        )
    if exact.left > _EXACT:
        found.append("the model counts positions from the first column: pad on the right, or pass position_ids")
    plain = {row.precision: row for row in rows if row.attention == "math"}
    for row in rows:
        math = plain.get(row.precision)
        if math is not None and row is not math and row.batch > 2 * math.batch:
            found.append(
                f"in {row.precision} the {row.attention} attention depends on the batch ({row.batch:.1e}, plain "
                f"attention {math.batch:.1e}): run inside torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
            )
    if not found:
        found.append("what differs is rounding: batches, padding and microbatches may be chosen freely")
    return found


def _examples(model: nn.Module) -> dict[str, Tensor]:
    config: Any = getattr(model, "config", None)
    words, pad = int(getattr(config, "vocab_size", 0) or 0), getattr(config, "pad_token_id", None) or 0
    if not words:
        msg = f"doctor: expected a model of token ids, {type(model).__name__} has no vocab_size"
        raise InputError(msg)
    ids = torch.randint(words // 2, words, (len(LENGTHS), max(LENGTHS)), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    return {"input_ids": ids.masked_fill(mask == 0, pad), "attention_mask": mask}


Probe = tuple[Tensor, Tensor]  # f (C,) and its gradient at the embeddings (T, d) of one example


def _conditions(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, list[Probe]]:
    lengths = [int(n) for n in inputs["attention_mask"].sum(1)]
    rows = range(len(lengths))
    alone = [{k: v[i : i + 1, : lengths[i]] for k, v in inputs.items()} for i in rows]
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2**30
    extra = [max(0, min(_PADDING, limit - n - 2)) for n in lengths]
    found: dict[str, list[Probe]] = {"alone": [], "right": [], "left": []}
    for i in rows:
        found["alone"] += _run(model, alone[i], [(0, lengths[i])])
        found["right"] += _run(model, _padded(model, alone[i], 0, extra[i]), [(0, lengths[i])])
        left = _padded(model, alone[i], extra[i], 0)
        found["left"] += _run(model, left, [(extra[i], extra[i] + lengths[i])])
    return found | {"batch": _run(model, dict(inputs), [(0, n) for n in lengths])}


def _run(model: nn.Module, inputs: dict[str, Tensor], spans: list[tuple[int, int]]) -> list[Probe]:
    kept: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        if not kept:
            kept.append(output.detach().requires_grad_(True))
            return kept[0]
        return output

    embeddings = getattr(model, "get_input_embeddings", lambda: None)()
    if embeddings is None:
        msg = f"doctor: {type(model).__name__} has no input embeddings to look at"
        raise InputError(msg)
    device = next(iter(model.parameters())).device
    handle = embeddings.register_forward_hook(keep)
    try:
        f = call_model(model, {k: v.to(device) for k, v in inputs.items()}).logits
    finally:
        handle.remove()
    grad = torch.autograd.grad(f[:, 0].sum(), kept)[0]
    f = f.detach().double().cpu()
    grad = grad.double().cpu()
    return [(f[i], grad[i, start:stop]) for i, (start, stop) in enumerate(spans)]


def _padded(model: nn.Module, inputs: Mapping[str, Tensor], left: int, right: int) -> dict[str, Tensor]:
    pad = getattr(getattr(model, "config", None), "pad_token_id", None) or 0
    return {k: nn.functional.pad(v, (left, right), value=pad if k == "input_ids" else 0) for k, v in inputs.items()}


def _worst(found: list[Probe], truth: list[Probe]) -> float:
    scale = max(float(f.norm()) for f, _ in truth)
    worst = 0.0
    for (f, g), (f0, g0) in zip(found, truth, strict=True):
        pair = float((f - f0).norm()) / (scale or 1.0), float((g - g0).norm()) / (float(g0.norm()) or 1.0)
        worst = max(worst, *(p if p == p else float("inf") for p in pair))  # NaN is the worst
    return worst


def _attention(name: str) -> AbstractContextManager[Any]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.MATH) if name == "math" else nullcontext()
