"""Models from a directory or a hub, with or without a PEFT adapter, refused when they cannot be what they claim."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkengine.arguments import SEEDS, whole
from ntkengine.errors import InputError
from ntkengine.inputs.adapters import adapted, peft_config, with_saved
from ntkengine.inputs.hub import adapter_folder, check_source, hub_answers
from ntkengine.inputs.streaming import converted, entry_of
from ntkengine.inputs.unloaded import load_streamed, make_unsaved

log = logging.getLogger(__name__)

_TASKS = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "encoder": "AutoModel",
}
_TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "merges.txt", "*.vocab", "tekken.json")
_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    path_or_id: str | Path,
    num_labels: int = 2,
    peft: Any = None,
    dtype: str = "float32",
    device: str = "auto",
    *,
    task: str = "sequence-classification",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    stream: bool = False,
    seed: int = 0,
) -> nn.Module:
    """Return a pretrained Hugging Face model in eval mode, ready for `compute_gram`.

    The tokenizer, where there is one, is kept as `model.ntk_tokenizer`, the source as `model.ntk_source`, and whether
    the classification head is new, that is random, as `model.ntk_head_new`: `fit_head` fits it. The head of a language
    model is never made up: weights without one are refused.

    Args:
        path_or_id: a model directory, a hub id, or an adapter's directory, such as `finetune --save` writes; of that
            only the adapter is trainable.
        num_labels: outputs of the classification head.
        peft: None, a `peft` config, or a mapping of one's fields with `peft_type`; then only the adapter is trainable.
        dtype: `"float32"`, `"float64"`, `"bfloat16"` or `"float16"`.
        device: `"auto"` (a GPU when there is one), or a torch device.
        task: `"sequence-classification"`, `"causal-lm"`, `"masked-lm"` or `"encoder"`.
        trust_remote_code: run code that comes with the model.
        allow_pickle: load weights in pickle form, which can run any code.
        stream: leave large weights in their safetensors files and bring each one only while its module runs: for
            models larger than memory. Needs a model directory.
        seed: of a new head and a new adapter; the caller's random state is left alone.

    Raises:
        InputError: no such model, no weights, pickled weights, missing or non-finite weights, an adapter that fits
            nothing, an unknown name.
    """
    _one_of("task", task, _TASKS)
    where = check_model(num_labels, dtype, device)
    seed = whole("seed", seed, 0, SEEDS)
    source, tuned = check_source(path_or_id, allow_pickle), adapter_folder(path_or_id)
    if tuned is not None and peft is not None:
        raise InputError(
            f"peft: {tuned} holds an adapter already, expected a model without one, or no [model.peft] (--peft)"
        )
    adapter = None if peft is None else peft_config(peft)
    cached = not Path(source).is_dir() and not hub_answers()
    known = {"trust_remote_code": trust_remote_code, "local_files_only": cached}
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model, missing = _load(source, num_labels, dtype, task, known, allow_pickle, stream)
        tokenizer = (None if tuned is None else _tokenizer(str(tuned), known)) or _tokenizer(source, known)
        if tokenizer is not None and tokenizer.pad_token is None and tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        if task in ("causal-lm", "masked-lm"):
            _refuse_random_words(model, missing, source, task)
        config: Any = model.config
        if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
            config.pad_token_id = tokenizer.pad_token_id
        _check_finite(model, source)
        if adapter is not None:
            model = adapted(model, adapter)
        if tuned is not None:
            model = with_saved(model, tuned, source)
            carried = any("modules_to_save" in name for name, p in model.named_parameters() if p.requires_grad)
            missing = [] if carried else missing
            _check_finite(model, str(tuned))
            source = str(tuned)
    for name, value in (("ntk_tokenizer", tokenizer), ("ntk_source", source), ("ntk_head_new", bool(missing))):
        setattr(model, name, value)
    return (converted(model, None, where) if stream else model.to(where)).eval()


def check_model(num_labels: int, dtype: str, device: str) -> torch.device:
    """Return the device of that name, after refusing arguments that are wrong whatever the model is.

    Raises:
        InputError: saying what was expected.
    """
    whole("num_labels", num_labels, 1)
    _one_of("dtype", dtype, _DTYPES)
    return _device(device)


def _one_of(name: str, value: Any, allowed: Mapping[str, Any]) -> None:
    if not isinstance(value, str) or value not in allowed:
        msg = f"{name}: expected one of {', '.join(allowed)}, got {value!r}"
        raise InputError(msg)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, TypeError) as error:
        msg = f"device: {name!r} cannot be used here ({str(error).splitlines()[0]})"
        raise InputError(msg) from error


def _load(
    source: str, num_labels: int, dtype: str, task: str, known: dict[str, bool], allow_pickle: bool, stream: bool
) -> tuple[nn.Module, list[str]]:
    """Return the model and the head parameters its weights did not hold."""
    import transformers

    options: dict[str, Any] = {"num_labels": num_labels} if task == "sequence-classification" else {}
    if not allow_pickle:
        options["use_safetensors"] = True
    auto = getattr(transformers, _TASKS[task])
    if known["local_files_only"]:
        options["adapter_kwargs"] = {"local_files_only": True}  # it is looked for separately
    if stream and not any(Path(source).glob("*.safetensors")):
        msg = f"{source}: stream=True needs a model directory with safetensors files"
        raise InputError(msg)
    try:
        if stream:
            trust, bare = known["trust_remote_code"], task == "encoder"
            return load_streamed(Path(source), auto, _DTYPES[dtype], trust, options, bare=bare)
        model, info = auto.from_pretrained(
            source,
            dtype=_DTYPES[dtype],
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, by name
            **known,
            **options,
        )
        make_unsaved(model, info["missing_keys"])
    except InputError:
        raise
    except Exception as error:  # many kinds; each means the model cannot be used
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            reason = "it needs code of its own: pass trust_remote_code if you trust it"
        field = re.search(r"Field '(\w+)' expected (\w+), got \w+ \(value: (.*)\)", reason)
        if field is not None:
            reason = f"config.json: {field[1]}: expected {field[2]}, got {field[3]}"
        reason = reason if len(reason) < 300 else f"{reason[:300].rpartition('. ')[0] or reason[:300]} …"
        msg = f"{source}: cannot be loaded ({reason})"
        if known["local_files_only"] and "cached files" in reason:
            msg = (
                f"{source}: is no local directory, the hub does not answer (or is off), and its cache has no such model"
            )
        elif not Path(source).is_dir():
            msg = f"{source}: is no local directory, and the hub gave no such model ({reason})"
        raise InputError(msg) from error
    prefix = getattr(model, "base_model_prefix", "") + "."
    # A pooler is part of the head when the weights come from a model trained without one.
    missing = sorted(k for k in info["missing_keys"] if not k.endswith("position_ids"))
    body = [k for k in missing if k.startswith(prefix) and ".pooler." not in k] if task != "encoder" else missing
    mismatched = {str(name): shapes for name, *shapes in info.get("mismatched_keys", ())}
    of_body = [k for k in mismatched if k.startswith(prefix) or task != "sequence-classification"]
    if of_body and not body:
        got, expected = (tuple(shape) for shape in mismatched[min(of_body)])
        msg = f"{source}: {min(of_body)}: expected shape {expected}, as its config has it, got {got}"
        raise InputError(msg)
    if mismatched and not body:
        msg = (
            f"{source}: its head, {min(mismatched)}, has another number of outputs than num_labels={num_labels} asks "
            "for; give the number it has, or, for a new head, the model saved without it "
            "(`model.base_model.save_pretrained(...)`)"
        )
        raise InputError(msg)
    if body:
        msg = f"{source}: its weights do not cover the model: {body[0]} is missing"
        raise InputError(msg)
    return model, missing


def _refuse_random_words(model: nn.Module, missing: list[str], source: str, task: str) -> None:
    """Refuse a language model whose logits would be a random matrix's; biases may be missing, they start at zero."""
    there = dict(model.named_parameters(remove_duplicate=False))
    random = next((name for name in missing if name in there and there[name].ndim > 1), None)
    if random is not None:
        msg = f"{source}: its weights hold no head for task {task!r}: {random} is missing and would be random"
        raise InputError(msg)


def _tokenizer(source: str, known: dict[str, bool]) -> Any:
    from transformers import AutoTokenizer

    folder = Path(source)
    # Of a folder without one, some libraries make a tokenizer that knows no word.
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return None
    try:
        return AutoTokenizer.from_pretrained(source, **known)
    except Exception as error:  # a model without a tokenizer is fine: inputs may be tensors already
        log.debug("%s: no tokenizer (%s)", source, error)
        return None


def _check_finite(model: nn.Module, source: str) -> None:
    for name, tensor in model.named_parameters():
        # A streamed weight shows when it is used: what it touches is not finite either.
        if entry_of(tensor) is None and tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            msg = f"{source}: weights are not finite: {name} holds NaN or infinity"
            raise InputError(msg)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep loading reports, progress bars and warnings of the libraries off the user's screen; restore after."""
    from transformers.utils import logging as hf

    level, bars = hf.get_verbosity(), hf.is_progress_bar_enabled()
    try:
        hf.set_verbosity_error()
        hf.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        hf.set_verbosity(level)
        if bars:
            hf.enable_progress_bar()
