"""A small multi-layer perceptron without randomness, for tests and for trying things out.

Input: [batch, channels, height, width], flattened. Two hidden layers of 64 and 32 units with layer normalisation and
tanh. Parameters at 1 x 8 x 8 and 10 classes: 6,698.
"""

from __future__ import annotations

import math

from torch import Tensor, nn


class MLP(nn.Sequential):
    """See the module's docstring.

    Args:
        image_shape: (channels, height, width).
        num_classes: >= 2.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 8, 8), num_classes: int = 10):
        super().__init__(
            nn.Flatten(),
            nn.Linear(math.prod(image_shape), 64),
            nn.LayerNorm(64),
            nn.Tanh(),
            nn.Linear(64, 32),
            nn.Tanh(),
            nn.Linear(32, num_classes),
        )

    def forward(self, images: Tensor) -> Tensor:
        """[batch, num_classes] logits."""
        return super().forward(images)
