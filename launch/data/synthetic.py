"""Images made up on the device, as many as asked for: to measure throughput without a data set."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from largebatch.launch.data.data_set import DataSet
from largebatch.launch.data.sample_order import integers
from largebatch.launch.data.transfers import uploaded

NUM_OFFSETS = 256
NOISE_SEED, ROW_STREAM, COLUMN_STREAM, LABEL_STREAM, COLOUR_STREAM = 20_171, 0, 1, 2, 3


@dataclass(frozen=True)
class SyntheticImages:
    """Image i is a piece of one fixed sheet of noise plus a colour for its class: a function of i alone.

    There are 65,536 pieces to each class, and the classes can be learnt. Nothing is kept but the sheet.

    Attributes:
        first: number of image 0 among all images of the data set, so that training and test images differ.
        sheet: [channels, height + 255, width + 255] uint8, 0 to 127. colours: [num_classes, channels] uint8, 0 to 127.
    """

    num_samples: int
    first: int
    sheet: Tensor
    colours: Tensor
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __len__(self) -> int:
        return self.num_samples

    def to(self, device: torch.device) -> SyntheticImages:
        return SyntheticImages(self.num_samples, self.first, self.sheet.to(device), self.colours.to(device), device)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        numbers = indices.numpy() + self.first
        limits = {ROW_STREAM: NUM_OFFSETS, COLUMN_STREAM: NUM_OFFSETS, LABEL_STREAM: len(self.colours)}
        rows, columns, labels = (
            uploaded(torch.from_numpy(integers(NOISE_SEED, numbers, stream, limit)), self.device)
            for stream, limit in limits.items()
        )
        height, width = self.sheet.shape[1] - NUM_OFFSETS + 1, self.sheet.shape[2] - NUM_OFFSETS + 1
        pieces = self.sheet.permute(1, 2, 0).unfold(0, height, 1).unfold(1, width, 1)  # a view, every offset
        pixels = pieces[rows, columns].add_(self.colours[labels].unsqueeze(2).unsqueeze(3))
        return pixels, labels


def load_synthetic(
    *, num_samples: int, num_test_samples: int, image_shape: tuple[int, int, int], num_classes: int
) -> DataSet:
    """A training and a test set of made-up images, normalised with ImageNet-like statistics of their own."""
    channels, height, width = image_shape
    generator = torch.Generator().manual_seed(NOISE_SEED)
    size = (channels, height + NUM_OFFSETS - 1, width + NUM_OFFSETS - 1)
    sheet = torch.randint(0, 128, size, generator=generator, dtype=torch.uint8)
    colours = torch.randint(0, 128, (num_classes, channels), generator=generator, dtype=torch.uint8)
    train = SyntheticImages(num_samples, 0, sheet, colours)
    test = SyntheticImages(num_test_samples, num_samples, sheet, colours)
    # two numbers of 0 to 127 each: mean 63.5 and variance (128^2 - 1) / 12
    mean, std = 127 / 255, (2 * (128**2 - 1) / 12) ** 0.5 / 255
    return DataSet("synthetic", train, test, num_classes, (channels, height, width), (mean,), (std,))
