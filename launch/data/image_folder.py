"""Images in files: ImageNet-1k and every folder laid out like it.

DIR/train/<class>/<image> and DIR/val/<class>/<image>, the classes of both the same. ImageNet's own archives unpack to this
layout once the validation images have been moved into folders named after their classes.
"""

from __future__ import annotations

import os
import warnings

import torch
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from largebatch.launch.data.data_set import DataSet, ImageFiles

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training pixels, red, green, blue, as torchvision's models expect them."""

LAYOUT = "expected DIR/train/<class>/<image> and DIR/val/<class>/<image>"


def load_image_folder(folder: str, image_size: int) -> DataSet:
    """Lists the images; reads none.

    Args:
        image_size: height and width of the inputs.

    Raises:
        ValueError: the folder is missing, empty or laid out otherwise; says what was found.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--data is {folder!r}, which is not a folder; {LAYOUT}")
    parts = {}
    for part in ("train", "val"):
        path = os.path.join(folder, part)
        if not os.path.isdir(path):
            found = ", ".join(sorted(os.listdir(folder))[:8]) or "nothing"
            raise ValueError(f"--data {folder!r} has no folder {part!r} (it holds {found}); {LAYOUT}")
        parts[part] = list_classes(path)
    check_same_classes(folder, *parts.values())
    classes = {name: number for number, name in enumerate(sorted(parts["train"]))}
    train, test = (files_of(path_lists, classes) for path_lists in parts.values())
    return DataSet("imagenet", train, test, len(classes), (3, image_size, image_size), MEAN, STD)


def list_classes(folder: str) -> dict[str, list[str]]:
    """Class -> paths of its images, sorted.

    Raises:
        ValueError: there are no class folders, or one of them has no images.
    """
    entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    classes = {entry.name: image_paths(entry.path) for entry in entries if entry.is_dir()}
    if not classes:
        num_images = sum(is_image(entry.name) for entry in entries)
        what = f"{num_images} images but no folders" if num_images else "no folders"
        raise ValueError(f"{folder!r} holds {what}, one for each class; {LAYOUT}")
    empty = [name for name, paths in classes.items() if not paths]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(classes)} folders in {folder!r} hold no images: {shortened(empty)}; expected images "
            f"({', '.join(IMG_EXTENSIONS)}). Remove the folders, or fill them"
        )
    return classes


def image_paths(folder: str) -> list[str]:
    """All images below a folder, links followed."""
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, name) for name in names if is_image(name)]
    return sorted(found)


def is_image(name: str) -> bool:
    return name.lower().endswith(IMG_EXTENSIONS)


def check_same_classes(folder: str, train: dict[str, list[str]], val: dict[str, list[str]]) -> None:
    missing, additional = sorted(set(train) - set(val)), sorted(set(val) - set(train))
    if missing or additional:
        differences = [f"val lacks {shortened(missing)}"] * bool(missing)
        differences += [f"train lacks {shortened(additional)}"] * bool(additional)
        raise ValueError(f"--data {folder!r} has different classes in train and val: {'; '.join(differences)}")
    if len(train) < 2:
        raise ValueError(f"--data {folder!r} has one class only, {next(iter(train))!r}; expected two or more")


def shortened(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def files_of(classes: dict[str, list[str]], numbers: dict[str, int]) -> ImageFiles:
    paths, labels = [], []
    for name in sorted(classes):
        paths += classes[name]
        labels += [numbers[name]] * len(classes[name])
    return ImageFiles(paths, torch.tensor(labels))


class UnreadableImageError(RuntimeError):
    """A file that is no image, or a damaged one."""


def read_image(path: str) -> Image.Image:
    """An RGB image, decoded as a whole.

    Raises:
        UnreadableImageError: with the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the metadata of some of ImageNet's files
            with Image.open(path) as image:
                return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise whatever a damaged file leads them to
        raise UnreadableImageError(f"{type(error).__name__}: {error}") from None
