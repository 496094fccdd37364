"""Loading a model whose large weights stay in their files: which tensor of which file each of its parameters is.

What `from_pretrained` would make of the same folder: its choice of files, its names, its dtypes.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ntkengine.errors import InputError
from ntkengine.inputs import streaming
from ntkengine.inputs.weights import Entry, entries

_NAMES = "model.safetensors", "model.safetensors.index.json"  # the first that is there


def load_streamed(
    folder: Path, auto: Any, dtype: torch.dtype, trust_remote_code: bool, options: dict[str, Any], *, bare: bool = False
) -> tuple[nn.Module, list[str]]:
    """Return a model whose large weights stay in the folder's files, and the head parameters these do not hold.

    Args:
        folder: a model directory with safetensors files.
        auto: a transformers Auto class.
        dtype: what weights are brought in.
        trust_remote_code: run code that comes with the model.
        options: for its configuration, such as `num_labels`.
        bare: the model is a body without a head: all of it has to be in the files.

    Raises:
        InputError: a body parameter that no file holds under its name and shape, quantised weights, an adapter.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **options)
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{folder}: its weights are quantised; load it without stream")
    if (folder / "adapter_config.json").is_file():  # which loading puts on the model
        raise InputError(f"{folder}: holds an adapter beside its model; load it without stream")
    with init_empty_weights(include_buffers=False):
        model = auto.from_config(config, trust_remote_code=trust_remote_code, dtype=dtype)
    model.tie_weights()
    prefix, there = "" if bare else f"{model.base_model_prefix}.", model.state_dict()
    found = _by_name(entries(_files(folder, config)), model, there)
    kept = {re.compile(part.replace("*", ".*")): d for part, d in model._get_dtype_plan(dtype).items()}
    places: dict[int, tuple[nn.Parameter, list[tuple[str, nn.Module, str]]]] = {}
    for owner, module in model.named_modules():
        for local, p in module._parameters.items():
            if p is not None:
                name = f"{owner}.{local}" if owner else local
                places.setdefault(id(p), (p, []))[1].append((name, module, local))
    missing = []
    for p, uses in places.values():
        names = [name for name, _, _ in uses]
        entry = _one_of(names, found, folder)
        wanted = next((d for part, d in kept.items() if part.search(names[0])), p.dtype)
        if entry is None and names[0].startswith(prefix):
            raise InputError(_not_there(folder, names[0]))
        if entry is not None and entry.shape != tuple(p.shape):
            got = f"{entry.shape} in {entry.path}"
            msg = f"{folder}: {names[0]}: expected shape {tuple(p.shape)}, got {got}"
            raise InputError(msg)
        if entry is not None and not entry.dtype.is_floating_point:
            msg = f"{entry.path}: {names[0]} has dtype {str(entry.dtype)[6:]}; stream=True reads plain floats"
            raise InputError(msg)
        if entry is None:
            value = nn.Parameter(torch.empty(p.shape, dtype=wanted))
            missing.append(names[0])
        elif p.ndim > 1 and p.numel() >= streaming.STREAMED:
            value = streaming.placeholder(p.shape, wanted, "cpu", entry)
        else:
            value = nn.Parameter(entry.read().to(wanted))
        for _, module, local in uses:
            module._parameters[local] = value
    _fill_buffers(model, found, there, folder)
    _draw(model, missing)
    make_unsaved(model, missing)
    streaming.attach(model)
    return model, sorted(missing)


def _by_name(found: Mapping[str, Entry], model: Any, there: dict[str, Any]) -> dict[str, Entry]:
    """Return tensors by the model's own names for them; none that loading would put together from several, or change.

    Loading takes names in its own order, and of two that come to the same the first; it has no use for any other.

    Args:
        found: by their names in the files.
        model: without weights.
        there: the model's own names.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    changes = get_model_conversion_mapping(model)
    renamings = [x for x in changes if isinstance(x, WeightRenaming)]
    converters = [x for x in changes if isinstance(x, WeightConverter)]
    named: dict[str, Entry] = {}
    for name in sorted(found, key=dot_natural_key):
        own, change = rename_source_key(name, renamings, converters, model.base_model_prefix, there)
        if own not in there and name in there:
            own, change = rename_source_key(name, [], [], model.base_model_prefix, there)
        if change is None and own in there:
            named.setdefault(own, found[name])
    return named


def _draw(model: Any, missing: list[str]) -> None:
    """Give what no file holds its start, as loading does: parameters its numbers, and buffers that are not saved."""
    made = {name for name, _ in model.named_non_persistent_buffers()} | set(missing)
    for module in model.modules():
        module._is_hf_initialized = False
    for name, x in (*model.named_parameters(), *model.named_buffers()):
        x._is_hf_initialized = name not in made
    model.initialize_weights()


def make_unsaved(model: Any, missing: list[str]) -> None:
    """Give a model that comes with code of its own what no file holds, as its classes make it.

    Loading expects transformers' own classes to set it; of others it leaves whatever was in memory.

    Args:
        model: as loaded.
        missing: its parameters that no file holds.
    """
    from accelerate import init_empty_weights

    if not model.is_custom_code():
        return
    with init_empty_weights(include_buffers=False):
        other = type(model)(copy.deepcopy(model.config))
    _draw(other, [])
    for name, buffer in other.named_non_persistent_buffers():
        model.get_buffer(name).copy_(buffer)
    there = {name: p for name, p in model.named_parameters() if name in missing}
    torch.manual_seed(torch.initial_seed())
    for name, p in there.items():
        owner, _, local = name.rpartition(".")
        module, start = model.get_submodule(owner), torch.full_like(p, float("nan"))  # refused if it stays
        if hasattr(module, "reset_parameters"):
            module = copy.deepcopy(module)
            module.reset_parameters()
            start = module.get_parameter(local)
        with torch.no_grad():
            p.copy_(start)
    if there:
        _draw(model, list(there))


def _one_of(names: list[str], found: Mapping[str, Entry], folder: Path) -> Entry | None:
    """Return the tensor of a parameter with these names, None without; of tied weights that differ there is no one."""
    held = [name for name in names if name in found]
    for name in held[1:]:
        if not torch.equal(found[name].read(), found[held[0]].read()):
            msg = f"{folder}: {held[0]} and {name} are tied by its config, and differ in its files; load it without "
            raise InputError(msg + "stream")
    return found[held[0]] if held else None


def _fill_buffers(model: nn.Module, found: Mapping[str, Entry], there: Mapping[str, Any], folder: Path) -> None:
    """Read the buffers that are saved along with weights."""
    for name, buffer in model.named_buffers():
        if name in found:
            if found[name].shape != tuple(buffer.shape):
                msg = f"{folder}: {name}: expected shape {tuple(buffer.shape)}, got {found[name].shape}"
                raise InputError(msg)
            buffer.copy_(found[name].read())
        elif name in there and not name.endswith("position_ids"):
            raise InputError(_not_there(folder, name))


def _not_there(folder: Path, name: str) -> str:
    return f"{folder}: stream=True: no file holds {name} under that name; load it without stream"


def _files(folder: Path, config: Any) -> list[Path]:
    """Return the files that make up the model, whatever others lie beside them."""
    given = getattr(config, "transformers_weights", None)
    choice = _NAMES if given is None else (given,)
    index = next((folder / n for n in choice if (folder / n).is_file()), None)
    if index is None or not Path(os.path.abspath(index)).is_relative_to(os.path.abspath(folder)):
        asked = " or ".join(choice) if given is None else f"{given}, its config's transformers_weights, in the folder"
        msg = f"{folder}: stream=True needs {asked}"
        raise InputError(msg)
    if index.suffix != ".json":
        return [index]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        return [folder / name for name in names]
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        msg = f"{index}: expected which file has which weight, under weight_map ({' '.join(str(error).split())[:100]})"
        raise InputError(msg) from error
