"""Name -> model builder."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from largebatch.config import nearest_hint
from largebatch.models.lenet import LeNet
from largebatch.models.mlp import MLP

BUILDERS: dict[str, Callable[..., nn.Module]] = {"lenet": LeNet, "mlp": MLP}
"""Each builder takes ``image_shape`` (channels, height, width) and ``num_classes``."""


def build_model(name: str, *, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """A freshly initialised model, fp32, on the CPU.

    Raises:
        ValueError: the name is unknown, or the model cannot take images of that shape.
    """
    if name not in BUILDERS:
        hint = nearest_hint(name, list(BUILDERS))
        raise ValueError(f"largebatch.model is {name!r}; expected one of {', '.join(map(repr, BUILDERS))}{hint}")
    return BUILDERS[name](image_shape=image_shape, num_classes=num_classes)
