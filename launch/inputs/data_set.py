"""Images in memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """One part (train or test) of a data set.

    Attributes:
        pixels: [num, channels, height, width] uint8, 0 to 255.
        labels: [num] int64.
    """

    pixels: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """A training and a test set, and how pixels become inputs: (pixel / 255 - mean) / std."""

    name: str
    train: Images
    test: Images
    num_classes: int
    mean: float
    std: float

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return tuple(self.train.pixels.shape[1:])

    def inputs(self, pixels: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalised pixels in the compute dtype, channels last, on the device of ``pixels``."""
        inputs = pixels.float().div_(255).sub_(self.mean).div_(self.std)
        return inputs.to(dtype).contiguous(memory_format=torch.channels_last)
