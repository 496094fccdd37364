"""A Gram of random features with the fields that tables, figures and forecasts read."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

N, M = 37, 21
KINDS = ("attention.self.query", "attention.self.key", "intermediate.dense", "output.LayerNorm", *"abcdef")


def made_gram():
    rng = np.random.default_rng(0)
    Z = rng.standard_normal((N + M, 80)) * np.arange(1, 81) ** -0.7
    y = np.where(Z @ rng.standard_normal(80) > 0, 1.0, -1.0)[:, None]
    names = [f"bert.encoder.layer.{i}.{kind}" for i in range(10) for kind in KINDS] + ["bert.embeddings.word", "head"]
    K = Z @ Z.T
    return SimpleNamespace(
        values=K[:N, :N],
        cross=K[N:, :N],
        outputs=np.zeros((N, 1)),
        eval_outputs=np.zeros((M, 1)),
        targets=y[:N],
        eval_targets=y[N:],
        contraction="trace",
        transform="sgd",
        noise=1e-5,
        modules={},
        extras={},
        plan=None,
        path=None,
        shape=(N, N),
        meta={"module_trace": dict(zip(names, rng.gamma(1.0, size=len(names)).tolist(), strict=True)), "seconds": 1.25},
    )
