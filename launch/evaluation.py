"""Accuracy on the whole test set: every image counted once, whatever the number of ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from largebatch.launch.inputs.data_set import DataSet, Images

EVALUATION_BATCH = 500


@torch.no_grad()
def evaluate(
    model: nn.Module, data: DataSet, test: Images, *, dtype: torch.dtype, rank: int, world_size: int
) -> dict[str, float]:
    """{"top1", "top5", "test_loss"}: shares of the test set, 0 to 1, and the mean cross-entropy.

    Rank r takes images r, r + world_size, ...; counts are added over the ranks. With five classes or fewer, top-5 is 1.
    """
    was_training = model.training
    model.eval()
    pixels, labels = test.pixels[rank::world_size], test.labels[rank::world_size]
    totals = torch.zeros(4, dtype=torch.float64, device=labels.device)
    for start in range(0, len(labels), EVALUATION_BATCH):
        batch = slice(start, start + EVALUATION_BATCH)
        logits = model(data.inputs(pixels[batch], dtype)).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[batch].unsqueeze(1)
        loss = nn.functional.cross_entropy(logits, labels[batch], reduction="sum")
        totals += torch.stack(
            [best[:, 0].sum(), best.sum(), loss, best.new_tensor(len(best), dtype=loss.dtype)]
        ).double()
    if world_size > 1:
        dist.all_reduce(totals)
    model.train(was_training)
    top1, top5, loss, num_images = totals.tolist()
    assert num_images == len(test)
    return {"top1": top1 / num_images, "top5": top5 / num_images, "test_loss": loss / num_images}
