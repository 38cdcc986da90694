"""AlexNet as the LARS papers trained it: Caffe's, not torchvision's. And AlexNet-BN.

Convolutions 11x11-96 stride 4, 5x5-256 in 2 groups, 3x3-384, 3x3-384 in 2 groups, 3x3-256 in 2 groups, each followed by
ReLU; max-pool 3 stride 2 after the first, second and fifth; dense 4096, 4096 (dropout 0.5 each), num_classes. Pooling
rounds up, as Caffe's does. torchvision's ``alexnet`` has 64-192-384-256-256 channels without groups.

``alexnet``: local response normalisation over 5 channels (alpha 1e-4, beta 0.75) after the first two ReLUs. Source: BVLC
Caffe, models/bvlc_alexnet, which is the baseline of arXiv:1708.03888.

``alexnet_bn``: batch normalisation instead. Source: NVIDIA Caffe, models/alexnet_bn, where the network that the authors'
LARS solvers name (train_val2.prototxt) normalises the inputs of the second to the fifth convolution, without scale and
shift; ``placement="conv_output"`` is its other network (train_val.prototxt): between each convolution and its ReLU, with
scale and shift, and without the first four biases. Both: eps 1e-4, running statistics with momentum 0.1.

Weights: normal with standard deviation 0.01, in the two hidden dense layers 0.005. Biases: 0.01, there 0.1. These are the
values of train_val2.prototxt, and the ones from which the norms in Table 2 of the LARS paper (ICLR 2018 submission)
follow; the table's ".b" and ".w" labels are exchanged. ``bias_init="bvlc"`` takes BVLC's 0 (first and third
convolution, last layer) and 0.1.

Input: [batch, channels, height, width], at least 39 x 39; the papers' is 3 x 227 x 227.
Parameters at 3 x 227 x 227 and 1,000 classes: 60,965,224; AlexNet-BN the same, with "conv_output" 60,966,856.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from largebatch.config import number, one_of

DROPOUT = number("a number >= 0 and < 1", lambda x: 0 <= x < 1)

CONVOLUTIONS: dict[str, dict[str, Any]] = {
    "conv1": dict(out_channels=96, kernel_size=11, stride=4),
    "conv2": dict(out_channels=256, kernel_size=5, padding=2, groups=2),
    "conv3": dict(out_channels=384, kernel_size=3, padding=1),
    "conv4": dict(out_channels=384, kernel_size=3, padding=1, groups=2),
    "conv5": dict(out_channels=256, kernel_size=3, padding=1, groups=2),
}
POOLED = ("conv1", "conv2", "conv5")
BVLC_ZERO_BIASES = ("conv1", "conv3", "fc8")
SMALLEST_SIDE = 39


class WindowNorm(torch.autograd.Function):
    """x / d ** beta with d = k + alpha / size * the sum of x ** 2 over ``size`` neighbouring channels.

    Caffe's formulas for both directions, in fp32 or wider; the backward keeps x and d. torch's own form takes its window
    sums by average pooling, which on the CPU costs more than AlexNet's convolutions, and has no bf16 there.
    """

    @staticmethod
    def forward(ctx, x: Tensor, size: int, alpha: float, beta: float, k: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        divisor = window_sums(wide.square(), size).mul_(alpha / size).add_(k)
        ctx.save_for_backward(x, divisor)
        ctx.size, ctx.alpha, ctx.beta = size, alpha, beta
        return power(divisor, -beta).mul_(wide).to(x.dtype)

    @staticmethod
    def backward(ctx, grad_y):
        x, divisor = ctx.saved_tensors
        wide, grad_y = x.to(divisor.dtype), grad_y.to(divisor.dtype)
        own = power(divisor, -ctx.beta).mul_(grad_y)
        shared = window_sums((own * wide).div_(divisor), ctx.size, is_mirrored=True)
        grad_x = own.sub_(shared.mul_(wide), alpha=2 * ctx.alpha * ctx.beta / ctx.size)
        return grad_x.to(x.dtype), None, None, None, None


def power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent, by roots where the exponent is AlexNet's: a general power is several times as slow."""
    return base.rsqrt().sqrt_().mul_(base.rsqrt()) if exponent == -0.75 else base.pow(exponent)


def window_sums(values: Tensor, size: int, *, is_mirrored: bool = False) -> Tensor:
    """The sums over channels c - size // 2 to c + (size - 1) // 2; mirrored: over the channels whose windows hold c."""
    sums = values.clone()
    before, after = size // 2, (size - 1) // 2
    if is_mirrored:
        before, after = after, before
    for shift in range(1, min(before, values.shape[1] - 1) + 1):
        sums[:, shift:] += values[:, :-shift]
    for shift in range(1, min(after, values.shape[1] - 1) + 1):
        sums[:, :-shift] += values[:, shift:]
    return sums


class LocalResponseNorm(nn.LocalResponseNorm):
    """torch's, fast on CPUs, and in any floating-point type and memory format."""

    def forward(self, hidden: Tensor) -> Tensor:
        return WindowNorm.apply(hidden, self.size, self.alpha, self.beta, self.k)


class AlexNet(nn.Module):
    """See the module's docstring.

    Args:
        norms: modules for "after_conv<i>" (before the ReLU), "after_relu<i>" and "after_pool<i>"; absent: none.
        convolutions_without_bias: names.
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int],
        num_classes: int,
        *,
        norms: dict[str, nn.Module],
        convolutions_without_bias: tuple[str, ...] = (),
        dropout: float,
        bias_init: str,
    ):
        super().__init__()
        DROPOUT("model_options.dropout", dropout)
        one_of("lars", "bvlc")("model_options.bias_init", bias_init)
        channels, height, width = image_shape
        if min(height, width) < SMALLEST_SIDE:
            raise ValueError(
                f"alexnet got images of {height} x {width}; expected at least {SMALLEST_SIDE} x {SMALLEST_SIDE} (the "
                "papers' are 227 x 227)"
            )
        for name, shape in CONVOLUTIONS.items():
            setattr(self, name, nn.Conv2d(channels, **shape, bias=name not in convolutions_without_bias))
            channels = shape["out_channels"]
        self.norms = nn.ModuleDict(norms)
        self.fc6 = nn.Linear(channels * pooled_side(height) * pooled_side(width), 4096)
        self.fc7 = nn.Linear(4096, 4096)
        self.fc8 = nn.Linear(4096, num_classes)
        self.dropout = nn.Dropout(dropout)
        for name in (*CONVOLUTIONS, "fc6", "fc7", "fc8"):
            is_hidden_dense = name in ("fc6", "fc7")
            layer = getattr(self, name)
            nn.init.normal_(layer.weight, std=0.005 if is_hidden_dense else 0.01)
            if layer.bias is not None:
                lars_bias = 0.1 if is_hidden_dense else 0.01
                nn.init.constant_(
                    layer.bias, lars_bias if bias_init == "lars" else 0.0 if name in BVLC_ZERO_BIASES else 0.1
                )

    def forward(self, images: Tensor) -> Tensor:
        """[batch, num_classes] logits."""
        hidden = images
        for name in CONVOLUTIONS:
            hidden = self._normalised(f"after_{name}", getattr(self, name)(hidden))
            hidden = self._normalised(f"after_relu{name[-1]}", F.relu(hidden))
            if name in POOLED:
                hidden = F.max_pool2d(hidden, 3, stride=2, ceil_mode=True)
            hidden = self._normalised(f"after_pool{name[-1]}", hidden)
        hidden = self.dropout(F.relu(self.fc6(hidden.flatten(1))))
        hidden = self.dropout(F.relu(self.fc7(hidden)))
        return self.fc8(hidden)

    def _normalised(self, place: str, hidden: Tensor) -> Tensor:
        return self.norms[place](hidden) if place in self.norms else hidden


def pooled_side(side: int) -> int:
    """Height or width after the last pooling."""
    side = (side - 11) // 4 + 1
    for _ in POOLED:
        side = -(-(side - 3) // 2) + 1
    return side


def build_alexnet(
    image_shape: tuple[int, int, int] = (3, 227, 227),
    num_classes: int = 1000,
    dropout: float = 0.5,
    bias_init: str = "lars",
) -> AlexNet:
    """AlexNet with local response normalisation.

    Args:
        dropout: >= 0 and < 1, probability of dropping a hidden unit of a dense layer.
        bias_init: "lars" (0.01 and 0.1) or "bvlc" (0 and 0.1); see the module's docstring.

    Raises:
        ValueError, TypeError: an option is illegal, or the images are too small.
    """
    norms: dict[str, nn.Module] = {f"after_relu{i}": LocalResponseNorm(5, alpha=1e-4, beta=0.75, k=1.0) for i in (1, 2)}
    return AlexNet(image_shape, num_classes, norms=norms, dropout=dropout, bias_init=bias_init)


def build_alexnet_bn(
    image_shape: tuple[int, int, int] = (3, 227, 227),
    num_classes: int = 1000,
    dropout: float = 0.5,
    bias_init: str = "lars",
    placement: str = "conv_input",
) -> AlexNet:
    """AlexNet with batch normalisation.

    Args:
        dropout, bias_init: as build_alexnet.
        placement: "conv_input" or "conv_output"; see the module's docstring.

    Raises:
        ValueError, TypeError: an option is illegal, or the images are too small.
    """
    one_of("conv_input", "conv_output")("model_options.placement", placement)
    norms: dict[str, nn.Module]
    if placement == "conv_input":
        norms = {
            f"after_pool{i}": nn.BatchNorm2d(CONVOLUTIONS[f"conv{i}"]["out_channels"], eps=1e-4, affine=False)
            for i in (1, 2, 3, 4)
        }
        without_bias: tuple[str, ...] = ()
    else:
        norms = {f"after_{name}": nn.BatchNorm2d(c["out_channels"], eps=1e-4) for name, c in CONVOLUTIONS.items()}
        without_bias = ("conv1", "conv2", "conv3", "conv4")
    return AlexNet(
        image_shape,
        num_classes,
        norms=norms,
        convolutions_without_bias=without_bias,
        dropout=dropout,
        bias_init=bias_init,
    )
