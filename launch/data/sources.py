"""The data set that a recipe names."""

from __future__ import annotations

import dataclasses
from typing import Any

from largebatch.config import reject
from largebatch.launch.data.data_set import DataSet, Images
from largebatch.launch.data.image_folder import load_image_folder
from largebatch.launch.data.in_memory import load_cifar10, load_digits, load_mnist, with_statistics
from largebatch.launch.data.options import filled_options
from largebatch.launch.data.synthetic import load_synthetic

NEEDED_FOLDER = {
    "mnist": "the folder that holds MNIST/ (as torchvision lays it out)",
    "cifar10": "the folder that holds cifar-10-batches-py/ (as torchvision lays it out)",
    "imagenet": "the folder that holds train/ and val/, each with a folder of images for every class",
}
MADE_HERE = {"digits": "the digits come with scikit-learn", "synthetic": "synthetic images are made up"}

IN_MEMORY = {"digits": lambda folder: load_digits(), "mnist": load_mnist, "cifar10": load_cifar10}


def load_data(name: str, folder: str | None, options: dict[str, Any] | None = None) -> DataSet:
    """Reads a data set of images from disk, or lists its files; downloads nothing.

    Args:
        name: a key of options.AUGMENTATIONS other than "text".
        folder: --data.
        options: the recipe's data_options, checked.

    Raises:
        ValueError: the folder is missing or does not hold the data set; says what was looked for.
    """
    filled = filled_options(name, options or {})
    if name in MADE_HERE and folder is not None:
        raise ValueError(f"--data is {folder!r}, but {MADE_HERE[name]}; leave --data out")
    if name in NEEDED_FOLDER and folder is None:
        raise ValueError(f"--data is missing; {name} needs {NEEDED_FOLDER[name]}")
    if name in IN_MEMORY:
        data = IN_MEMORY[name](folder)
        if filled["held_out"]:
            data = with_held_out(data, filled["held_out"])
        return data if filled["normalize"] else unnormalised(data)
    if name == "synthetic":
        return load_synthetic(**filled)
    assert name == "imagenet"
    return load_image_folder(folder, filled["image_size"])


def with_held_out(data: DataSet, num_held_out: int) -> DataSet:
    """The data set without its test set: the last training images are evaluated on, and not trained on.

    Raises:
        ValueError: nothing would be left to train on.
    """
    assert isinstance(data.train, Images)
    num_left = len(data.train) - num_held_out
    if num_left < 1:
        reject("largebatch.data_options.held_out", num_held_out, f"an integer < {len(data.train)}, the training images")
    parts = [Images(data.train.pixels[s], data.train.labels[s]) for s in (slice(num_left), slice(num_left, None))]
    name = f"{data.name} (evaluated on {num_held_out} held-out training images)"
    return dataclasses.replace(with_statistics(name, *parts), num_classes=data.num_classes)


def unnormalised(data: DataSet) -> DataSet:
    """The data set with pixels / 255 as inputs."""
    num_channels = data.image_shape[0]
    return dataclasses.replace(data, mean=(0.0,) * num_channels, std=(1.0,) * num_channels)
