"""Data sets that fit into memory, read from disk as a whole; nothing is downloaded."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from largebatch.launch.data.data_set import DataSet, Images


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
    """MNIST through torchvision: 60,000 digits to train and 10,000 to test, 28 x 28 pixels.

    Raises:
        ValueError: the folder does not hold it.
    """
    from torchvision.datasets import MNIST

    check_folder(folder, "MNIST/raw or MNIST/processed")
    try:
        parts = [MNIST(folder, train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"--data {folder!r} holds no MNIST; expected {os.path.join(folder, 'MNIST', 'raw')} with the four unpacked files "
            f'(python -c "from torchvision.datasets import MNIST; MNIST({folder!r}, download=True)" fetches them)'
        ) from None
    return with_statistics("mnist", *(Images(p.data.unsqueeze(1), p.targets.long()) for p in parts))


def load_cifar10(folder: str) -> DataSet:
    """CIFAR-10 through torchvision: 50,000 photographs to train and 10,000 to test, 3 x 32 x 32 pixels.

    Raises:
        ValueError: the folder does not hold it.
    """
    from torchvision.datasets import CIFAR10

    check_folder(folder, "cifar-10-batches-py")
    try:
        parts = [CIFAR10(folder, train=train, download=False) for train in (True, False)]
    except RuntimeError:
        raise ValueError(
            f"--data {folder!r} holds no CIFAR-10, or a damaged one; expected {os.path.join(folder, 'cifar-10-batches-py')} "
            "with data_batch_1 to data_batch_5, test_batch and batches.meta "
            f'(python -c "from torchvision.datasets import CIFAR10; CIFAR10({folder!r}, download=True)" fetches them)'
        ) from None
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return with_statistics("cifar10", *map(Images, pixels, labels))


def check_folder(folder: str, content: str) -> None:
    if not os.path.isdir(folder):
        raise ValueError(f"--data is {folder!r}, which is not a folder; expected one that holds {content}")


def with_statistics(name: str, train: Images, test: Images) -> DataSet:
    """The data set, normalised with mean and standard deviation of its training pixels, channel by channel."""
    statistics = [mean_and_deviation(train.pixels[:, channel]) for channel in range(train.pixels.shape[1])]
    mean, std = zip(*statistics, strict=True)
    num_classes = int(train.labels.max()) + 1
    return DataSet(name, train, test, num_classes, tuple(train.pixels.shape[1:]), mean, std)


def mean_and_deviation(pixels: Tensor) -> tuple[float, float]:
    """Of uint8 pixels as shares of 255, from how often each of the 256 values occurs."""
    counts = torch.bincount(pixels.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    mean = (counts @ values) / counts.sum()
    variance = (counts @ (values - mean).square()) / (counts.sum() - 1)
    return mean.item(), variance.sqrt().item()
