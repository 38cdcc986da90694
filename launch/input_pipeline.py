"""Images in memory, and which of them every rank sees when.

The order of the data is a pure function of the seed: sample number p of training is the same whatever the world size,
the micro-batch and the accumulation steps, so a global batch always holds the same images, a run can be resumed at any
step, and no image is left out or seen twice within an epoch. A global batch may reach over the end of an epoch.
"""

from __future__ import annotations

import functools
import os
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


def load_data(name: str, folder: str | None) -> DataSet:
    """Reads a data set from disk; downloads nothing.

    Raises:
        ValueError: the folder is missing or does not hold the data set; says what was looked for.
    """
    if name == "digits":
        if folder is not None:
            raise ValueError(f"--data is {folder!r}, but the digits come with scikit-learn; leave --data out")
        return load_digits()
    assert name == "mnist"
    if folder is None:
        raise ValueError("--data is missing; mnist needs the folder that holds MNIST/ (as torchvision lays it out)")
    return load_mnist(folder)


def load_digits() -> DataSet:
    """1,797 handwritten digits of 8 x 8 pixels that scikit-learn carries: 1,437 to train, 360 to test.

    The split is stratified and always the same. Source: Alpaydin and Kaynak, UCI Optical Recognition of Handwritten
    Digits (test part).
    """
    from sklearn.datasets import load_digits as load
    from sklearn.model_selection import train_test_split

    raw = load()
    pixels = torch.from_numpy(raw.images).mul(255 / 16).round().to(torch.uint8).unsqueeze(1)
    labels = torch.from_numpy(raw.target).long()
    train, test = train_test_split(range(len(labels)), test_size=360, stratify=raw.target, random_state=0)
    return with_statistics("digits", Images(pixels[train], labels[train]), Images(pixels[test], labels[test]))


def load_mnist(folder: str) -> DataSet:
    """MNIST through torchvision: 60,000 digits to train and 10,000 to test, 28 x 28 pixels."""
    from torchvision.datasets import MNIST

    if not os.path.isdir(folder):
        raise ValueError(
            f"--data is {folder!r}, which is not a folder; expected one that holds MNIST/raw or MNIST/processed"
        )
    try:
        parts = [MNIST(folder, train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"--data {folder!r} holds no MNIST; expected {os.path.join(folder, 'MNIST', 'raw')} with the four unpacked files "
            f'(python -c "from torchvision.datasets import MNIST; MNIST({folder!r}, download=True)" fetches them)'
        ) from None
    return with_statistics("mnist", *(Images(p.data.unsqueeze(1), p.targets.long()) for p in parts))


def with_statistics(name: str, train: Images, test: Images) -> DataSet:
    """Mean and standard deviation of all training pixels, as the trainer normalises with."""
    scaled = train.pixels.double().div_(255)
    num_classes = int(train.labels.max()) + 1
    return DataSet(name, train, test, num_classes, scaled.mean().item(), scaled.std().item())


class SampleOrder:
    """Which image is sample number p of training: p // n epochs lie behind it, each a fresh permutation."""

    def __init__(self, num_samples: int, seed: int):
        self.num_samples = num_samples
        self.seed = seed
        self._permutation = functools.lru_cache(maxsize=2)(self._make_permutation)

    def _make_permutation(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.num_samples, generator=generator)

    def indices(self, start: int, stop: int) -> Tensor:
        """[stop - start] int64, the images that are samples start..stop-1."""
        pieces = []
        while start < stop:
            epoch, offset = divmod(start, self.num_samples)
            end = min(stop, (epoch + 1) * self.num_samples)
            pieces.append(self._permutation(epoch)[offset : offset + end - start])
            start = end
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)


class MicroBatches:
    """The micro-batches of one rank.

    Args:
        images: the whole training set; kept on ``device`` (uint8), so that nothing is copied while training.
        global_batch: samples of an optimizer step, over all ranks and micro-steps.
        micro_batch: samples of one forward pass on one rank.
    """

    def __init__(
        self,
        images: Images,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        device: torch.device,
    ):
        assert global_batch % (micro_batch * world_size) == 0
        self.images = Images(images.pixels.to(device), images.labels.to(device))
        self.order = SampleOrder(len(images), seed)
        self.global_batch, self.micro_batch = global_batch, micro_batch
        self.rank, self.world_size = rank, world_size

    def micro_batch_of(self, step: int, micro_step: int) -> tuple[Tensor, Tensor]:
        """([micro_batch, ...] uint8 pixels, [micro_batch] labels) of an optimizer step's micro-step on this rank."""
        start = step * self.global_batch + (micro_step * self.world_size + self.rank) * self.micro_batch
        indices = self.order.indices(start, start + self.micro_batch).to(self.images.labels.device)
        return self.images.pixels[indices], self.images.labels[indices]
