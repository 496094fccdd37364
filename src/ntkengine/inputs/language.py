"""Readouts of language models: the logits of label words, the loss of a sequence, the loss of each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ntkengine.arguments import listed, whole
from ntkengine.errors import InputError

_IGNORED = -100  # Hugging Face's label of a position that is not scored


@dataclass(frozen=True)
class LabelWords:
    """Prompt-based classification: f_c is the logit of the c-th label word at one position.

    Attributes:
        tokens: token ids of the words, one each; `LabelWords.of` finds them.
        position: `"last"`: the last token the mask attends to, padded left or right (causal models: what comes next);
            `"mask"`: the one mask token (masked models); or an index on the logits' token axis (0: the first decoded
            token of an encoder–decoder).
        mask_token_id: for `"mask"`.
        margin: one output, the second word's logit minus the first's.
    """

    tokens: tuple[int, ...]
    position: str | int = "last"
    mask_token_id: int | None = None
    margin: bool = False

    def __post_init__(self) -> None:
        tokens = listed("LabelWords.tokens", self.tokens, "token ids")
        object.__setattr__(self, "tokens", tuple(whole("LabelWords.tokens", t) for t in tokens))
        if len(self.tokens) < 1 or len(set(self.tokens)) < len(self.tokens) or min(self.tokens) < 0:
            msg = f"LabelWords.tokens: expected different token ids ≥ 0, got {list(self.tokens)}"
            raise InputError(msg)
        if self.position not in ("last", "mask") and (isinstance(self.position, bool | str)):
            msg = f"LabelWords.position: expected 'last', 'mask' or an index, got {self.position!r}"
            raise InputError(msg)
        if self.position == "mask" and self.mask_token_id is None:
            msg = "LabelWords: position='mask' needs mask_token_id (the tokenizer's)"
            raise InputError(msg)
        if self.margin and len(self.tokens) != 2:
            msg = f"LabelWords: margin=True needs 2 words, got {len(self.tokens)}"
            raise InputError(msg)

    @classmethod
    def of(
        cls, words: Sequence[str], tokenizer: Any, position: str | int = "last", *, margin: bool = False
    ) -> LabelWords:
        """Return the readout of words, given as the tokenizer needs them (`" great"` with its space).

        Raises:
            InputError: a word that is not one token.
        """
        given, tokens = listed("LabelWords.of", words, "words"), []
        if not hasattr(tokenizer, "encode"):
            raise InputError(f"tokenizer: expected one of a transformers model, got {type(tokenizer).__name__}")
        for word in given:
            ids = tokenizer.encode(word, add_special_tokens=False)
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                got = [tokenizer.decode([i]) for i in ids]
                msg = f"LabelWords: {word!r}: expected one token, got {got}; with a leading space it may be one"
                raise InputError(msg)
            tokens.append(int(ids[0]))
        return cls(tuple(tokens), position, tokenizer.mask_token_id if position == "mask" else None, margin)

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return (N, C) logits of the words, or (N, 1) with margin."""
        logits = token_logits(outputs)
        if max(self.tokens) >= logits.shape[2]:
            msg = f"LabelWords: token {max(self.tokens)} is beyond the model's {logits.shape[2]} words"
            raise InputError(msg)
        n = torch.arange(len(logits), device=logits.device)
        f = logits[n, self._positions(outputs, logits, inputs)][:, list(self.tokens)]
        return f[:, 1:] - f[:, :1] if self.margin else f

    def _positions(self, outputs: Any, logits: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
        if isinstance(self.position, int):
            if not -logits.shape[1] <= self.position < logits.shape[1]:
                msg = f"LabelWords: position {self.position} is beyond the model's {logits.shape[1]} positions"
                raise InputError(msg)
            return torch.full((len(logits),), self.position, device=logits.device)
        ids = inputs.get("input_ids")
        before = -1 if ids is None else logits.shape[1] - ids.shape[1]  # virtual tokens of prompt tuning come first
        if ids is None or before < 0 or type(outputs).__name__.startswith("Seq2Seq"):
            msg = f"LabelWords: position={self.position!r} needs a model whose logits follow input_ids; give an index"
            raise InputError(msg)
        if self.position == "last":
            mask = inputs.get("attention_mask", torch.ones_like(ids))
            return before + ids.shape[1] - 1 - (mask != 0).flip(1).int().argmax(1)
        hits = torch.eq(ids, int(self.mask_token_id or 0))
        if not bool((hits.sum(1) == 1).all()):
            got = int(hits.sum(1)[hits.sum(1) != 1][0])
            msg = f"LabelWords: expected one mask token in every example, one has {got}"
            raise InputError(msg)
        return before + hits.int().argmax(1)


@dataclass(frozen=True)
class SequenceLoss:
    """One output: the cross-entropy of an example's tokens against `inputs["labels"]` (N, T), −100 not scored.

    Attributes:
        reduction: `"mean"` over the example's scored tokens, or `"sum"`.
        shift: whether position t predicts label t + 1 (causal models; the last virtual token of prompt tuning predicts
            the first label); None: known from the model's output type. The own `loss` of decoders taken out of
            encoder–decoders (`BartForCausalLM`, …) does not shift: `shift=False` for labels made for it.
    """

    reduction: str = "mean"
    shift: bool | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "sum"):
            msg = f"SequenceLoss.reduction: expected 'mean' or 'sum', got {self.reduction!r}"
            raise InputError(msg)

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return (N, 1)."""
        losses, scored = _losses(outputs, inputs, self.shift)
        total = losses.sum(1, keepdim=True)
        return total / scored.sum(1, keepdim=True) if self.reduction == "mean" else total


@dataclass(frozen=True)
class TokenLoss:
    """One output for each label position: its token's cross-entropy, 0 where it is not scored.

    C = T (T − 1 with a shift, but after virtual tokens) outputs cost C backward passes: meant for short sequences.

    Attributes:
        shift: as `SequenceLoss`.
    """

    shift: bool | None = None

    def __call__(self, outputs: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return (N, C)."""
        return _losses(outputs, inputs, self.shift)[0]


def token_logits(outputs: Any) -> Tensor:
    """Return (N, T, V) logits of a language model's output."""
    logits = outputs if isinstance(outputs, Tensor) else getattr(outputs, "logits", None)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(outputs).__name__
        msg = f"readout: expected a language model's logits (N, T, words), got {got}"
        raise InputError(msg)
    return logits


def predicts_next(outputs: Any) -> bool:
    """Return whether position t of a language model's output predicts token t + 1, as its type says.

    Raises:
        InputError: a type that does not say.
    """
    kind = type(outputs).__name__
    if "CausalLM" not in kind and "MaskedLM" not in kind and not kind.startswith("Seq2SeqLM"):
        msg = f"readout: whether {kind} predicts the next token is unknown; say shift=True or shift=False"
        raise InputError(msg)
    return "CausalLM" in kind


def _losses(outputs: Any, inputs: Mapping[str, Tensor], shift: bool | None) -> tuple[Tensor, Tensor]:
    """Return (losses, scored), each (N, labels): cross-entropies, zero where not scored, and where it is."""
    logits = token_logits(outputs)
    labels = inputs.get("labels")
    if labels is None or labels.ndim != 2:
        msg = "readout: a token's loss needs inputs['labels'] of shape (N, T), −100 where nothing is scored"
        raise InputError(msg)
    shift = predicts_next(outputs) if shift is None else shift
    ids = inputs.get("input_ids")
    before = logits.shape[1] - labels.shape[1]  # virtual tokens of prompt tuning come first
    first = False
    if before > 0 and ids is not None and ids.shape == labels.shape:
        # The last of them predicts the first token; images that come first do not (GIT).
        first = shift and not any(v.is_floating_point() and v.ndim > 2 for v in inputs.values())
        logits = logits[:, before - 1 : -1] if first else logits[:, before:]
    if logits.shape[1] != labels.shape[1]:
        msg = f"readout: expected labels of {logits.shape[1]} positions like the logits, got {labels.shape[1]}"
        raise InputError(msg)
    if shift and not first:
        logits, labels = logits[:, :-1], labels[:, 1:]
    scored = labels != _IGNORED
    if labels.is_floating_point() or bool(((labels < 0) & scored).any()) or bool((labels >= logits.shape[2]).any()):
        msg = f"readout: expected labels of whole numbers in 0..{logits.shape[2] - 1}, or {_IGNORED} where not scored"
        raise InputError(msg)
    labels = labels.long()
    if not bool(scored.any(1).all()):
        row = int((~scored.any(1)).nonzero()[0])
        msg = f"readout: no token of example {row} of a microbatch is scored (all labels −100)"
        raise InputError(msg)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none", ignore_index=_IGNORED)
    return losses, scored
