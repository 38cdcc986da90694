"""The data set that a recipe names."""

from __future__ import annotations

import dataclasses
from typing import Any

from largebatch.launch.inputs.data_set import DataSet
from largebatch.launch.inputs.image_folder import load_image_folder
from largebatch.launch.inputs.in_memory import load_cifar10, load_digits, load_mnist
from largebatch.launch.inputs.options import filled_options
from largebatch.launch.inputs.synthetic import load_synthetic

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
        name: a key of inputs.options.AUGMENTATIONS other than "text".
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
        return data if filled["normalize"] else unnormalised(data)
    if name == "synthetic":
        return load_synthetic(**filled)
    assert name == "imagenet"
    return load_image_folder(folder, filled["image_size"])


def unnormalised(data: DataSet) -> DataSet:
    """The data set with pixels / 255 as inputs."""
    num_channels = data.image_shape[0]
    return dataclasses.replace(data, mean=(0.0,) * num_channels, std=(1.0,) * num_channels)
