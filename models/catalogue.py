"""Name -> model builder."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from largebatch.config import UnknownOptionError, nearest_hint
from largebatch.models import torchvision_classifier
from largebatch.models.alexnet import build_alexnet, build_alexnet_bn
from largebatch.models.bert import build_bert
from largebatch.models.davidnet import DavidNet
from largebatch.models.googlenet import build_googlenet
from largebatch.models.lenet import LeNet
from largebatch.models.mlp import MLP
from largebatch.models.resnet50 import build_resnet50

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "mlp": MLP,
    "alexnet": build_alexnet,
    "alexnet_bn": build_alexnet_bn,
    "resnet50": build_resnet50,
    "davidnet": DavidNet,
    "googlenet": build_googlenet,
}
"""Image classifiers. Each takes ``image_shape`` (channels, height, width), ``num_classes`` and its options."""

TEXT_BUILDERS: dict[str, Callable[..., nn.Module]] = {"bert": build_bert}
"""Pre-trained on text. Each takes ``vocab_size``, ``sequence_length`` and its options."""

TORCHVISION = "torchvision:"
GIVEN_BY_THE_DATA = ("image_shape", "num_classes", "vocab_size", "sequence_length")


def check_model(name: str, options: dict[str, Any] | None = None) -> None:
    """Refuses an unknown model or an option that it does not have; builds nothing.

    Raises:
        ValueError: names what is known and the nearest.
    """
    if isinstance(name, str) and name.startswith(TORCHVISION):
        torchvision_classifier.check_name(name.removeprefix(TORCHVISION))
        known = torchvision_classifier.option_names(name.removeprefix(TORCHVISION))
    else:
        builders = BUILDERS | TEXT_BUILDERS
        if name not in builders:
            choices = ", ".join(map(repr, builders))
            raise ValueError(
                f"largebatch.model is {name!r}; expected one of {choices}, or 'torchvision:<name>' for a classifier of "
                f"torchvision{nearest_hint(name, list(builders))}"
            )
        known = [p for p in inspect.signature(builders[name]).parameters if p not in GIVEN_BY_THE_DATA]
    if not isinstance(options or {}, dict):
        raise TypeError(f"largebatch.model_options is {options!r}; expected a section (JSON object)")
    for option in options or {}:
        if option not in known:
            expected = f"one of {', '.join(map(repr, sorted(known)))}" if known else "none: it has no options"
            raise UnknownOptionError(
                f"largebatch.model_options.{option} is not an option of {name}; expected {expected}"
                f"{nearest_hint(option, known)}"
            )


def build_model(
    name: str, *, image_shape: tuple[int, int, int], num_classes: int, options: dict[str, Any] | None = None
) -> nn.Module:
    """A freshly initialised image classifier, fp32, on the CPU.

    Args:
        name: a key of BUILDERS, or "torchvision:<name>".
        image_shape: (channels, height, width) of the inputs.
        num_classes: >= 2.
        options: keyword arguments of the builder.

    Raises:
        ValueError: the name or an option is unknown, an option has an illegal value, or the model cannot take images
            of that shape.
    """
    check_model(name, options)
    options = options or {}
    if name in TEXT_BUILDERS:
        raise ValueError(f'largebatch.model is {name!r}, which reads text; set largebatch.data to "text"')
    if name.startswith(TORCHVISION):
        name = name.removeprefix(TORCHVISION)
        return torchvision_classifier.build(name, image_shape=image_shape, num_classes=num_classes, options=options)
    try:
        return BUILDERS[name](image_shape=image_shape, num_classes=num_classes, **options)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"largebatch.model {name!r} cannot be built for images of {image_shape} and {num_classes} classes with "
            f"model_options {options}: {error}"
        ) from error
