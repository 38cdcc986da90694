"""ResNet-50 v1.5: torchvision's, whose stride lies in the 3x3 convolutions.

Source: arXiv:1512.03385, Table 1; v1.5 as in torchvision and MLPerf. Initialisation: convolutions He-normal (fan out), the
last scale of each residual block zero (arXiv:1706.02677, section 5.1).
Input: [batch, 3, height, width], at least 32 x 32; ImageNet's is 224 x 224.
Parameters at 1,000 classes: 25,557,032.
"""

from __future__ import annotations

import functools

from torch import nn
from torchvision.models import resnet50

from largebatch.config import POSITIVE, boolean, number


def build_resnet50(
    image_shape: tuple[int, int, int] = (3, 224, 224),
    num_classes: int = 1000,
    zero_init_last_gamma: bool = True,
    classifier_std: float | None = None,
    batch_norm_momentum: float = 0.1,
    batch_norm_eps: float = 1e-5,
) -> nn.Module:
    """torchvision's ``resnet50`` without pre-trained weights.

    Args:
        zero_init_last_gamma: whether each residual block begins as the identity.
        classifier_std: > 0, standard deviation of the dense layer's normal weights (arXiv:1706.02677 and MLPerf: 0.01),
            with biases zero; None: torch's default.
        batch_norm_momentum: > 0 and < 1, share of the new statistics in the running ones at each step.
        batch_norm_eps: > 0.

    Raises:
        ValueError, TypeError: an option is illegal, or the images have the wrong shape.
    """
    boolean("model_options.zero_init_last_gamma", zero_init_last_gamma)
    number("null or a number > 0", lambda x: x > 0, or_none=True)("model_options.classifier_std", classifier_std)
    number("a number > 0 and < 1", lambda x: 0 < x < 1)("model_options.batch_norm_momentum", batch_norm_momentum)
    POSITIVE("model_options.batch_norm_eps", batch_norm_eps)
    channels, height, width = image_shape
    if channels != 3 or min(height, width) < 32:
        raise ValueError(
            f"resnet50 got images of {channels} x {height} x {width}; expected 3 channels, at least 32 x 32"
        )
    norm_layer = functools.partial(nn.BatchNorm2d, momentum=batch_norm_momentum, eps=batch_norm_eps)
    model = resnet50(
        weights=None, num_classes=num_classes, zero_init_residual=zero_init_last_gamma, norm_layer=norm_layer
    )
    if classifier_std is not None:
        nn.init.normal_(model.fc.weight, std=classifier_std)
        nn.init.zeros_(model.fc.bias)
    return model
