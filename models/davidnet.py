"""DavidNet: the small residual network of the DAWNBench CIFAR-10 entry, often called ResNet-9.

Source: github.com/davidcpage/cifar10-fast (dawn.py) and its TensorFlow form in github.com/fastalgo/davidnet-cifar, the code
behind the CIFAR-10 rows of arXiv:1904.00962. Blocks of 3x3 convolution without bias, batch normalisation (eps 1e-5,
momentum 0.1) and ReLU: 64; 128, max-pool 2, residual of two blocks; 256, max-pool 2; 512, max-pool 2, residual of two
blocks; then the maximum over what is left of the image, a dense layer without bias, and logits times 0.125. Weights uniform
within 1 / sqrt(fan in), which is torch's default.
Input: [batch, channels, height, width], at least 8 x 8; the original is 3 x 32 x 32.
Parameters at 3 x 32 x 32, 10 classes and width 64: 6,573,120.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.config import POSITIVE, reject


class ConvolutionBlock(nn.Sequential):
    """3x3 convolution, batch normalisation, ReLU, and max-pooling by 2 if asked for."""

    def __init__(self, in_channels: int, out_channels: int, *, is_pooled: bool = False):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)
        if is_pooled:
            self.pool = nn.MaxPool2d(2)


class Residual(nn.Module):
    """Adds what two blocks make of the input; the sum is not rectified again."""

    def __init__(self, channels: int):
        super().__init__()
        self.res1 = ConvolutionBlock(channels, channels)
        self.res2 = ConvolutionBlock(channels, channels)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.res2(self.res1(hidden))


class DavidNet(nn.Module):
    """See the module's docstring.

    Args:
        image_shape: (channels, height, width).
        num_classes: >= 2.
        width: channels of the first block, >= 1; the others have 2, 4 and 8 times as many. The source's is 64; a narrow
            one is for machines without a GPU.
        logits_scale: > 0, what the dense layer's outputs are multiplied by.

    Raises:
        ValueError, TypeError: an option is illegal, or the images are too small.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (3, 32, 32),
        num_classes: int = 10,
        width: int = 64,
        logits_scale: float = 0.125,
    ):
        super().__init__()
        if not isinstance(width, int) or isinstance(width, bool) or width < 1:
            reject("model_options.width", width, "an integer >= 1")
        POSITIVE("model_options.logits_scale", logits_scale)
        channels, height, image_width = image_shape
        if min(height, image_width) < 8:
            raise ValueError(f"davidnet got images of {height} x {image_width}; expected at least 8 x 8")
        self.prep = ConvolutionBlock(channels, width)
        self.layer1 = ConvolutionBlock(width, 2 * width, is_pooled=True)
        self.residual1 = Residual(2 * width)
        self.layer2 = ConvolutionBlock(2 * width, 4 * width, is_pooled=True)
        self.layer3 = ConvolutionBlock(4 * width, 8 * width, is_pooled=True)
        self.residual3 = Residual(8 * width)
        self.linear = nn.Linear(8 * width, num_classes, bias=False)
        self.logits_scale = logits_scale

    def forward(self, images: Tensor) -> Tensor:
        """[batch, num_classes] logits."""
        hidden = self.residual1(self.layer1(self.prep(images)))
        hidden = self.residual3(self.layer3(self.layer2(hidden)))
        hidden = F.adaptive_max_pool2d(hidden, 1).flatten(1)
        return self.linear(hidden) * self.logits_scale
