"""The task of telling which class an image belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.launch.evaluation import evaluate
from largebatch.launch.inputs.augmentation import mixed_with_neighbours, neighbours
from largebatch.launch.inputs.data_set import ImageBatch, ImageFiles
from largebatch.launch.inputs.file_loading import Reading, automatic_workers
from largebatch.launch.inputs.loading import ImageLoader
from largebatch.launch.inputs.options import filled_options
from largebatch.launch.inputs.sources import load_data
from largebatch.models.auxiliary import loss_with_auxiliaries
from largebatch.models.registry import build_model


class Classification:
    """An image classifier trained with cross-entropy; see largebatch.launch.task.Task."""

    sample_name = "images"

    def __init__(self, section: dict[str, Any], folder: str | None):
        self.section = section
        data = load_data(section["data"], folder, section["data_options"])
        self.loader = ImageLoader(data, section["augmentation"], section["mixup"])
        self.num_samples = len(data.train)
        self.description = f"{section['model']} on {data.name} ({self.num_samples} images)"
        if isinstance(data.train, ImageFiles):
            options = filled_options(section["data"], section["data_options"])
            workers = automatic_workers() if options["workers"] == "auto" else options["workers"]
            self.loader.resize_size = options["resize_size"]
            self.loader.reading = Reading(workers, options["prefetch"], options["on_corrupt"] == "replace")
            self.description += f" at {options['image_size']} px read by {workers} workers a rank"
        self.micro_batch = 1

    @property
    def unreadable(self) -> dict[str, str]:
        return self.loader.unreadable

    def build_model(self) -> nn.Module:
        return build_model(
            self.section["model"],
            image_shape=self.loader.data.image_shape,
            num_classes=self.loader.data.num_classes,
            options=self.section["model_options"],
        )

    def micro_batches(self, *, micro_batch: int, **layout: Any) -> Iterator[ImageBatch]:
        self.micro_batch = micro_batch
        return self.loader.micro_batches(micro_batch=micro_batch, **layout)

    def loss(self, model: nn.Module, batch: ImageBatch, *, dtype: torch.dtype) -> Tensor:
        inputs = self.loader.data.inputs(batch.pixels, dtype)
        if batch.mixup_weights is not None:
            inputs = mixed_with_neighbours(inputs, batch.mixup_weights)
        return loss_with_auxiliaries(model(inputs), lambda logits: self._cross_entropy(logits, batch))

    def _cross_entropy(self, logits: Tensor, batch: ImageBatch) -> Tensor:
        """With labels smoothed and, under mixup, mixed like the images."""
        smoothing, weights = self.section["label_smoothing"], batch.mixup_weights
        if weights is None:
            return F.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        own, other = (
            F.cross_entropy(logits, labels, label_smoothing=smoothing, reduction="none")
            for labels in (batch.labels, neighbours(batch.labels))
        )
        return (weights * own + (1 - weights) * other).mean()

    def evaluate(
        self, model: nn.Module, *, dtype: torch.dtype, rank: int, world_size: int, device: torch.device
    ) -> dict[str, float]:
        return evaluate(
            model,
            self.loader,
            micro_batch=self.micro_batch,
            dtype=dtype,
            rank=rank,
            world_size=world_size,
            device=device,
        )

    def summary(self, figures: dict[str, float]) -> str:
        return f"test accuracy: top-1 {figures['top1']:.4f}, top-5 {figures['top5']:.4f}"
