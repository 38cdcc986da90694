"""The data set that a recipe names."""

from __future__ import annotations

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
    if name == "digits":
        return load_digits()
    if name == "mnist":
        return load_mnist(folder)
    if name == "cifar10":
        return load_cifar10(folder)
    if name == "synthetic":
        return load_synthetic(**filled)
    assert name == "imagenet"
    return load_image_folder(folder, filled["image_size"])
