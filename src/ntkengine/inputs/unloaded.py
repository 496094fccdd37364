"""Loading a model whose large weights stay in their files: which tensor of which file each of its parameters is.

What `from_pretrained` would make of the same folder: its choice of files, its names, its dtypes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkengine.errors import InputError
from ntkengine.inputs import streaming
from ntkengine.inputs.weights import entries

_NAMES = "model.safetensors", "model.safetensors.index.json"  # the first that is there


def load_streamed(
    folder: Path, auto: Any, dtype: torch.dtype, trust_remote_code: bool, options: dict[str, Any]
) -> tuple[nn.Module, list[str]]:
    """Return a model whose large weights stay in the folder's files, and the head parameters these do not hold.

    Args:
        folder: a model directory with safetensors files.
        auto: a transformers Auto class.
        dtype: what weights are brought in.
        trust_remote_code: run code that comes with the model.
        options: for its configuration, such as `num_labels`.

    Raises:
        InputError: a body parameter that no file holds under its name and shape.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
    model.tie_weights()
    found, prefix = entries(_files(folder, config)), f"{model.base_model_prefix}."
    places: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module, str]]]] = {}
    for owner, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None:
                name = f"{owner}.{local}" if owner else local
                places.setdefault(id(p), (p, []))[1].append((name, module, local))
    missing = []
    for p, uses in places.values():
        names = [n for name, _, _ in uses for n in (name, name.removeprefix(prefix), prefix + name)]
        entry = next((found[n] for n in names if n in found), None)
        if entry is None and uses[0][0].startswith(prefix):
            msg = f"{folder}: stream=True: no file holds {uses[0][0]} under that name; load it without stream"
            raise InputError(msg)
        if entry is not None and entry.shape != tuple(p.shape):
            got = f"{entry.shape} in {entry.path}"
            msg = f"{folder}: {uses[0][0]}: expected shape {tuple(p.shape)}, got {got}"
            raise InputError(msg)
        if entry is None:
            value = nn.Parameter(torch.empty(p.shape, dtype=dtype))
            missing.append(uses[0][0])
        elif p.ndim > 1 and p.numel() >= streaming.STREAMED:
            value = streaming.placeholder(p.shape, dtype, "cpu", entry)
        else:
            value = nn.Parameter(entry.read().to(dtype))
        for _, module, local in uses:
            module._parameters[local] = value
    for module in {name.rpartition(".")[0] for name in missing}:
        head = model.get_submodule(module)
        for flag in (head, *head.parameters(recurse=False)):
            flag._is_hf_initialized = False
        model._init_weights(head)
    streaming.attach(model)
    return model, sorted(missing)


def _files(folder: Path, config: Any) -> list[Path]:
    """Return the files that make up the model, whatever others lie beside them."""
    given = getattr(config, "transformers_weights", None)
    index = next((folder / n for n in (given, *_NAMES) if n is not None and (folder / n).is_file()), None)
    if index is None:
        msg = f"{folder}: stream=True needs {' or '.join(_NAMES)}"
        raise InputError(msg)
    if index.suffix != ".json":
        return [index]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        msg = f"{index}: expected which file has which weight, under weight_map ({' '.join(str(error).split())[:100]})"
        raise InputError(msg) from error
