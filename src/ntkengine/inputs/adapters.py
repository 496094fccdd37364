"""PEFT adapters: from fields to a configuration, from a configuration to an adapted model."""

from __future__ import annotations

import dataclasses
import inspect
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkengine.arguments import nearest_name
from ntkengine.errors import InputError
from ntkengine.inputs.attributes import stored_weight
from ntkengine.inputs.streaming import entry_of, is_streamed

_NAMES = ("target_modules", "modules_to_save")
_HEADS = ("classifier", "score", "qa_outputs")  # which the library saves along, whichever of them is there


def adapted(model: nn.Module, config: Any) -> nn.Module:
    """Return a model with an adapter on it.

    Args:
        model: the model below.
        config: of `peft_config`.

    Raises:
        InputError: the adapter does not fit the model, or starts from weights that stay in their file.
    """
    from peft import get_peft_model

    streamed = is_streamed(model)
    rank, widest = getattr(config, "r", None), max(max(p.shape, default=1) for p in model.parameters())
    if isinstance(rank, int) and rank > widest:  # before it is allocated
        msg = f"peft.r: expected at most {widest}, the model's widest layer, got {rank}"
        raise InputError(msg)
    _check_names(model, config)
    try:
        result: nn.Module = get_peft_model(model, config)
    except Exception as error:  # a field that fits no module shows up only here, as many kinds
        msg = f"peft: {' '.join(str(error).split())[:200]}"
        if "target" in str(error).lower():
            linear = sorted(
                {n.rpartition(".")[2] for n, m in model.named_modules() if stored_weight(m) is not None and "." in n}
            )
            msg = f"{msg.rstrip('.')}; modules of this model are called {', '.join(linear[:20])}"
        elif streamed:
            msg = f"{msg.rstrip('.')}; if its start reads the weights below, load them without stream"
        raise InputError(msg) from error
    for name, p in result.named_parameters() if streamed else ():
        if entry_of(p) is None and not bool(torch.isfinite(p).all()):
            msg = f"peft: {name} starts from weights that stay in their file; load the model without stream"
            raise InputError(msg)
    return result


def with_saved(model: nn.Module, folder: Path, base: str) -> nn.Module:
    """Return a model with the adapter of a folder on it, its parameters trainable.

    Args:
        model: the model below.
        folder: with adapter_config.json and adapter_model.safetensors.
        base: where the model below is, whatever the adapter says.

    Raises:
        InputError: it does not fit the model, or the file lacks a weight.
    """
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    try:
        prompts = PeftConfig.from_pretrained(str(folder)).is_prompt_learning  # which the library loads frozen only
        result = PeftModel.from_pretrained(model, str(folder), is_trainable=not prompts)
        for name, p in result.named_parameters() if prompts else ():
            p.requires_grad_(name.startswith("prompt_encoder.") or "modules_to_save." in name)
        result.peft_config["default"].base_model_name_or_path = base
        wanted = get_peft_model_state_dict(result, save_embedding_layers=False)
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as file:
            missing = sorted(wanted.keys() - set(file.keys()))
    except Exception as error:  # each of many kinds means that it cannot be used
        msg = f"{folder}: its adapter cannot be put on the model below ({' '.join(str(error).split())[:200]})"
        raise InputError(msg) from error
    if missing:
        msg = f"{folder}: adapter_model.safetensors lacks {missing[0]}"
        raise InputError(msg)
    tuned: nn.Module = result
    return tuned


def peft_config(given: Any) -> Any:
    """Return a `PeftConfig`, of its fields or as it is given.

    `target_modules` may be one name or several with commas, which PEFT would take for a regular expression; one that
    has other characters is left to it.

    Raises:
        InputError: naming the field and what was expected.
    """
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType

    if isinstance(given, PeftConfig):
        return given
    if not isinstance(given, Mapping):
        msg = f"peft: expected a peft config or a mapping of its fields, got {given!r}"
        raise InputError(msg)
    fields = dict(given)
    kind = str(fields.pop("peft_type", "LORA")).upper()
    if kind not in PeftType.__members__ or PeftType[kind] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        hint = nearest_name(kind, PeftType.__members__)
        names = ", ".join(sorted(PeftType.__members__))
        msg = f"peft.peft_type: expected one of {names}, got {kind!r}" + (hint and f"; {hint}")
        raise InputError(msg)
    chosen = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType[kind]]
    known = inspect.signature(chosen).parameters
    unknown = sorted(set(fields) - set(known))
    if unknown:
        msg = f"peft.{unknown[0]}: {kind} has no such field; it has {', '.join(sorted(known))}"
        raise InputError(msg)
    odd = next((name for name, x in fields.items() if isinstance(x, float) and not math.isfinite(x)), None)
    if odd is not None:
        raise InputError(f"peft.{odd}: expected a finite number, got {fields[odd]}")
    for item in dataclasses.fields(chosen):
        if item.name in fields:
            fields[item.name] = _checked(item, fields[item.name])
    try:
        config = chosen(**fields)
    except Exception as error:  # the library's own checks raise many kinds
        msg = f"peft: {' '.join(str(error).split())[:200]}"
        raise InputError(msg) from error
    if config.is_prompt_learning and config.task_type is None:
        msg = f"peft.task_type: {kind} needs one, such as SEQ_CLS (which trains the head along) or CAUSAL_LM"
        raise InputError(msg)
    return config


def _check_names(model: nn.Module, config: Any) -> None:
    """Refuse a name that fits nothing beside names that do, which the library would drop; of all it says so itself."""
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    for field in ("target_modules", "exclude_modules", "modules_to_save", "target_parameters"):
        wanted, what = getattr(config, field, None), "parameter" if field == "target_parameters" else "module"
        if not isinstance(wanted, list | tuple | set):
            continue  # one text is a regular expression, or stands for several
        there = parameters if what == "parameter" else modules
        mark = "" if field == "modules_to_save" else "."
        odd = [name for name in wanted if not any(x == name or x.endswith(f"{mark}{name}") for x in there)]
        odd = sorted(name for name in odd if field != "modules_to_save" or name not in _HEADS)
        if odd and (field != "target_modules" or len(odd) < len(wanted)):
            parts = odd[0].count(".") + 1
            hint = nearest_name(odd[0], sorted({".".join(x.split(".")[-parts:]) for x in there}))
            raise InputError(f"peft.{field}: {odd[0]!r} matches no {what}" + (hint and f"; {hint}"))


def _checked(item: dataclasses.Field, value: Any) -> Any:
    """Return the value of a field, after refusing what PEFT would trip over later; other kinds are left to it."""
    kind, expected = getattr(item.type, "__name__", item.type), ""
    if item.name in _NAMES and isinstance(value, str):
        if "," in value or re.fullmatch(r"[\w.]+", value):
            return [part.strip() for part in value.split(",") if part.strip()]
    elif item.name in _NAMES and value is not None:
        if not isinstance(value, list | tuple | set) or not all(isinstance(name, str) for name in value):
            expected = "a list of names"
    elif kind == "bool":
        expected = "" if isinstance(value, bool) else "true or false"
    elif kind in ("int", "float"):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind == "int" and number and not item.name.endswith("alpha"):  # a scale, which may be any number
            expected = "" if float(value).is_integer() else "a whole number"
            value = value if expected else int(value)
        else:
            expected = "" if number else "a number"
    if expected:
        msg = f"peft.{item.name}: expected {expected}, got {value!r}"
        raise InputError(msg)
    return value
