"""LeNet as the authors of LAMB used it: the convolutional network of TensorFlow's MNIST tutorial.

Source: github.com/fastalgo/mnist_tpu, the code behind the MNIST rows of arXiv:1904.00962. Not LeCun's LeNet-5.
Convolution 5x5-32, max-pool 2, convolution 5x5-64, max-pool 2, dense 1024, dropout 0.4, dense 10; "same" padding,
ReLU, weights Glorot-uniform, biases zero (tf.layers' defaults).
Input: [batch, channels, height, width], height and width multiples of 4; the original is 1 x 28 x 28.
Parameters: 3,274,634 at 1 x 28 x 28 and 10 classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LeNet(nn.Module):
    """See the module's docstring.

    Args:
        image_shape: (channels, height, width).
        num_classes: >= 2.
        dropout: 0 to 1, probability of dropping a hidden unit of the dense layer.

    Raises:
        ValueError: height or width is not a multiple of 4.
    """

    def __init__(self, image_shape: tuple[int, int, int] = (1, 28, 28), num_classes: int = 10, dropout: float = 0.4):
        super().__init__()
        channels, height, width = image_shape
        if height % 4 or width % 4 or not height or not width:
            raise ValueError(
                f"lenet got images of {height} x {width}; expected height and width that are multiples of 4"
            )
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (height // 4) * (width // 4), 1024)
        self.dropout = nn.Dropout(dropout)
        self.fc2 = nn.Linear(1024, num_classes)
        for module in (self.conv1, self.conv2, self.fc1, self.fc2):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, num_classes] logits."""
        # one input channel leaves the memory format open, and pooling is much faster in channels-last (CPU, bf16: 1.6x
        # for the whole network); ReLU after the pooling gives the same values from a quarter of the elements
        hidden = self.conv1(images).contiguous(memory_format=torch.channels_last)
        hidden = F.relu(F.max_pool2d(hidden, 2))
        hidden = F.relu(F.max_pool2d(self.conv2(hidden), 2))
        hidden = F.relu(self.fc1(hidden.flatten(1)))
        return self.fc2(self.dropout(hidden))
