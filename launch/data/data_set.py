"""What a data set of images is, and what a batch of it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from largebatch.launch.data.transfers import uploaded


class Source(Protocol):
    """One part (train or test) of a data set that can be had on a device by indices."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Source: ...

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """([batch, channels, height, width] uint8, [batch] int64 labels) on its device.

        Args:
            indices: [batch] int64, on the CPU.
        """


@dataclass(frozen=True)
class Images:
    """A source that is held as a whole, on one device.

    Attributes:
        pixels: [num, channels, height, width] uint8, 0 to 255.
        labels: [num] int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels.to(device), self.labels.to(device))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """See Source; the indices may lie on the device already."""
        indices = uploaded(indices, self.labels.device)
        return self.pixels[indices], self.labels[indices]


@dataclass(frozen=True)
class ImageFiles:
    """One part of a data set that lies in files, one image each, in folders named after their classes.

    Attributes:
        paths: [num], sorted by class, then by name. labels: [num] int64.
    """

    paths: list[str]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.paths)


@dataclass(frozen=True)
class DataSet:
    """A training and a test set, and how pixels become inputs: (pixel / 255 - mean) / std, channel by channel.

    Attributes:
        image_shape: (channels, height, width) of the inputs.
        mean, std: one number a channel.
    """

    name: str
    train: Source | ImageFiles
    test: Source | ImageFiles
    num_classes: int
    image_shape: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def inputs(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised pixels in the compute dtype, channels last, on the device of ``pixels``."""
        mean, std = (per_channel(values, pixels.device) for values in (self.mean, self.std))
        inputs = pixels.float().div_(255).sub_(mean).div_(std)
        return inputs.to(dtype).contiguous(memory_format=torch.channels_last)


@functools.lru_cache(maxsize=16)
def per_channel(values: tuple[float, ...], device: torch.device) -> Tensor | float:
    return values[0] if len(values) == 1 else uploaded(torch.tensor(values), device).view(-1, 1, 1)


class ImageBatch(NamedTuple):
    """A micro-batch.

    Attributes:
        pixels: [batch, channels, height, width] uint8, augmented.
        labels: [batch] int64.
        mixup_weights: [batch] fp32, share of each image in the mix with its neighbour (0 with 1, 2 with 3, ...); None
            without mixup.
    """

    pixels: Tensor
    labels: Tensor
    mixup_weights: Tensor | None
