"""Data sets that fit into memory, read from disk as a whole."""

from __future__ import annotations

import os

import torch

from largebatch.launch.inputs.data_set import DataSet, Images


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
