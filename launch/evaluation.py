"""Accuracy on the whole test set: every image counted once, whatever the number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from largebatch.launch.inputs.loading import ImageLoader

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
        figures = torch.stack([best[:, 0], best.any(1), losses, torch.ones_like(losses)]).double()
        totals += torch.where(counts, figures, 0).sum(1)
    if world_size > 1:
        dist.all_reduce(totals)
    model.train(was_training)
    top1, top5, loss, num_images = totals.tolist()
    if not num_images:
        raise RuntimeError(f"none of the {len(loader.data.test)} test images of {loader.data.name} could be read")
    return {"top1": top1 / num_images, "top5": top5 / num_images, "test_loss": loss / num_images}
