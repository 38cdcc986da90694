"""What is trained: a model, the batches that it sees, its loss and its metrics."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Task(Protocol):
    """One section "largebatch" of a recipe, with its data. Built the same on every rank.

    Attributes:
        description: of the data, for one line, e.g. "mnist (60000 images)".
        num_samples: of the training set.
        sample_name: what a sample is called, in the plural: "images", "sequences". Speeds are reported as
            images_per_second for images and samples_per_second for anything else.
        unreadable: name -> reason, of the samples that this rank could not read so far.
    """

    description: str
    num_samples: int
    sample_name: str
    unreadable: dict[str, str]

    def build_model(self) -> nn.Module:
        """Freshly initialised, fp32, on the CPU; the caller has seeded torch."""

    def micro_batches(
        self,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
        first_step: int,
    ) -> Iterator[Any]:
        """This rank's micro-batches, endlessly, from the first micro-step of optimizer step ``first_step`` on.

        A batch is whatever ``loss`` takes, its tensors on ``device``. Sample number p of training, its augmentation or
        masking included, is a function of (seed, p) alone: see data/sample_order.py.
        """

    def loss(self, model: nn.Module, batch: Any, *, dtype: torch.dtype) -> Tensor:
        """Scalar fp32, the mean over the samples of a micro-batch.

        Args:
            model: the DeepSpeed engine, in training mode.
            batch: from ``micro_batches``.
            dtype: compute type, that of floating-point inputs.
        """

    def evaluate(
        self, model: nn.Module, *, dtype: torch.dtype, rank: int, world_size: int, device: torch.device
    ) -> dict[str, float]:
        """Metrics on the whole test set, the same on every rank. A collective.

        Each sample is counted once over all ranks. The first metric is the main one; names are those of the recipe's
        "expected" ("top1"). Leaves the model in the mode, training or not, in which it found it.
        """

    def summary(self, metrics: dict[str, float]) -> str:
        """The metrics of ``evaluate`` in words, e.g. "test accuracy: top-1 0.9870, top-5 1.0000"."""


def build_task(section: dict[str, Any], folder: str | None) -> Task:
    """The task that a checked section "largebatch" names.

    Args:
        folder: of the data set, from --data.

    Raises:
        ValueError: the folder is missing or does not hold the data set, or the model cannot be built for it.
    """
    if section["data"] == "text":
        from largebatch.launch.trainer.pretraining import Pretraining

        return Pretraining(section, folder)
    from largebatch.launch.trainer.classification import Classification

    return Classification(section, folder)
