"""The task of telling which class an image belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from largebatch.launch.evaluation import evaluate
from largebatch.launch.inputs.data_set import Images
from largebatch.launch.inputs.in_memory import load_data
from largebatch.launch.inputs.loading import micro_batches
from largebatch.models.auxiliary import loss_with_auxiliaries
from largebatch.models.registry import build_model


class Classification:
    """An image classifier trained with cross-entropy; see largebatch.launch.task.Task."""

    sample_name = "images"

    def __init__(self, section: dict[str, Any], folder: str | None):
        self.section = section
        self.data = load_data(section["data"], folder)
        self.num_samples = len(self.data.train)
        self.description = f"{section['model']} on {self.data.name} ({self.num_samples} images)"
        self.loss_function = nn.CrossEntropyLoss(label_smoothing=section["label_smoothing"])
        self.test: Images | None = None

    def build_model(self) -> nn.Module:
        return build_model(
            self.section["model"],
            image_shape=self.data.image_shape,
            num_classes=self.data.num_classes,
            options=self.section["model_options"],
        )

    def micro_batches(self, **layout: Any) -> Iterator[tuple[Tensor, Tensor]]:
        return micro_batches(self.data.train, **layout)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor], *, dtype: torch.dtype) -> Tensor:
        pixels, labels = batch
        outputs = model(self.data.inputs(pixels, dtype))
        return loss_with_auxiliaries(outputs, lambda logits: self.loss_function(logits, labels))

    def evaluate(
        self, model: nn.Module, *, dtype: torch.dtype, rank: int, world_size: int, device: torch.device
    ) -> dict[str, float]:
        if self.test is None:
            self.test = Images(self.data.test.pixels.to(device), self.data.test.labels.to(device))
        return evaluate(model, self.data, self.test, dtype=dtype, rank=rank, world_size=world_size)

    def summary(self, figures: dict[str, float]) -> str:
        return f"test accuracy: top-1 {figures['top1']:.4f}, top-5 {figures['top5']:.4f}"
