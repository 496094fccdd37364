"""neural-tangents, under jit, on the same networks with the same weights written in JAX.

Its trace is divided by the number of outputs; that is undone. Its TensorFlow front end is not imported: nothing here
uses it, and TensorFlow takes 2 GB.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

sys.modules.setdefault("neural_tangents.experimental", ModuleType("neural_tangents.experimental"))

import jax  # noqa: E402
import neural_tangents as nt  # noqa: E402
import numpy as np  # noqa: E402
from jax import lax  # noqa: E402
from jax import numpy as jnp  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from bench.peers.work import Config  # noqa: E402

Params = dict[str, Any]


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call."""
    params = {k: jnp.asarray(v.detach().numpy()) for k, v in model.named_parameters()}
    f = {"mlp": mlp, "cnn": cnn}[config["model"]]
    how = nt.NtkImplementation[config.get("implementation", "JACOBIAN_CONTRACTION")]
    kernel = jax.jit(nt.empirical_ntk_fn(f, trace_axes=(-1,), vmap_axes=0, implementation=how))

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        return np.asarray(kernel(jnp.asarray(inputs["x"].numpy()), None, params)) * config["C"]

    return gram


def mlp(params: Params, x: Any) -> Any:
    """`work.Mlp`."""
    last = len(params) // 2 - 1
    for i in range(last + 1):
        x = x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]
        x = jnp.tanh(x) if i < last else x
    return x


def cnn(params: Params, x: Any) -> Any:
    """`work.Cnn`."""
    for i in range(len(params) // 2 - 1):
        weight = params[f"convolutions.{i}.weight"]
        x = lax.conv_general_dilated(x, weight, (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        x = jnp.tanh(x + params[f"convolutions.{i}.bias"][:, None, None])
        x = lax.reduce_window(x, 0.0, lax.add, (1, 1, 2, 2), (1, 1, 2, 2), "VALID") / 4.0
    return x.mean((2, 3)) @ params["head.weight"].T + params["head.bias"]
