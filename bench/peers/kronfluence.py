"""kronfluence: pairwise scores with the identity for a curvature: inner products of linear layers' gradients."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.peers.work import Config

TRAIN = 64  # gradients in a batch beside those of the queries, which are held all at once: 10 GiB of 256


class Output(Task):
    """An output f_c, as loss and as measurement."""

    c = 0

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:  # noqa: ARG002
        """Return Σ_n f_c(x_n)."""
        return model(input_ids=batch[0]).logits[:, self.c].sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        """Return Σ_n f_c(x_n)."""
        return model(input_ids=batch[0]).logits[:, self.c].sum()


def prepare(model: nn.Module, config: Config) -> Callable[[dict[str, Tensor]], np.ndarray]:
    """Return the call. A score is of one output: scores of each are summed."""
    task = Output()
    tracked = prepare_model(model, task)

    def gram(inputs: dict[str, Tensor]) -> np.ndarray:
        data = TensorDataset(inputs["input_ids"])
        with tempfile.TemporaryDirectory() as folder:
            analyzer = Analyzer(
                "gram", tracked, task, cpu=True, output_dir=folder, disable_tqdm=True, disable_model_save=True
            )
            analyzer.fit_all_factors("identity", data, factor_args=FactorArguments(strategy="identity"))
            K = np.zeros((len(data), len(data)), np.float32)
            for task.c in range(config["C"]):
                analyzer.compute_pairwise_scores(
                    f"scores{task.c}",
                    "identity",
                    query_dataset=data,
                    train_dataset=data,
                    per_device_query_batch_size=len(data),
                    per_device_train_batch_size=TRAIN,
                    score_args=ScoreArguments(),
                )
                K += analyzer.load_pairwise_scores(f"scores{task.c}")["all_modules"].numpy()
            return K

    return gram
