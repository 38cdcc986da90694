"""Micro-batches of images."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from largebatch.launch.inputs.data_set import Images
from largebatch.launch.inputs.sample_order import SampleOrder, micro_batch_ranges


def micro_batches(
    images: Images,
    *,
    seed: int,
    global_batch: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    device: torch.device,
    first_step: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """([micro_batch, ...] uint8 pixels, [micro_batch] labels) of one rank, endlessly, from step ``first_step`` on.

    Args:
        images: the whole training set; kept on ``device`` (uint8), so that nothing is copied while training.
    """
    pixels, labels = images.pixels.to(device), images.labels.to(device)
    order = SampleOrder(len(images), seed)
    for samples in micro_batch_ranges(
        global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size, first_step=first_step
    ):
        indices = order.indices(samples.start, samples.stop).to(device)
        yield pixels[indices], labels[indices]
