"""The task of telling which class an image belongs to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.launch.data.augmentation import mixed_with_neighbours, neighbours
from largebatch.launch.data.data_set import ImageBatch, ImageFiles
from largebatch.launch.data.file_loading import Reading, automatic_workers
from largebatch.launch.data.image_loader import ImageLoader
from largebatch.launch.data.options import filled_options
from largebatch.launch.data.sources import load_data
from largebatch.models.auxiliary import loss_with_auxiliaries
from largebatch.models.catalogue import build_model


class Classification:
    """An image classifier trained with cross-entropy; see largebatch.launch.trainer.task.Task."""

    sample_name = "images"

    def __init__(self, section: dict[str, Any], folder: str | None):
        self.section = section
        data = load_data(section["data"], folder, section["data_options"])
        self.loader = ImageLoader(data, section["augmentation"], section["mixup"])
        self.num_samples = len(data.train)
        self.description = f"{data.name} ({self.num_samples} images)"
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

    def summary(self, metrics: dict[str, float]) -> str:
        return f"test accuracy: top-1 {metrics['top1']:.4f}, top-5 {metrics['top5']:.4f}"


EVALUATION_BATCH = 500
SMALL_IMAGE = 3 * 64 * 64
"""Values of an image up to which any device is taken to have room for EVALUATION_BATCH of them."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: ImageLoader,
    *,
    micro_batch: int,
    dtype: torch.dtype,
    rank: int,
    world_size: int,
    device: torch.device,
) -> dict[str, float]:
    """{"top1", "top5", "test_loss"}: shares of the test set, 0 to 1, and the mean cross-entropy.

    Counts are added over the ranks. Images that cannot be read are not counted. With five classes or fewer, top-5 is 1.

    Args:
        micro_batch: images that are known to fit with their gradients; more are evaluated at once only if they are small.

    Raises:
        RuntimeError: no image could be read.
    """
    was_training = model.training
    model.eval()
    is_small = torch.Size(loader.data.image_shape).numel() <= SMALL_IMAGE
    batch_size = EVALUATION_BATCH if is_small else min(EVALUATION_BATCH, micro_batch)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for pixels, labels, counts in loader.test_batches(
        batch_size=batch_size, rank=rank, world_size=world_size, device=device
    ):
        logits = model(loader.data.inputs(pixels, dtype)).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels.unsqueeze(1)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        metrics = torch.stack([best[:, 0], best.any(1), losses, torch.ones_like(losses)]).double()
        totals += torch.where(counts, metrics, 0).sum(1)
    if world_size > 1:
        dist.all_reduce(totals)
    model.train(was_training)
    top1, top5, loss, num_images = totals.tolist()
    if not num_images:
        raise RuntimeError(f"none of the {len(loader.data.test)} test images of {loader.data.name} could be read")
    return {"top1": top1 / num_images, "top5": top5 / num_images, "test_loss": loss / num_images}
