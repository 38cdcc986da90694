"""Any image classifier of torchvision, untrained, by its name in ``torchvision.models``."""

from __future__ import annotations

import inspect
import typing
import warnings
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models import get_model_builder, list_models

from largebatch.config import nearest_hint

GIVEN_BY_THE_DATA = ("self", "num_classes")
SIZE_OPTIONS = {"VisionTransformer": "image_size", "MaxVit": "input_size"}
"""Networks that are built for one size of images, and the option that says which; filled in from the data."""


def check_name(name: str) -> None:
    """Refuses what is not a classifier of torchvision.

    Raises:
        ValueError: with the nearest name.
    """
    classifiers = list_models(module=torchvision.models)
    if name in classifiers:
        return
    if name in list_models():
        raise ValueError(f"largebatch.model is 'torchvision:{name}', which is not an image classifier")
    raise ValueError(
        f"largebatch.model is 'torchvision:{name}'; torchvision {torchvision.__version__} has no such classifier"
        f"{nearest_hint(name, classifiers)}; it has {', '.join(classifiers)}"
    )


def network_class(name: str) -> type[nn.Module]:
    return typing.get_type_hints(inspect.unwrap(get_model_builder(name)))["return"]


def option_names(name: str) -> list[str]:
    """Arguments of the network's constructor that its builder leaves free."""
    cls = network_class(name)
    parameters = inspect.signature(cls.__init__).parameters.values()
    free = [p.name for p in parameters if p.default is not p.empty and p.name not in GIVEN_BY_THE_DATA]
    size_option = SIZE_OPTIONS.get(cls.__name__)
    return free if size_option is None or size_option in free else [*free, size_option]


def build(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, options: dict[str, Any] | None = None
) -> nn.Module:
    """torchvision's network without pre-trained weights.

    GoogLeNet and Inception are built without auxiliary classifiers unless ``aux_logits`` is true; see
    largebatch.models.auxiliary for what they return then.

    Raises:
        ValueError: no such classifier, an option that it does not take, or images of a shape that it cannot take.
    """
    check_name(name)
    channels, height, width = image_shape
    if channels != 3:
        raise ValueError(f"torchvision:{name} takes images of 3 channels; these have {channels}")
    arguments = {"num_classes": num_classes} | defaults_for(name, height, width) | (options or {})
    builder = get_model_builder(name)
    try:
        with torch.device("meta"):
            probe = builder(weights=None, **arguments)
    except TypeError as error:
        raise ValueError(f"torchvision:{name} cannot be built with model_options {options}: {error}") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe(torch.empty(2, *image_shape, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ValueError(f"torchvision:{name} cannot take images of {height} x {width}: {error}") from None
    return builder(weights=None, **arguments)


def defaults_for(name: str, height: int, width: int) -> dict[str, Any]:
    parameters = inspect.signature(network_class(name).__init__).parameters
    defaults: dict[str, Any] = {}
    if "aux_logits" in parameters:
        # init_weights: otherwise torchvision warns that its default may change
        defaults |= {"aux_logits": False, "init_weights": True}
    size_option = SIZE_OPTIONS.get(network_class(name).__name__)
    if size_option == "image_size":
        defaults[size_option] = height
    elif size_option == "input_size":
        defaults[size_option] = (height, width)
    return defaults
