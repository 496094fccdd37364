"""Other ways to the same Gram, as data: what each computes, on which work, and what it needs.

A peer's module holds `prepare(model, config)`: what it needs once, not timed; it returns the call that is timed,
(inputs) -> (N, N) array.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Peer:
    """A contender.

    Attributes:
        name: in tables and lines.
        how: it gets there, in a few words.
        works: keys of `work.WORKS`.
        module: under bench.peers.
        package: it needs, beyond the engine's own; "": none.
        requirements: file of them, beside this one.
        compiles: the first call with inputs of a shape is slow: it is warmed up on the whole work.
        options: passed on to `prepare` in its config.
    """

    name: str
    how: str
    works: tuple[str, ...]
    module: str
    package: str = ""
    requirements: str = ""
    compiles: bool = False
    options: tuple[tuple[str, str], ...] = ()


_KRONFLUENCE = {"package": "kronfluence", "requirements": "requirements-kronfluence.txt"}
_OPACUS = {"package": "opacus", "requirements": "requirements-opacus.txt"}
_JAX = {"package": "neural_tangents", "requirements": "requirements-neural-tangents.txt", "compiles": True}
_BERT, _LINEAR, _LORA = (("bert" + part, "sentences" + part) for part in ("", "-linear", "-lora"))
_EAGER = (("attention", "eager"),)
_STRUCTURED = (("implementation", "STRUCTURED_DERIVATIVES"),)

ENGINES = ("engine", "engine-unchecked", "engine-fast", "engine-fast-unchecked")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch-func", "vmap(jacrev), as PyTorch's tutorial", _BERT, "torch_func", options=_EAGER),
        Peer("torch-func-once", "vmap(jacrev), one Jacobian", _BERT, "torch_func", options=(*_EAGER, ("sides", "1"))),
        Peer("autograd", "one backward a sample and output", _BERT, "autograd"),
        Peer("opacus", "per-sample gradients, matrix products", _BERT, "opacus", **_OPACUS),
        Peer("kronfluence", "pairwise scores, identity; linear layers", _LINEAR, "kronfluence", **_KRONFLUENCE),
        Peer("neural-tangents-mlp", "Jacobian contraction, the default", ("mlp",), "neural_tangents", **_JAX),
        Peer(
            "neural-tangents-mlp-structured",
            "structured derivatives",
            ("mlp",),
            "neural_tangents",
            **_JAX,
            options=_STRUCTURED,
        ),
        Peer("neural-tangents-cnn", "Jacobian contraction, the default", ("cnn",), "neural_tangents", **_JAX),
        Peer(
            "neural-tangents-cnn-structured",
            "structured derivatives",
            ("cnn",),
            "neural_tangents",
            **_JAX,
            options=_STRUCTURED,
        ),
        Peer(
            "jacrev-lora",
            "arXiv 2602.08239: jacrev over all, LoRA part kept",
            _LORA,
            "jacrev_lora",
            options=_EAGER,
        ),
    )
}
