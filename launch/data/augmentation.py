"""What is done to training images.

ImageNet has the two levels of arXiv:1708.03888 ("minimal" and "maximal" augmentation), whose details its text leaves open:

- ``"none"``: shorter side to ``resize_size``, the central ``image_size`` square. Test images always.
- ``"minimal"``: shorter side to ``resize_size``, a random square, flipped or not. Caffe's, with which the paper's weak
  baselines were trained.
- ``"inception"``: 8% to 100% of the area with a ratio of 3/4 to 4/3 (arXiv:1409.4842, section 6), resized to the square,
  flipped or not. Not a level of that paper, but what arXiv:1706.02677, LAMB's authors and MLPerf train with.
- ``"maximal"``: that, and brightness, contrast and saturation changed by up to 40% in random order (as in fb.resnet.torch).

CIFAR-10's ``"davidnet"``, on the device: 4 pixels of reflection around the image, a random 32 x 32 of that, flipped or not,
8 x 8 of it (cutout, arXiv:1708.04552) set to the mean; as in github.com/davidcpage/cifar10-fast.

Mixup (arXiv:1710.09412): each image with its neighbour in the data order, 0 with 1, 2 with 3, ..., the share drawn for each pair.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from largebatch.launch.data.sample_order import integers, uniforms
from largebatch.launch.data.transfers import uploaded

Transform = Callable[[Image.Image], Image.Image]

CROP_ROW, CROP_COLUMN, FLIP, CUTOUT_ROW, CUTOUT_COLUMN, MIXUP = range(6)
"""Streams of random numbers."""

BORDER, CUTOUT = 4, 8


def image_transform(level: str, *, image_size: int, resize_size: int) -> Transform:
    """From an image of any size to one of image_size x image_size. Random numbers are taken from torch's generator."""
    if level == "minimal":
        steps = [v2.Resize(resize_size), v2.RandomCrop(image_size), v2.RandomHorizontalFlip()]
    elif level == "inception":
        steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip()]
    elif level == "maximal":
        colour = v2.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.4)
        steps = [v2.RandomResizedCrop(image_size), v2.RandomHorizontalFlip(), colour]
    else:
        assert level == "none"
        steps = [v2.Resize(resize_size), v2.CenterCrop(image_size)]
    return v2.Compose(steps)


def davidnet(pixels: Tensor, *, mean: tuple[float, ...], seed: int, samples: np.ndarray) -> Tensor:
    """[batch, channels, height, width] uint8, augmented.

    Args:
        pixels: as the result, read.
        mean: one share of 255 a channel, what cutout leaves behind (rounded to a whole pixel value).
        samples: [batch] sample numbers.
    """
    batch, _, height, width = pixels.shape
    device = pixels.device
    limits = {
        CROP_ROW: 2 * BORDER + 1,
        CROP_COLUMN: 2 * BORDER + 1,
        FLIP: 2,
        CUTOUT_ROW: height + 1 - CUTOUT,
        CUTOUT_COLUMN: width + 1 - CUTOUT,
    }
    drawn = np.stack([integers(seed, samples, stream, limit) for stream, limit in limits.items()])
    row, column, is_flipped, hole_row, hole_column = uploaded(torch.from_numpy(drawn), device)
    # reflection is not there for uint8
    padded = F.pad(pixels.float(), [BORDER] * 4, mode="reflect").to(torch.uint8)
    rows = row.view(-1, 1) + torch.arange(height, device=device)
    positions = torch.arange(width, device=device)
    columns = column.view(-1, 1) + torch.where(is_flipped.view(-1, 1) == 1, width - 1 - positions, positions)
    images = torch.arange(batch, device=device).view(-1, 1, 1)
    cropped = padded.permute(0, 2, 3, 1)[images, rows.unsqueeze(2), columns.unsqueeze(1)]
    in_rows = inside(hole_row, height).unsqueeze(2)
    in_columns = inside(hole_column, width).unsqueeze(1)
    hole = (in_rows & in_columns).unsqueeze(3)
    return torch.where(hole, whole_pixel(mean, device), cropped).permute(0, 3, 1, 2)


@functools.lru_cache(maxsize=16)
def whole_pixel(shares: tuple[float, ...], device: torch.device) -> Tensor:
    """[channels] uint8, nearest to shares of 255."""
    return uploaded(torch.tensor([round(255 * share) for share in shares], dtype=torch.uint8), device)


def inside(start: Tensor, size: int) -> Tensor:
    """[batch, size] bool: which positions lie in the hole."""
    positions = torch.arange(size, device=start.device)
    return (positions >= start.view(-1, 1)) & (positions < start.view(-1, 1) + CUTOUT)


def mixup_weights(alpha: float, *, seed: int, samples: np.ndarray) -> Tensor:
    """[batch] fp32, the share of each image in its mix, Beta(alpha, alpha); the same for both of a pair.

    Args:
        samples: [batch] sample numbers, the first even and each the next of the one before.
    """
    from scipy.special import betaincinv

    return torch.from_numpy(betaincinv(alpha, alpha, uniforms(seed, samples // 2, MIXUP))).float()


def mixed_with_neighbours(inputs: Tensor, weights: Tensor) -> Tensor:
    """weight * image + (1 - weight) * neighbour, in the dtype and memory format of the inputs."""
    weights = weights.to(inputs.dtype).view(-1, 1, 1, 1)
    return neighbours(inputs).lerp(inputs, weights)


def neighbours(values: Tensor) -> Tensor:
    """[batch, ...] with 0 and 1 exchanged, 2 and 3, and so on."""
    return values[torch.arange(len(values), device=values.device) ^ 1]
